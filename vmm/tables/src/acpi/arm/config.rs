//! What the tables of an ARM machine say, as plain data.

use std::collections::HashSet;

use super::super::AcpiError;
use super::super::config::{AcpiPlacement, EventDevice, MAX_CPUS, MAX_SEGMENTS, NumaNode, PciSegment};
use super::super::memory::MemorySlots;
use super::super::numa;

/// Everything the tables say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArmAcpiConfig {
    /// Where the tables go.
    pub placement: AcpiPlacement,
    /// Processors that there are or may be later; the index is the ACPI processor UID.
    pub cpus: Vec<ArmCpu>,
    /// Address of the registers by which they come and go; without, those that are enabled are all there will ever be.
    pub cpu_hotplug: Option<u64>,
    /// Slots for memory that comes while the guest runs, if any does.
    pub memory_hotplug: Option<MemorySlots>,
    /// Their shape; the product of its levels is the number of [`Self::cpus`].
    pub topology: Topology,
    /// The interrupt controller.
    pub gic: Gic,
    /// Interrupts of the generic timer.
    pub timer: Timer,
    /// PCI segments.
    pub pci: Vec<PciSegment>,
    /// The device that signals the power button and hot-plug; its register is in memory.
    pub events: Option<EventDevice>,
    /// The PL011.
    pub uart: Option<Uart>,
    /// Other registers that belong to the machine: first address and length in bytes.
    pub claimed: Vec<(u64, u64)>,
    /// NUMA nodes; the index is the proximity domain. Empty: no NUMA.
    pub numa: Vec<NumaNode>,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmCpu {
    /// Its affinity fields, as MPIDR_EL1 has them.
    pub mpidr: u64,
    /// There from the start, or to be added later.
    pub enabled: bool,
    /// Its NUMA node; not read without NUMA.
    pub node: u32,
}

/// The shape of the processors, in units per next larger unit; none is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Threads of a core.
    pub threads: u16,
    /// Cores of a die.
    pub cores: u16,
    /// Dies of a package.
    pub dies: u16,
    /// Packages.
    pub packages: u16,
}

/// A GICv3 with an ITS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gic {
    /// Address of the distributor.
    pub distributor: u64,
    /// Address of the first redistributor; the others follow.
    pub redistributors: u64,
    /// Bytes of all redistributors.
    pub redistributors_size: u32,
    /// Address of the ITS.
    pub its: u64,
    /// Interrupt number of the performance monitors, if there are any.
    pub pmu: Option<u32>,
}

/// Interrupt numbers of the generic timer, all level-triggered and active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer {
    /// Secure EL1.
    pub secure: u32,
    /// Non-secure EL1.
    pub physical: u32,
    /// Virtual.
    pub virt: u32,
    /// Non-secure EL2.
    pub hypervisor: u32,
}

/// A PL011.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uart {
    /// Address of its registers, below 4 GiB.
    pub base: u32,
    /// Bytes of them.
    pub size: u32,
    /// Interrupt number, edge, active high.
    pub gsi: u32,
}

impl ArmAcpiConfig {
    pub(super) fn check(&self) -> Result<(), AcpiError> {
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
        if let Some(cpu) = self.cpus.iter().find(|cpu| !ids.insert(cpu.mpidr)) {
            return Err(AcpiError::DuplicateMpidr(cpu.mpidr));
        }
        let Topology {
            threads,
            cores,
            dies,
            packages,
        } = self.topology;
        let places: u64 = [threads, cores, dies, packages].into_iter().map(u64::from).product();
        if places != self.cpus.len() as u64 {
            return Err(AcpiError::BadTopology {
                places,
                cpus: self.cpus.len(),
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
}
