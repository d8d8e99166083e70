//! Processor devices.
//!
//! Every processor that may ever be there has a device in `\_SB.CPUS`. Where processors come and go, each is a slot of `slots.rs`.

use acpi_tables::aml::{BufferData, Device, EISAName, Name, Path, Return};

use super::config::{AcpiConfig, Cpu};
use super::dsdt::{Raw, name, refs};
use super::madt::enabled_cpu_entry;
use super::slots::{Slots, method};

/// Present, enabled, shown, functioning (ACPI 6.3.7).
pub(super) const STATUS_THERE: u8 = 0xf;
const STATUS_ABSENT: u8 = 0;

/// Handles what the event device reports about processors.
pub(super) const SCAN: &str = "\\_SB_.CPUS.CSCN";

/// Registers of processors that come and go.
const SLOTS: Slots = Slots {
    letter: 'C',
    stride: 0x10,
};

/// A processor, as far as its device does not depend on the architecture.
pub(super) struct Processor {
    /// Its entry of the MADT, as that of a processor that is there.
    pub(super) entry: Vec<u8>,
    /// `_STA` where processors neither come nor go.
    pub(super) status: u8,
    /// Whether it can be given back.
    pub(super) removable: bool,
    /// Its NUMA node, with NUMA.
    pub(super) node: Option<u32>,
}

/// `\_SB.CPUS` of a PC.
pub(super) fn container(config: &AcpiConfig) -> Raw {
    let numa = !config.numa.is_empty();
    let processor = |(uid, cpu): (u32, &Cpu)| Processor {
        entry: enabled_cpu_entry(uid, cpu),
        status: if cpu.enabled { STATUS_THERE } else { STATUS_ABSENT },
        removable: cpu.removable,
        node: numa.then_some(cpu.node),
    };
    let processors: Vec<_> = (0u32..).zip(&config.cpus).map(processor).collect();
    processor_container(&processors, config.cpu_hotplug)
}

/// `\_SB.CPUS` with `processors`, which come and go by the registers at `registers`.
pub(super) fn processor_container(processors: &[Processor], registers: Option<u64>) -> Raw {
    let mut children = vec![name("_HID", &"ACPI0010"), name("_CID", &EISAName::new("PNP0A05"))];
    children.extend(
        (0u32..)
            .zip(processors)
            .map(|(uid, processor)| device(uid, processor, registers)),
    );
    if let Some(at) = registers {
        children.extend(SLOTS.shared(at, 0..processors.len() as u32, None, &[]));
    }
    Raw::of(&Device::new(Path::new("\\_SB_.CPUS"), refs(&children)))
}

/// Bytes of all registers.
pub(super) fn registers_size(processors: usize) -> u64 {
    SLOTS.size(processors)
}

fn device(uid: u32, processor: &Processor, registers: Option<u64>) -> Raw {
    let mut children = vec![name("_HID", &"ACPI0007"), name("_UID", &uid)];
    match registers {
        Some(at) => {
            children.extend(SLOTS.own(at, uid, processor.removable, &[]));
            children.push(method("_STA", 0, &[Raw::of(&Return::new(&Path::new("CSTA")))]));
        }
        None => children.push(method("_STA", 0, &[Raw::of(&Return::new(&processor.status))])),
    }
    let entry = BufferData::new(processor.entry.clone());
    children.push(Raw::of(&Name::new(Path::new("_MAT"), &entry)));
    if let Some(node) = &processor.node {
        children.push(name("_PXM", node));
    }
    Raw::of(&Device::new(Path::new(&SLOTS.device_name(uid)), refs(&children)))
}
