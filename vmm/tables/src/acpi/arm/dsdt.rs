//! DSDT: the name space of an ARM machine.

use acpi_tables::aml::{Device, EISAName, Interrupt, Memory32Fixed, Path, ResourceTemplate, ZERO};

use super::super::config::{PciSegment, Register};
use super::super::dsdt::{REVISION, Raw, memory_claim, name, refs};
use super::super::table::Table;
use super::super::{cpus, events, memory, pci};
use super::config::{ArmAcpiConfig, ArmCpu, Uart};
use super::madt::enabled_cpu_entry;

/// Present, shown, functioning, not enabled (ACPI 6.3.7): ARM's processors are always present, their GIC interfaces cannot come later.
const STATUS_DISABLED: u8 = 0xd;

pub(super) fn dsdt(config: &ArmAcpiConfig) -> Vec<u8> {
    let mut table = Table::new(*b"DSDT", REVISION);
    let numa = !config.numa.is_empty();
    for segment in pci::roots(&config.pci, false, numa) {
        table.push_aml(&segment);
    }
    table.push_aml(&motherboard(config));
    table.push_aml(&processors(config));
    if let Some(slots) = &config.memory_hotplug {
        table.push_aml(&memory::container(slots, numa));
    }
    if let Some(uart) = &config.uart {
        table.push_aml(&serial(uart));
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
    table.finish()
}

/// Claims what no driver claims: ECAM, without which Linux does not use it, and the machine's registers.
fn motherboard(config: &ArmAcpiConfig) -> Raw {
    let segments = PciSegment::joined(&config.pci);
    let ecam = segments.iter().map(PciSegment::ecam);
    let mut resources: Vec<Raw> = ecam
        .chain(config.claimed.iter().copied())
        .map(|(base, size)| memory_claim(base, size))
        .collect();
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

fn processors(config: &ArmAcpiConfig) -> Raw {
    let numa = !config.numa.is_empty();
    let processor = |(uid, cpu): (u32, &ArmCpu)| cpus::Processor {
        entry: enabled_cpu_entry(uid, cpu, &config.gic),
        status: if cpu.enabled {
            cpus::STATUS_THERE
        } else {
            STATUS_DISABLED
        },
        // Those that the MADT tells to be enabled stay (ACPI 5.2.12.14).
        removable: !cpu.enabled,
        node: numa.then_some(cpu.node),
    };
    let processors: Vec<_> = (0u32..).zip(&config.cpus).map(processor).collect();
    cpus::processor_container(&processors, config.cpu_hotplug)
}

/// Its registers are those of the SBSA generic UART and more.
fn serial(uart: &Uart) -> Raw {
    let interrupt = Interrupt::new(true, true, false, false, uart.gsi);
    let registers = Memory32Fixed::new(true, uart.base, uart.size);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Raw::of(&Device::new(
        Path::new("\\_SB_.COM1"),
        vec![
            &name("_HID", &"ARMH0011"),
            &name("_UID", &ZERO),
            &name("_CRS", &resources),
        ],
    ))
}
