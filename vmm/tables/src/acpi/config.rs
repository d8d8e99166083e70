//! What the tables say, as plain data.

use std::collections::HashSet;

use super::memory::MemorySlots;
use super::{AcpiError, numa};

/// Names run from C000 to CFFF.
pub(super) const MAX_CPUS: usize = 0x1000;
/// Names run from PCI0 to PCIF.
pub(super) const MAX_SEGMENTS: usize = 16;
/// As many as a PC can have.
const MAX_SERIAL_PORTS: usize = 4;
/// Elements that an AML package counts in its byte.
pub(super) const MAX_ROUTES: usize = 255;

/// Everything the tables say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Where the tables go.
    pub placement: AcpiPlacement,
    /// Processors that there are or may be later; the index is the ACPI processor UID.
    pub cpus: Vec<Cpu>,
    /// Address of the registers by which they come and go; without, those that are enabled are all there will ever be.
    pub cpu_hotplug: Option<u64>,
    /// Slots for memory that comes while the guest runs, if any does.
    pub memory_hotplug: Option<MemorySlots>,
    /// Interrupt controllers.
    pub interrupts: InterruptConfig,
    /// Sleep, reset and PM timer.
    pub pm: PmConfig,
    /// PCI segments; the first also has the configuration ports 0xCF8 to 0xCFF.
    pub pci: Vec<PciSegment>,
    /// The device that signals the power button and hot-plug.
    pub events: Option<EventDevice>,
    /// 16550 serial ports, at most four, in the order of their names.
    pub serial: Vec<SerialPort>,
    /// CMOS real-time clock.
    pub rtc: Option<Rtc>,
    /// NUMA nodes; the index is the proximity domain. Empty: no NUMA.
    pub numa: Vec<NumaNode>,
}

/// Guest physical addresses of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiPlacement {
    /// First address of the block of tables, a multiple of 16.
    pub tables: u64,
    /// Bytes reserved there.
    pub tables_size: u64,
    /// Address of the RSDP, a multiple of 16.
    pub rsdp: u64,
}

impl AcpiPlacement {
    /// The legacy area of a PC: tables from 0xA0000, the RSDP at 0xE0000 where a search finds it, SMBIOS above.
    pub const PC: Self = Self {
        tables: 0xA_0000,
        tables_size: 0x4_0000,
        rsdp: 0xE_0000,
    };
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its local APIC's identifier (x2APIC identifiers above 254).
    pub apic_id: u32,
    /// There from the start, or to be added later.
    pub enabled: bool,
    /// Whether it can be given back while the guest runs.
    pub removable: bool,
    /// Its NUMA node; not read without NUMA.
    pub node: u32,
}

/// Local and I/O APICs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterruptConfig {
    /// Address of every local APIC.
    pub lapic_base: u32,
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// ISA interrupts that are not edge-triggered and active-high on the pin of their number.
    pub overrides: Vec<IrqOverride>,
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its identifier.
    pub id: u8,
    /// Its address.
    pub base: u32,
    /// The global system interrupt of its first pin.
    pub gsi_base: u32,
}

/// Polarity of an interrupt line, with the numbers of MPS INTI flags (ACPI table 5.26).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqPolarity {
    /// Asserted high.
    High = 1,
    /// Asserted low.
    Low = 3,
}

/// Trigger of an interrupt line, with the numbers of MPS INTI flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqTrigger {
    /// On the edge.
    Edge = 1,
    /// On the level.
    Level = 3,
}

/// An interrupt source override.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqOverride {
    /// ISA interrupt number.
    pub irq: u8,
    /// Global system interrupt that it is.
    pub gsi: u32,
    /// Its polarity.
    pub polarity: IrqPolarity,
    /// Its trigger.
    pub trigger: IrqTrigger,
}

/// Fixed registers of the FADT, all in I/O space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmConfig {
    /// 8-bit sleep control register: `SLP_EN` is bit 5, `SLP_TYP` bits 2 to 4; 0x34 is soft-off.
    pub sleep_control: u16,
    /// 8-bit sleep status register: the guest writes 0x80 before it sleeps. May be the same port.
    pub sleep_status: u16,
    /// 32-bit, 3.579545 MHz timer.
    pub pm_timer: Option<u16>,
    /// Reset.
    pub reset: Option<ResetRegister>,
}

impl PmConfig {
    /// `SLP_TYP` of soft-off.
    pub const S5: u8 = 5;
}

/// An 8-bit port that resets the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetRegister {
    /// The port.
    pub port: u16,
    /// The value that resets.
    pub value: u8,
}

/// A root bus of a PCI segment. Those of one segment follow each other, with one ECAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciSegment {
    /// Segment number.
    pub segment: u16,
    /// Address of bus 0's ECAM, 1 MiB a bus.
    pub ecam_base: u64,
    /// First bus.
    pub first_bus: u8,
    /// Last bus.
    pub last_bus: u8,
    /// I/O windows.
    pub io: Vec<IoWindow>,
    /// Memory windows.
    pub mmio: Vec<MmioWindow>,
    /// Routes of INTA to INTD; empty when devices have message interrupts only.
    pub prt: Vec<PrtEntry>,
    /// NUMA node; not read without NUMA.
    pub node: u32,
    /// How devices of its own bus come and go; without, those that are there stay. The registers of a segment's slots are one block.
    pub slots: Option<PciSlots>,
    /// The virtio-iommu that some of its functions are behind; at most one segment has one.
    pub iommu: Option<PciIommu>,
}

/// An IOMMU that is a PCI function itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciIommu {
    /// Its requester id.
    pub requester: u16,
    /// The functions behind it: first and last requester id of each range.
    pub behind: Vec<(u16, u16)>,
}

/// Slots whose devices come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciSlots {
    /// Address of the registers of all slots of the segment.
    pub registers: u64,
    /// Number there of the first slot of this bus, a multiple of 32.
    pub first: u32,
    /// Bit n: the device of slot n of this bus stays.
    pub fixed: u32,
}

/// Ports that BARs may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoWindow {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

/// Addresses that BARs may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioWindow {
    /// First address; a window below 4 GiB must end there.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether only prefetchable BARs go there.
    pub prefetchable: bool,
}

/// A route of a device's interrupt pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrtEntry {
    /// Device number on the root bus.
    pub device: u8,
    /// Pin: 0 is INTA.
    pub pin: u8,
    /// Global system interrupt, level, active low.
    pub gsi: u32,
}

/// An 8-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// In I/O space.
    Io(u16),
    /// In memory space.
    Memory(u64),
}

/// The Generic Event Device (ACPI 5.6.9).
///
/// Reading its register returns the pending [`super::EventBits`] and clears them; the interrupt is edge-triggered, active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventDevice {
    /// Global system interrupt.
    pub gsi: u32,
    /// Register with the pending events.
    pub register: Register,
}

/// A 16550 serial port with eight ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First port.
    pub port: u16,
    /// Global system interrupt, edge, active high.
    pub gsi: u32,
}

/// An MC146818 real-time clock with two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtc {
    /// First port.
    pub port: u16,
    /// Global system interrupt, if the clock has alarms.
    pub gsi: Option<u32>,
}

/// A NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// Its memory.
    pub memory: Vec<MemoryAffinity>,
    /// Distances to every node, 10 to itself; all nodes or none have them.
    pub distances: Vec<u8>,
}

/// Memory of a NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryAffinity {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether it is only a place for memory added later.
    pub hotplug: bool,
}

impl AcpiConfig {
    /// Checks what the table writers rely on.
    pub(super) fn check(&self) -> Result<(), AcpiError> {
        self.check_cpus()?;
        if self.serial.len() > MAX_SERIAL_PORTS {
            return Err(AcpiError::TooManySerialPorts {
                count: self.serial.len(),
                max: MAX_SERIAL_PORTS,
            });
        }
        if self.pci.len() > MAX_SEGMENTS {
            return Err(AcpiError::TooManySegments {
                count: self.pci.len(),
                max: MAX_SEGMENTS,
            });
        }
        self.pci.iter().try_for_each(PciSegment::check)?;
        numa::check(&self.numa, self.cpus.iter().map(|cpu| cpu.node), &self.pci)
    }

    fn check_cpus(&self) -> Result<(), AcpiError> {
        if !self.cpus.iter().any(|cpu| cpu.enabled) {
            return Err(AcpiError::NoCpu);
        }
        if self.cpus.len() > MAX_CPUS {
            return Err(AcpiError::TooManyCpus {
                count: self.cpus.len(),
                max: MAX_CPUS,
            });
        }
        let mut ids = HashSet::new();
        match self.cpus.iter().find(|cpu| !ids.insert(cpu.apic_id)) {
            Some(cpu) => Err(AcpiError::DuplicateApicId(cpu.apic_id)),
            None => Ok(()),
        }
    }
}

impl PciSegment {
    /// `roots` with those of one segment in one: all of its buses.
    pub(super) fn joined(roots: &[Self]) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for root in roots {
            match all.last_mut() {
                Some(last) if last.segment == root.segment => last.last_bus = root.last_bus,
                _ => all.push(root.clone()),
            }
        }
        all
    }

    /// Addresses of the segment's ECAM: first and length in bytes.
    pub(super) fn ecam(&self) -> (u64, u64) {
        let first = u64::from(self.first_bus) << 20;
        let buses = u64::from(self.last_bus - self.first_bus) + 1;
        (self.ecam_base.saturating_add(first), buses << 20)
    }

    pub(super) fn check(&self) -> Result<(), AcpiError> {
        if self.last_bus < self.first_bus {
            return Err(AcpiError::BadBusRange {
                segment: self.segment,
                first: self.first_bus,
                last: self.last_bus,
            });
        }
        let (ecam, size) = self.ecam();
        check_window("ECAM", ecam, size)?;
        for window in &self.io {
            // The whole of I/O space has no length in 16 bits.
            let all = window.first == 0 && window.last == u16::MAX;
            if window.last < window.first || all {
                return Err(AcpiError::BadWindow {
                    what: "I/O",
                    start: window.first.into(),
                    size: (u64::from(window.last) + 1).saturating_sub(window.first.into()),
                });
            }
        }
        for window in &self.mmio {
            check_window("MMIO", window.start, window.size)?;
        }
        if self.prt.len() > MAX_ROUTES {
            return Err(AcpiError::TooManyRoutes {
                segment: self.segment,
                count: self.prt.len(),
                max: MAX_ROUTES,
            });
        }
        Ok(())
    }
}

/// Checks that a window has bytes, does not wrap, and does not lie across 4 GiB, where descriptors change their size.
pub(super) fn check_window(what: &'static str, start: u64, size: u64) -> Result<(), AcpiError> {
    const FOUR_GIB: u64 = 1 << 32;
    let bad = AcpiError::BadWindow { what, start, size };
    match start.checked_add(size) {
        None => Err(bad),
        Some(_) if size == 0 => Err(bad),
        Some(end) if what == "MMIO" && start < FOUR_GIB && end > FOUR_GIB => Err(bad),
        Some(_) => Ok(()),
    }
}
