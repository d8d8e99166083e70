//! The ACPI tables a guest of this platform lives by: MADT, MCFG and FADT, every checksum verified (ACPI 6.5 §5.2).

use crate::arch::{boot, paging};
use crate::memory::bytes;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// A processor of the MADT.
#[derive(Clone, Copy)]
pub struct Processor {
    /// APIC id, or the affinity fields of MPIDR.
    pub id: u64,
    /// Ready for use at boot (flag bit 0).
    pub enabled: bool,
}

/// ARM's interrupt controller.
#[derive(Clone, Default)]
pub struct Gic {
    /// Address of the distributor.
    pub distributor: u64,
    /// Ranges of redistributors: address and bytes.
    pub redistributors: Vec<(u64, u64)>,
    /// Address of the first interrupt translation service.
    pub its: Option<u64>,
}

/// A processor or memory, and the NUMA node it is in (SRAT).
#[derive(Clone, Copy)]
pub enum Affinity {
    /// A processor, by the identifier of its APIC or its ACPI UID: that, and its node.
    Processor(u64, u32),
    /// Memory: first address, bytes, node, and whether it may come later only.
    Memory(u64, u64, u32, bool),
}

/// What was found.
#[derive(Default)]
pub struct Acpi {
    /// Signatures in the order of the root table, DSDT included.
    pub tables: Vec<String>,
    /// Processors in table order.
    pub processors: Vec<Processor>,
    /// The GIC, if the MADT has one.
    pub gic: Option<Gic>,
    /// Flags of the FADT for ARM: bit 0 PSCI, bit 1 by HVC.
    pub arm_boot: u16,
    /// Base of the ECAM of segment 0, and its last bus.
    pub ecam: Option<(u64, u8)>,
    /// Reset register port and value.
    pub reset: Option<(u16, u8)>,
    /// Sleep control port.
    pub sleep_control: Option<u16>,
    /// What is in which NUMA node, if the machine has any.
    pub affinities: Vec<Affinity>,
    /// Distances between NUMA nodes, row by row, and how many nodes there are.
    pub distances: Option<(u64, Vec<u8>)>,
    /// The hardware-reduced flag.
    pub hardware_reduced: bool,
}

fn u16_at(table: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(table.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(table: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(table.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(table: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(table.get(at..at + 8)?.try_into().ok()?))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// A table by address, mapped, its length sane and its checksum right.
fn table(address: u64) -> Result<&'static [u8], String> {
    if paging::map(&(address..address.saturating_add(1 << 20)), true) != Some(address) {
        return Err(format!("table at {address:#x} is out of reach"));
    }
    // SAFETY: mapped above; nobody writes ACPI tables while the guest runs.
    let len = u32_at(unsafe { bytes(address, 36) }, 4).unwrap_or(0) as usize;
    if !(36..1 << 20).contains(&len) {
        return Err(format!("table at {address:#x} has length {len}"));
    }
    // SAFETY: as above.
    let table = unsafe { bytes(address, len) };
    match sum(table) {
        0 => Ok(table),
        sum => Err(format!(
            "table {} at {address:#x} has checksum {sum:#x}",
            signature(table)
        )),
    }
}

fn signature(table: &[u8]) -> String {
    table[..4].iter().map(|byte| char::from(*byte)).collect()
}

fn find_rsdp(hint: u64) -> Result<&'static [u8], String> {
    let candidates = core::iter::once(hint).filter(|at| *at != 0).chain(boot::rsdp_places());
    for address in candidates {
        // SAFETY: the architecture names only places that are mapped from the start, and so does the VMM.
        let rsdp = unsafe { bytes(address, 36) };
        if rsdp.starts_with(b"RSD PTR ") {
            let len = if rsdp[15] >= 2 { 36 } else { 20 };
            return if sum(&rsdp[..20]) == 0 && sum(&rsdp[..len]) == 0 {
                Ok(rsdp)
            } else {
                Err(format!("RSDP at {address:#x} has a wrong checksum"))
            };
        }
    }
    Err("no RSDP".into())
}

/// Walks the tables from the RSDP at `hint` (searched for when 0).
pub fn read(hint: u64) -> Result<Acpi, String> {
    let rsdp = find_rsdp(hint)?;
    let mut acpi = Acpi::default();
    let xsdt = if rsdp[15] >= 2 {
        u64_at(rsdp, 24).unwrap_or(0)
    } else {
        0
    };
    let (root, width) = if xsdt != 0 {
        (table(xsdt)?, 8)
    } else {
        (table(u32_at(rsdp, 16).unwrap_or(0).into())?, 4)
    };
    for entry in root[36..].chunks_exact(width) {
        let address = if width == 8 {
            u64_at(entry, 0)
        } else {
            u32_at(entry, 0).map(u64::from)
        }
        .unwrap_or(0);
        let table = table(address)?;
        acpi.tables.push(signature(table));
        match &table[..4] {
            b"APIC" => acpi.read_madt(table),
            b"SRAT" => acpi.read_srat(table),
            b"SLIT" => {
                let distances = table.get(44..).unwrap_or(&[]).into();
                acpi.distances = Some((u64_at(table, 36).unwrap_or(0), distances));
            }
            b"MCFG" => acpi.ecam = u64_at(table, 44).zip(table.get(55).copied()),
            b"FACP" => acpi.read_fadt(table)?,
            _ => {}
        }
    }
    Ok(acpi)
}

impl Acpi {
    fn read_madt(&mut self, madt: &[u8]) {
        let mut rest = madt.get(44..).unwrap_or(&[]);
        while let [kind, len, ..] = *rest {
            let len = usize::from(len);
            if len < 2 || len > rest.len() {
                break;
            }
            let entry = &rest[..len];
            let found = match kind {
                0 => entry.get(3).map(|id| u64::from(*id)).zip(u32_at(entry, 4)),
                9 => u32_at(entry, 4).map(u64::from).zip(u32_at(entry, 8)),
                11 => u64_at(entry, 68).zip(u32_at(entry, 12)),
                12 | 14 | 15 => {
                    self.read_gic(kind, entry);
                    None
                }
                _ => None,
            };
            if let Some((id, flags)) = found {
                self.processors.push(Processor {
                    id,
                    enabled: flags & 1 != 0,
                });
            }
            rest = &rest[len..];
        }
    }

    /// What is enabled (ACPI 6.5 §5.2.16).
    fn read_srat(&mut self, srat: &[u8]) {
        let mut rest = srat.get(48..).unwrap_or(&[]);
        while let [kind, len, ..] = *rest {
            let len = usize::from(len);
            if len < 2 || len > rest.len() {
                break;
            }
            let entry = &rest[..len];
            let enabled = |at| u32_at(entry, at).filter(|flags| flags & 1 != 0);
            let processor = |id: Option<u64>, node: Option<u32>| Some(Affinity::Processor(id?, node?));
            let found = match kind {
                0 => enabled(4).and_then(|_| {
                    let high = u32_at(entry, 8).map(|high| high & 0xffff_ff00);
                    let node = entry.get(2).map(|low| u32::from(*low)).zip(high);
                    processor(
                        entry.get(3).map(|id| u64::from(*id)),
                        node.map(|(low, high)| low | high),
                    )
                }),
                1 => enabled(28).and_then(|flags| {
                    let (base, size) = (u64_at(entry, 8)?, u64_at(entry, 16)?);
                    Some(Affinity::Memory(base, size, u32_at(entry, 2)?, flags & 2 != 0))
                }),
                2 => enabled(12).and_then(|_| processor(u32_at(entry, 8).map(u64::from), u32_at(entry, 4))),
                3 => enabled(10).and_then(|_| processor(u32_at(entry, 6).map(u64::from), u32_at(entry, 2))),
                _ => None,
            };
            self.affinities.extend(found);
            rest = &rest[len..];
        }
    }

    /// Distributor, redistributors and ITS (ACPI 6.5 §5.2.12.15, 17 and 18).
    fn read_gic(&mut self, kind: u8, entry: &[u8]) {
        let gic = self.gic.get_or_insert_default();
        match kind {
            12 => gic.distributor = u64_at(entry, 8).unwrap_or(0),
            14 => {
                let range = u64_at(entry, 4).zip(u32_at(entry, 12).map(u64::from));
                gic.redistributors.extend(range);
            }
            _ => gic.its = gic.its.or(u64_at(entry, 8)),
        }
    }

    fn read_fadt(&mut self, fadt: &[u8]) -> Result<(), String> {
        let flags = u32_at(fadt, 112).unwrap_or(0);
        self.hardware_reduced = flags & 1 << 20 != 0;
        // Generic address structures: address space 1 is I/O ports.
        let port = |at: usize| {
            (fadt.get(at) == Some(&1))
                .then(|| u64_at(fadt, at + 4))
                .flatten()
                .map(|port| port as u16)
                .filter(|port| *port != 0)
        };
        if flags & 1 << 10 != 0 {
            self.reset = port(116).zip(fadt.get(128).copied());
        }
        self.sleep_control = port(244);
        self.arm_boot = u16_at(fadt, 129).unwrap_or(0);
        let dsdt = match u64_at(fadt, 140) {
            Some(address) if address != 0 => address,
            _ => u32_at(fadt, 40).unwrap_or(0).into(),
        };
        self.tables.push(signature(table(dsdt)?));
        u16_at(fadt, 109).map(|_| ()).ok_or_else(|| "FADT is too short".into())
    }
}
