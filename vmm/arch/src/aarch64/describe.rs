//! The machine in the words of ACPI and of device trees.

use triarch_boot::arm64::{DeviceTree, Gic, Pci, Timer};
use triarch_legacy::{PL011_SIZE, PL031_SIZE, PL061_SIZE};
use triarch_tables::acpi::arm::{self, ArmAcpiConfig, ArmCpu, Uart};
use triarch_tables::acpi::{AcpiPlacement, EventDevice, Register};

use super::board::POWER_KEY;
use super::layout::{self, interrupt};
use crate::LoadConfig;
use crate::common::load::{memory_slots, pci_roots, ram};

const LAST_BUS: u8 = (layout::PCI_BUSES - 1) as u8;

fn redistributors_size(config: &LoadConfig<'_>) -> u64 {
    u64::from(config.plan.max_vcpus()) * layout::GIC_REDISTRIBUTOR_SIZE
}

pub(super) fn acpi(config: &LoadConfig<'_>) -> ArmAcpiConfig {
    let plan = config.plan;
    let topology = plan.topology();
    let cpu = |index| ArmCpu {
        mpidr: plan.hardware_id(index),
        enabled: index < plan.fixed_vcpus(),
        node: config.numa.of_cpu(index),
    };
    ArmAcpiConfig {
        placement: AcpiPlacement {
            tables: layout::ACPI_TABLES.start,
            tables_size: layout::ACPI_TABLES.size,
            rsdp: layout::RSDP,
        },
        cpus: (0..plan.max_vcpus()).map(cpu).collect(),
        cpu_hotplug: Some(layout::CPU_HOTPLUG),
        memory_hotplug: memory_slots(config, layout::MEMORY_HOTPLUG),
        topology: arm::Topology {
            threads: topology.threads_per_core,
            cores: topology.cores_per_die,
            dies: topology.dies_per_package,
            packages: topology.packages,
        },
        gic: arm::Gic {
            distributor: layout::GIC_DISTRIBUTOR,
            redistributors: layout::GIC_REDISTRIBUTORS,
            redistributors_size: redistributors_size(config) as u32,
            its: layout::GIC_ITS,
            pmu: plan.pmu_interrupt(),
        },
        timer: arm::Timer {
            secure: interrupt::TIMER_SECURE,
            physical: interrupt::TIMER_PHYSICAL,
            virt: interrupt::TIMER_VIRTUAL,
            hypervisor: interrupt::TIMER_HYPERVISOR,
        },
        pci: pci_roots(config, layout::ECAM, layout::PCI_HOTPLUG),
        events: Some(EventDevice {
            gsi: interrupt::GED,
            register: Register::Memory(layout::GED),
        }),
        uart: config.board.serial().map(|_| Uart {
            base: layout::UART as u32,
            size: PL011_SIZE as u32,
            gsi: interrupt::UART,
        }),
        claimed: vec![(layout::RTC, PL031_SIZE)],
        numa: config.numa.nodes.clone(),
    }
}

/// Only the processors the guest starts with: a device tree knows none that come later.
pub(super) fn device_tree(config: &LoadConfig<'_>) -> DeviceTree {
    let plan = config.plan;
    let window = |range: &std::ops::Range<u64>| (range.start, range.end.saturating_sub(range.start));
    // Root buses beside the first are for NUMA nodes, which only ACPI tells of.
    let (mmio32, mmio64) = match config.windows {
        [first, ..] => (window(&first.mmio32), window(&first.mmio64)),
        [] => ((0, 0), (0, 0)),
    };
    DeviceTree {
        ram: ram(config.memory).collect(),
        cpus: (0..plan.boot_vcpus()).map(|index| plan.hardware_id(index)).collect(),
        gic: Gic {
            distributor: (layout::GIC_DISTRIBUTOR, layout::GIC_DISTRIBUTOR_SIZE),
            redistributors: (layout::GIC_REDISTRIBUTORS, redistributors_size(config)),
            its: (layout::GIC_ITS, layout::GIC_ITS_SIZE),
        },
        timer: Timer {
            secure: interrupt::TIMER_SECURE,
            physical: interrupt::TIMER_PHYSICAL,
            virt: interrupt::TIMER_VIRTUAL,
            hypervisor: interrupt::TIMER_HYPERVISOR,
        },
        pmu: plan.pmu_interrupt(),
        uart: config
            .board
            .serial()
            .map(|_| (layout::UART, PL011_SIZE, interrupt::UART)),
        rtc: (layout::RTC, PL031_SIZE),
        keys: (layout::KEYS, PL061_SIZE, interrupt::KEYS, POWER_KEY.into()),
        pci: Pci {
            ecam: (layout::ECAM, layout::PCI_BUSES * layout::ECAM_BUS_SIZE),
            last_bus: u32::from(LAST_BUS),
            mmio32,
            mmio64,
            wires: layout::PCI_WIRES,
            iommu: config.iommu.clone().map(|iommu| (iommu.requester, iommu.behind)),
        },
    }
}
