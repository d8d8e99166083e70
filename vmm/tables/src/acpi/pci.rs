//! PCI roots and MCFG (PCI Firmware Specification 3.3, ACPI 6.2.11).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If, Local,
    Method, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path, ResourceTemplate, Return, Store, Uuid, ZERO,
};

use super::config::{PciSegment, PrtEntry};
use super::dsdt::{Raw, memory_claim, name, refs};
use super::pci_slots;
use super::table::Table;

const MCFG_REVISION: u8 = 1;
/// `_OSC` of PCI Express host bridges (PCI Firmware Specification 4.5.1).
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// What the guest may control: PME, AER, the PCI Express capability, LTR. Not hot-plug (bits 0 and 1): that is done by ACPI.
const OSC_GRANTED: u32 = 0x3c;
const OSC_UNKNOWN_UUID: u32 = 1 << 2;
const OSC_UNKNOWN_REVISION: u32 = 1 << 3;
const OSC_MASKED: u32 = 1 << 4;
/// All functions of a device, as `_PRT` writes it.
const ALL_FUNCTIONS: u32 = 0xffff;
const PINS: u8 = 4;
const DEVICES: u8 = 32;

/// Routes for all 32 devices of a bus over `gsis`, so that INTA of neighbours differs. Empty without `gsis`.
pub fn rotating_prt(gsis: &[u32]) -> Vec<PrtEntry> {
    if gsis.is_empty() {
        return Vec::new();
    }
    (0..DEVICES)
        .flat_map(|device| (0..PINS).map(move |pin| (device, pin)))
        .map(|(device, pin)| PrtEntry {
            device,
            pin,
            gsi: gsis[usize::from(device + pin) % gsis.len()],
        })
        .collect()
}

pub(super) fn mcfg(segments: &[PciSegment]) -> Vec<u8> {
    let mut table = Table::new(*b"MCFG", MCFG_REVISION);
    table.push(&[0; 8]);
    for segment in PciSegment::joined(segments) {
        table.push(&segment.ecam_base.to_le_bytes());
        table.push(&segment.segment.to_le_bytes());
        table.push(&[segment.first_bus, segment.last_bus, 0, 0, 0, 0]);
    }
    table.finish()
}

/// The root devices, `\_SB.PCI0` and so on; with `config_ports` the first has the PC's ports for configuration space.
pub(super) fn roots(segments: &[PciSegment], config_ports: bool, numa: bool) -> Vec<Raw> {
    segments
        .iter()
        .enumerate()
        .map(|(index, segment)| {
            let others = others(index, segments);
            root(index, segment, config_ports && index == 0, numa, &others)
        })
        .collect()
}

/// The other roots whose slots the first root of a segment hears of: their paths, and the numbers of their first slots.
fn others(index: usize, segments: &[PciSegment]) -> Vec<(String, u32)> {
    let Some(own) = segments
        .get(index)
        .and_then(|segment| segment.slots)
        .filter(|slots| slots.first == 0)
    else {
        return Vec::new();
    };
    let other = |(at, segment): (usize, &PciSegment)| {
        let slots = segment
            .slots
            .filter(|slots| at != index && slots.registers == own.registers)?;
        Some((root_path(at), slots.first))
    };
    segments.iter().enumerate().filter_map(other).collect()
}

fn root(index: usize, segment: &PciSegment, config_ports: bool, numa: bool, others: &[(String, u32)]) -> Raw {
    let mut children = vec![
        name("_HID", &EISAName::new("PNP0A08")),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_SEG", &segment.segment),
        name("_BBN", &segment.first_bus),
        name("_UID", &index),
        // Devices see memory as the processors' caches do.
        name("_CCA", &ONE),
        name("_CRS", &resources(config_ports, segment)),
        osc(),
    ];
    if numa {
        children.push(name("_PXM", &segment.node));
    }
    if !segment.prt.is_empty() {
        children.push(routes(&segment.prt));
    }
    let path = root_path(index);
    if let Some(slots) = &segment.slots {
        children.extend(pci_slots::devices(&path, slots, others));
    }
    Raw::of(&Device::new(Path::new(&path), refs(&children)))
}

fn root_path(index: usize) -> String {
    format!("\\_SB_.PCI{index:X}")
}

/// Methods that handle what the event device reports about slots: one for each segment, in its first root.
pub(super) fn scans(segments: &[PciSegment]) -> Vec<String> {
    let with_slots = segments
        .iter()
        .enumerate()
        .filter(|(_, segment)| segment.slots.is_some_and(|slots| slots.first == 0));
    with_slots
        .map(|(index, _)| pci_slots::scan_method(&root_path(index)))
        .collect()
}

/// Claims of the registers of slots.
pub(super) fn slot_claims(segments: &[PciSegment]) -> impl Iterator<Item = Raw> {
    let slots = segments.iter().filter_map(|segment| segment.slots.as_ref());
    let firsts = slots.filter(|slots| slots.first == 0);
    firsts.map(|slots| {
        let shares = |other: &&PciSegment| other.slots.is_some_and(|other| other.registers == slots.registers);
        let roots = segments.iter().filter(shares).count();
        memory_claim(slots.registers, pci_slots::registers_size(roots))
    })
}

fn resources(has_config_ports: bool, segment: &PciSegment) -> Raw {
    let mut list = vec![Raw::of(&AddressSpace::<u16>::new_bus_number(
        segment.first_bus.into(),
        segment.last_bus.into(),
    ))];
    if has_config_ports {
        list.push(Raw::of(&IO::new(0xcf8, 0xcf8, 1, 8)));
    }
    list.extend(
        segment
            .io
            .iter()
            .map(|window| Raw::of(&AddressSpace::<u16>::new_io(window.first, window.last, None))),
    );
    list.extend(
        segment
            .mmio
            .iter()
            .map(|window| memory_window(window.start, window.size, window.prefetchable)),
    );
    Raw::of(&ResourceTemplate::new(refs(&list)))
}

/// A memory descriptor, of 32 bits where that suffices. The range was checked: not empty, no wrapping.
pub(super) fn memory_window(start: u64, size: u64, prefetchable: bool) -> Raw {
    let caching = if prefetchable {
        AddressSpaceCacheable::PreFetchable
    } else {
        AddressSpaceCacheable::NotCacheable
    };
    let last = start + (size - 1);
    match (u32::try_from(start), u32::try_from(last)) {
        (Ok(start), Ok(last)) => Raw::of(&AddressSpace::<u32>::new_memory(caching, true, start, last, None)),
        _ => Raw::of(&AddressSpace::<u64>::new_memory(caching, true, start, last, None)),
    }
}

fn routes(prt: &[PrtEntry]) -> Raw {
    let mut package = PackageBuilder::new();
    for entry in prt {
        let address = u32::from(entry.device) << 16 | ALL_FUNCTIONS;
        package.add_element(&Package::new(vec![&address, &entry.pin, &ZERO, &entry.gsi]));
    }
    Raw::of(&Name::new(Path::new("_PRT"), &package))
}

/// `_OSC`: grants what [`OSC_GRANTED`] has and says when that is less than was asked for.
fn osc() -> Raw {
    let status = Path::new("CDW1");
    let control = Path::new("CDW3");
    let set_status = |bit: u32| Raw::of(&Or::new(&status, &status, &bit));
    let granted = [
        Raw::of(&CreateDWordField::new(&control, &Arg(3), &8u8)),
        Raw::of(&Store::new(&Local(0), &control)),
        Raw::of(&And::new(&Local(0), &Local(0), &OSC_GRANTED)),
        Raw::of(&If::new(
            &NotEqual::new(&Arg(1), &ONE),
            vec![&set_status(OSC_UNKNOWN_REVISION)],
        )),
        Raw::of(&If::new(
            &NotEqual::new(&Local(0), &control),
            vec![&set_status(OSC_MASKED)],
        )),
        Raw::of(&Store::new(&control, &Local(0))),
    ];
    Raw::of(&Method::new(
        Path::new("_OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &If::new(&Equal::new(&Arg(0), &Uuid::new(OSC_UUID)), refs(&granted)),
            &Else::new(vec![&set_status(OSC_UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ))
}
