//! ACPI for an ARM machine with a GICv3 and PSCI (ACPI 6.5, Arm BBR).
//!
//! | table | what it says |
//! |---|---|
//! | FADT | hardware-reduced, no registers: PSCI by HVC turns the machine off |
//! | MADT | GIC: CPU interfaces, distributor, redistributors in one range, ITS |
//! | GTDT | interrupts of the generic timer |
//! | IORT | PCI messages go to the ITS with the requester id as device id |
//! | SPCR | the PL011, as the console |
//! | PPTT | which processors share a core, a die, a package |
//! | MCFG | ECAM of every PCI segment |
//! | VIOT | which PCI functions are behind a virtio-iommu, when there is one |
//! | SRAT, SLIT | NUMA nodes of processors and memory, distances between them |
//! | DSDT | PCI roots, processors, event device, power button, serial port |

mod config;
mod dsdt;
mod gtdt;
mod iort;
mod madt;
mod pptt;
mod spcr;
#[cfg(test)]
mod tests;

pub use config::{ArmAcpiConfig, ArmCpu, Gic, Timer, Topology, Uart};

use super::{AcpiError, AcpiTables, Block, fadt, numa, pci, viot};

/// Makes the tables for `config`.
pub fn build(config: &ArmAcpiConfig) -> Result<AcpiTables, AcpiError> {
    config.check()?;
    let mut block = Block::new(config.placement.tables);
    let dsdt = block.add(dsdt::dsdt(config));
    let mut tables = vec![
        fadt::arm_fadt(dsdt),
        madt::madt(config),
        gtdt::gtdt(&config.timer),
        pptt::pptt(&config.topology),
    ];
    if !config.pci.is_empty() {
        tables.push(pci::mcfg(&config.pci));
        tables.push(iort::iort(&config.pci));
    }
    tables.extend(viot::viot(&config.pci));
    if let Some(uart) = &config.uart {
        tables.push(spcr::spcr(uart));
    }
    if !config.numa.is_empty() {
        let cpus = (0u32..).zip(&config.cpus).map(|(uid, cpu)| numa::gicc(uid, cpu.node));
        tables.push(numa::srat(cpus, &config.numa));
        tables.extend(numa::slit(&config.numa));
    }
    let pointers = tables.into_iter().map(|table| block.add(table)).collect();
    block.finish(pointers, &config.placement)
}
