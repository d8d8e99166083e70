//! DSDT: the name space.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, ZERO};
use acpi_tables::{Aml, AmlSink};

use super::config::{AcpiConfig, PciSegment, PmConfig, Register, Rtc, SerialPort};
use super::table::Table;
use super::{cpus, events, memory, pci};

/// From this revision on, integers have 64 bits.
pub(super) const REVISION: u8 = 2;

/// AML that was made before.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Raw {
    pub(super) fn of(aml: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        aml.to_aml_bytes(&mut bytes);
        Self(bytes)
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// References to all of `parts`, as AML terms take their children.
pub(super) fn refs<T: Aml>(parts: &[T]) -> Vec<&dyn Aml> {
    parts.iter().map(|part| part as &dyn Aml).collect()
}

pub(super) fn name(name: &str, value: &dyn Aml) -> Raw {
    Raw::of(&Name::new(Path::new(name), value))
}

pub(super) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut table = Table::new(*b"DSDT", REVISION);
    for segment in pci::roots(&config.pci, true, !config.numa.is_empty()) {
        table.push_aml(&segment);
    }
    table.push_aml(&motherboard(config));
    table.push_aml(&cpus::container(config));
    if let Some(slots) = &config.memory_hotplug {
        table.push_aml(&memory::container(slots, !config.numa.is_empty()));
    }
    for (index, port) in config.serial.iter().enumerate() {
        table.push_aml(&serial(index, port));
    }
    if let Some(rtc) = &config.rtc {
        table.push_aml(&real_time_clock(rtc));
    }
    if let Some(device) = &config.events {
        table.push_aml(&events::power_button());
        let scans = events::scans(
            config.cpu_hotplug.is_some(),
            config.memory_hotplug.is_some(),
            &config.pci,
        );
        table.push_aml(&events::event_device(device, &scans));
    }
    table.push_aml(&soft_off());
    table.finish()
}

/// `\_S5_`: what soft-off writes into the sleep control register's `SLP_TYP`.
fn soft_off() -> Raw {
    let sleep_type = PmConfig::S5;
    let package = Package::new(vec![&sleep_type, &sleep_type, &ZERO, &ZERO]);
    name("_S5_", &package)
}

/// The device that claims what no other driver claims: ECAM and the fixed registers. Linux uses ECAM only when it is claimed.
fn motherboard(config: &AcpiConfig) -> Raw {
    let mut resources = Vec::new();
    for segment in PciSegment::joined(&config.pci) {
        let (base, size) = segment.ecam();
        resources.push(memory_claim(base, size));
    }
    for (port, size) in claimed_ports(config) {
        resources.push(Raw::of(&IO::new(port, port, 1, size)));
    }
    if let Some(Register::Memory(at)) = config.events.map(|device| device.register) {
        resources.push(memory_claim(at, 1));
    }
    resources.extend(pci::slot_claims(&config.pci));
    if let Some(at) = config.cpu_hotplug {
        resources.push(memory_claim(at, cpus::registers_size(config.cpus.len())));
    }
    if let Some(slots) = &config.memory_hotplug {
        resources.push(memory_claim(slots.registers, slots.registers_size()));
    }
    Raw::of(&Device::new(
        Path::new("\\_SB_.MBRD"),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(refs(&resources))),
        ],
    ))
}

/// Ports of fixed registers with their numbers of bytes, each once.
fn claimed_ports(config: &AcpiConfig) -> Vec<(u16, u8)> {
    let pm = &config.pm;
    let mut ports = vec![(pm.sleep_control, 1), (pm.sleep_status, 1)];
    ports.extend(pm.pm_timer.map(|port| (port, 4)));
    ports.extend(pm.reset.map(|reset| (reset.port, 1)));
    if let Some(Register::Io(port)) = config.events.map(|device| device.register) {
        ports.push((port, 1));
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// A claim of a memory range, in the descriptor that its address needs.
pub(super) fn memory_claim(base: u64, size: u64) -> Raw {
    match (u32::try_from(base), u32::try_from(size)) {
        (Ok(base), Ok(size)) => Raw::of(&Memory32Fixed::new(true, base, size)),
        _ => pci::memory_window(base, size, false),
    }
}

fn serial(index: usize, port: &SerialPort) -> Raw {
    let number = index + 1;
    let interrupt = Interrupt::new(true, true, false, false, port.gsi);
    let ports = IO::new(port.port, port.port, 1, 8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    Raw::of(&Device::new(
        Path::new(&format!("\\_SB_.COM{number:X}")),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &number),
            &name("_DDN", &format!("COM{number:X}")),
            &name("_CRS", &resources),
        ],
    ))
}

fn real_time_clock(rtc: &Rtc) -> Raw {
    let mut resources = vec![Raw::of(&IO::new(rtc.port, rtc.port, 1, 2))];
    if let Some(gsi) = rtc.gsi {
        resources.push(Raw::of(&Interrupt::new(true, true, false, false, gsi)));
    }
    Raw::of(&Device::new(
        Path::new("\\_SB_.RTC_"),
        vec![
            &name("_HID", &EISAName::new("PNP0B00")),
            &name("_CRS", &ResourceTemplate::new(refs(&resources))),
        ],
    ))
}
