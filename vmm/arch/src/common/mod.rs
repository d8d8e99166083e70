//! What every architecture uses.

pub(crate) mod load;
pub(crate) mod state;

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use triarch_cpu_model::GuestProcessor;
use triarch_device_core::{Bus, BusError, InterruptLine};
use triarch_hypervisor::{Firmware, Interrupts, Vcpu};
use triarch_legacy::console::Console;
use triarch_legacy::{CpuHotplug, CpuHotplugConfig, Ged, MemoryHotplug, MemoryPlace, PciHotplug, PowerSink};
use triarch_memory::GuestMemory;
use triarch_pci::{BarAllocator, PciRoot};
use triarch_tables::acpi::{NumaNode, PciIommu};

use crate::{Board, BoardStateV1, CpuError, CpuPlan, layout};

/// How many processors a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuCount {
    /// As configured; a guest that was reset may have another number by then.
    pub boot: u32,
    /// At this start.
    pub now: u32,
    /// At most, ever.
    pub max: u32,
}

impl CpuCount {
    /// One, and never more.
    pub(crate) const ONE: Self = Self {
        boot: 1,
        now: 1,
        max: 1,
    };
}

/// Release of the host's kernel.
pub(crate) fn kernel_release() -> String {
    let told = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match told.trim() {
        "" => "an unknown release".to_owned(),
        release => release.to_owned(),
    }
}

/// The vCPUs of a guest.
pub struct Vcpus {
    /// The CPU that they are, as it was given to the guest. A guest runs also where KVM does not tell.
    pub processor: Result<GuestProcessor, CpuError>,
    /// Those it starts with.
    pub running: Vec<Vcpu>,
    /// Those it may get later and that the architecture has to make now. They have to live as long as the VM.
    pub parked: Vec<Vcpu>,
    /// Tells which of them run.
    pub firmware: Arc<dyn Firmware>,
}

/// Why the guest's processors could not be interrupted.
#[derive(Debug, Error)]
pub enum NmiError {
    /// This architecture has no such interrupt that its kernels listen to.
    #[error("guests of this processor architecture have no NMI")]
    Unsupported,
    /// KVM did not deliver it.
    #[error("KVM does not deliver an NMI")]
    Kvm(#[source] io::Error),
}

/// Where memory starts that comes while the guest runs: the largest block by which Linux takes memory, on x86 with 64 GiB or more.
/// What lies across blocks it refuses.
const HOTPLUG_ALIGN: u64 = 2 << 30;

/// The room for memory that comes while the guest runs: `size` bytes behind RAM that ends at `ram_end`. It is empty when there is
/// nothing to come, and `None` when it would end beyond 64 bits.
///
/// By ACPI the room fills from its start, one memory device behind the other. For virtio-mem it is one region, or, with zones, one
/// for each zone that has a `hotplug_size`, in their order.
pub(crate) fn hotplug_room(ram_end: Option<u64>, size: u64) -> Option<Range<u64>> {
    let ram_end = ram_end?;
    if size == 0 {
        return Some(ram_end..ram_end);
    }
    let start = ram_end.checked_next_multiple_of(HOTPLUG_ALIGN)?;
    Some(start..start.checked_add(size)?)
}

/// RAM, or room for more of it, that ends beyond what guests can address on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "{mib} MiB of memory{} do not fit into the addresses of {bits} bits that this host gives guests; lower --memory size{}",
    match .room { 0 => String::new(), room => format!(" and room for {} MiB more", room >> 20) },
    if *.room == 0 { "" } else { " or hotplug_size" }
)]
pub struct AddressLimit {
    mib: u64,
    room: u64,
    bits: u8,
}

impl AddressLimit {
    /// Checks that `size` bytes of RAM and `room` for more that end at `end` (`None`: beyond 64 bits) can be addressed.
    pub(crate) fn check(size: u64, room: u64, end: Option<u64>, bits: u8) -> Result<(), Self> {
        let limit = 1u64.checked_shl(u32::from(bits)).unwrap_or(u64::MAX);
        match end {
            Some(end) if end <= limit => Ok(()),
            _ => Err(Self {
                mib: size >> 20,
                room,
                bits,
            }),
        }
    }
}

/// Why the devices at fixed places could not be made.
#[derive(Debug, Error)]
pub enum BoardError {
    /// Two devices want one place.
    #[error("two devices want the same addresses")]
    Bus(#[from] BusError),
    /// No interrupt.
    #[error("cannot connect an interrupt")]
    Interrupt(#[from] io::Error),
    /// Only a PC has one.
    #[error("an ARM guest has no debug port; leave --debug-console out")]
    NoDebugPort,
    /// Only ARM guests can have one.
    #[error("--platform dtb=on is for ARM guests, this host's are described by ACPI; leave it out")]
    DeviceTree,
    /// The state of a device was saved on another machine, or changed.
    #[error("the saved state of the {device} does not fit")]
    Saved {
        /// The device.
        device: &'static str,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BoardError {
    /// For use with `map_err`.
    pub(crate) fn saved<E: std::error::Error + Send + Sync + 'static>(device: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Saved {
            device,
            source: Box::new(source),
        }
    }

    /// Has `device`, `here`, continue from what was saved of it; either both are there or neither is.
    pub(crate) fn restored<D, S, E: std::error::Error + Send + Sync + 'static>(
        device: &'static str,
        here: Option<&D>,
        saved: Option<&S>,
        restore: impl Fn(&D, &S) -> Result<(), E>,
    ) -> Result<(), Self> {
        match (here, saved) {
            (Some(here), Some(saved)) => restore(here, saved).map_err(Self::saved(device)),
            (None, None) => Ok(()),
            _ => Err(Self::differs(device)),
        }
    }

    /// What is there is not what was saved.
    pub(crate) fn differs(device: &'static str) -> Self {
        let source = "it is there only in the state, or only in this machine".into();
        Self::Saved { device, source }
    }
}

/// What comes and goes, for errors.
pub(crate) const CPUS: &str = "processors that come and go";
pub(crate) const MEMORY: &str = "memory that comes and goes";
pub(crate) const SLOTS: &str = "PCI devices that come and go";

impl BoardStateV1 {
    /// Where the guest had memory devices.
    pub fn memory_places(&self) -> Vec<MemoryPlace> {
        let slots = self.memory.iter().flat_map(|memory| &memory.slots);
        slots.filter_map(|slot| slot.place).collect()
    }
}

/// What the board is made of.
pub struct BoardConfig<'a> {
    /// Where memory-mapped devices are claimed.
    pub mmio: &'a Arc<Bus>,
    /// Where ports are claimed, if the architecture has any.
    pub pio: &'a Arc<Bus>,
    /// Interrupts of the VM.
    pub interrupts: &'a Arc<Interrupts>,
    /// The PCI root whose configuration space the board shows.
    pub root: &'a Arc<PciRoot>,
    /// Bytes of RAM.
    pub memory_size: u64,
    /// The guest's processors.
    pub plan: &'a CpuPlan,
    /// Told when the guest did something about processors that come or go.
    pub cpus_changed: Arc<dyn Fn() + Send + Sync>,
    /// Slots for memory that comes while the guest runs; 0 if none ever does, or by other means.
    pub memory_slots: u32,
    /// Told when the guest did something about it.
    pub memory_changed: Arc<dyn Fn() + Send + Sync>,
    /// Told when the guest did something about PCI devices that come or go.
    pub slots_changed: Arc<dyn Fn() + Send + Sync>,
    /// What the serial port is connected to; no port without.
    pub serial: Option<&'a Arc<Console>>,
    /// What the debug port is connected to; no port without. Only a PC has one.
    pub debug: Option<&'a Arc<Console>>,
    /// Whether the guest boots by a device tree instead of ACPI: not on a PC.
    pub device_tree: bool,
    /// Told when the guest ends or resets itself through a device. On ARM its vCPUs tell (PSCI).
    pub power: Arc<dyn PowerSink>,
    /// What the devices continue from, if the guest was saved.
    pub saved: Option<&'a BoardStateV1>,
}

type SharedLine = Arc<dyn InterruptLine>;

impl BoardConfig<'_> {
    /// Makes the serial port, if there is one: a `new` one, or where the guest was saved one that goes on from what was `saved` of it; either
    /// both are there or neither is.
    pub(crate) fn serial_port<D, S, E: std::error::Error + Send + Sync + 'static>(
        &self,
        line: impl FnOnce() -> io::Result<SharedLine>,
        saved: fn(&BoardStateV1) -> Option<&S>,
        new: fn(Arc<Console>, SharedLine) -> D,
        restore: fn(&S, Arc<Console>, SharedLine) -> Result<D, E>,
    ) -> Result<Option<Arc<D>>, BoardError> {
        const PORT: &str = "serial port";
        let state = self.saved.and_then(saved);
        let Some(console) = self.serial else {
            return match state {
                Some(_) => Err(BoardError::differs(PORT)),
                None => Ok(None),
            };
        };
        let port = match (self.saved, state) {
            (None, _) => new(console.clone(), line()?),
            (Some(_), Some(state)) => restore(state, console.clone(), line()?).map_err(BoardError::saved(PORT))?,
            (Some(_), None) => return Err(BoardError::differs(PORT)),
        };
        Ok(Some(Arc::new(port)))
    }

    /// Makes the registers at `at` of processors that come and go by notices through `events`. One that the guest does not have has the
    /// status `absent`.
    pub(crate) fn claim_processors(&self, events: &Arc<Ged>, at: u64, absent: u8) -> Result<Arc<CpuHotplug>, BusError> {
        let (plan, changed) = (self.plan, self.cpus_changed.clone());
        let config = CpuHotplugConfig {
            max: plan.max_vcpus(),
            present: plan.boot_vcpus(),
            fixed: plan.fixed_vcpus(),
            absent,
        };
        let cpus = Arc::new(CpuHotplug::new(config, Some(events.clone()), move || changed()));
        self.mmio.claim(at, CpuHotplug::size(config.max), cpus.clone())?;
        Ok(cpus)
    }

    /// Makes the registers at `at` of memory that comes and goes by notices through `events`, if any does.
    pub(crate) fn claim_memory(&self, events: &Arc<Ged>, at: u64) -> Result<Option<Arc<MemoryHotplug>>, BusError> {
        let (slots, changed) = (self.memory_slots, self.memory_changed.clone());
        if slots == 0 {
            return Ok(None);
        }
        let memory = Arc::new(MemoryHotplug::new(slots, events.clone(), move || changed()));
        self.mmio.claim(at, MemoryHotplug::size(slots), memory.clone())?;
        Ok(Some(memory))
    }

    /// Makes the registers at `at` of PCI devices that come and go by notices through `events`.
    pub(crate) fn claim_slots(&self, events: &Arc<Ged>, at: u64) -> Result<Arc<PciHotplug>, BusError> {
        let changed = self.slots_changed.clone();
        let roots = self.root.windows().len();
        let slots = Arc::new(PciHotplug::new(roots, events.clone(), move || changed()));
        self.mmio.claim(at, PciHotplug::size(roots), slots.clone())?;
        Ok(slots)
    }
}

/// The pin of the wired interrupt controller that pin `pin` (1: INTA) of PCI device `device` is wired to: as `_PRT` and the device tree tell
/// the guest, with the usual rotation.
pub fn pci_wire(device: u8, pin: u8) -> u32 {
    let at = usize::from(device) + usize::from(pin.saturating_sub(1));
    let wires = layout::PCI_WIRES;
    wires[at % wires.len()] - layout::FIRST_WIRE
}

/// NUMA nodes of a guest, which ACPI tells of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numa {
    /// The nodes, by their numbers; none: no NUMA.
    pub nodes: Vec<NumaNode>,
    /// The node of each vCPU there may ever be.
    pub cpus: Vec<u32>,
}

impl Numa {
    /// The node of vCPU `index`.
    pub(crate) fn of_cpu(&self, index: u32) -> u32 {
        self.cpus.get(index as usize).copied().unwrap_or(0)
    }
}

/// What to load for whom.
pub struct LoadConfig<'a> {
    /// Fresh guest memory.
    pub memory: &'a GuestMemory,
    /// The guest's processors.
    pub plan: &'a CpuPlan,
    /// Its devices at fixed places.
    pub board: &'a Board,
    /// Where the PCI devices of each root bus are.
    pub windows: &'a [BarAllocator],
    /// Kernel file.
    pub kernel: PathBuf,
    /// initramfs file.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Whether to describe the machine by a device tree, which a [`Board`] of a PC refuses.
    pub device_tree: bool,
    /// Its NUMA nodes.
    pub numa: Numa,
    /// Its IOMMU, if it has one.
    pub iommu: Option<PciIommu>,
    /// Serial number for SMBIOS.
    pub serial_number: Option<String>,
    /// UUID for SMBIOS.
    pub uuid: Option<String>,
    /// OEM strings for SMBIOS.
    pub oem_strings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use triarch_tables::acpi::rotating_prt;

    use super::*;

    #[test]
    fn pins_are_wired_as_guests_are_told() {
        for route in rotating_prt(&layout::PCI_WIRES) {
            assert_eq!(pci_wire(route.device, route.pin + 1) + layout::FIRST_WIRE, route.gsi);
        }
        assert_ne!(pci_wire(1, 1), pci_wire(2, 1));
    }
}
