//! Processor devices.
//!
//! Every processor that may ever be there has a device in `\_SB.CPUS`. What changes when processors come and go is only what
//! `_STA` returns; hot-plug replaces the constant by a register read and adds `_EJ0` and the handler of [`super::EventBits`].

use acpi_tables::aml::{BufferData, Device, EISAName, Method, Name, Path, Return};

use super::config::{AcpiConfig, Cpu};
use super::dsdt::{Raw, name, refs};
use super::madt::enabled_cpu_entry;

/// Present, enabled, shown, functioning (ACPI 6.3.7).
const STATUS_THERE: u8 = 0xf;
const STATUS_ABSENT: u8 = 0;

/// `\_SB.CPUS` with all processors.
pub(super) fn container(config: &AcpiConfig) -> Raw {
    let numa = !config.numa.is_empty();
    let mut children = vec![name("_HID", &"ACPI0010"), name("_CID", &EISAName::new("PNP0A05"))];
    children.extend((0u32..).zip(&config.cpus).map(|(uid, cpu)| device(uid, cpu, numa)));
    Raw::of(&Device::new(Path::new("\\_SB_.CPUS"), refs(&children)))
}

/// A processor's name, unique up to 4096.
pub(super) fn device_name(uid: u32) -> String {
    format!("C{uid:03X}")
}

fn device(uid: u32, cpu: &Cpu, numa: bool) -> Raw {
    let status = if cpu.enabled { STATUS_THERE } else { STATUS_ABSENT };
    let mut children = vec![
        name("_HID", &"ACPI0007"),
        name("_UID", &uid),
        Raw::of(&Method::new(Path::new("_STA"), 0, false, vec![&Return::new(&status)])),
        Raw::of(&Name::new(
            Path::new("_MAT"),
            &BufferData::new(enabled_cpu_entry(uid, cpu)),
        )),
    ];
    if numa {
        children.push(name("_PXM", &cpu.node));
    }
    Raw::of(&Device::new(Path::new(&device_name(uid)), refs(&children)))
}
