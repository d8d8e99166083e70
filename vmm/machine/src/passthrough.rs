//! Devices of the host in a guest: what they need of its VM.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use triarch_arch::pci_wire;
use triarch_device_core::RateLimit;
use triarch_hypervisor::{HypervisorError, Interrupts, MemorySlots, VfioGroups, Vm};
use triarch_memory::GuestRegion;
use triarch_vfio::{DmaError, DmaMap, HostDevice, Mapping, Translated};
use triarch_virtio::iommu::{LAST_ADDRESS, Shadow};
use vm_memory::{Address, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// The memory that devices of the host reach: nothing any more when this goes.
#[derive(Default)]
pub(crate) struct Reach(DmaMap);

impl Reach {
    /// The same, for those that change it.
    pub(crate) fn map(&self) -> &DmaMap {
        &self.0
    }

    /// All of `region`, too, which stays until it is removed.
    pub(crate) fn insert(&self, region: &GuestRegion) -> Result<(), DmaError> {
        let start = region.start_addr().raw_value();
        self.0.insert(start, region.len(), region.as_ptr() as u64)
    }

    /// Nothing any more.
    pub(crate) fn clear(&self) {
        self.0.clear();
    }
}

impl Drop for Reach {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The host's IOMMU, which does for a device of the host what the guest's says.
pub(crate) struct Follower {
    name: String,
    reach: Arc<Translated>,
    log: RateLimit,
}

impl Follower {
    /// For `device`, which has a container of its own.
    pub(crate) fn of(device: &HostDevice, map: &DmaMap) -> Arc<dyn Shadow> {
        Arc::new(Self {
            name: device.name().to_owned(),
            reach: map.behind(device.container()),
            log: RateLimit::default(),
        })
    }

    fn told(&self, done: Result<(), DmaError>) -> io::Result<()> {
        let Err(error) = done else { return Ok(()) };
        let text = triarch_api::chain(&error);
        if let Some(held_back) = self.log.admit() {
            let name = &self.name;
            tracing::warn!(
                held_back,
                "{name} does not reach memory that the guest's IOMMU lets it reach: {text}"
            );
        }
        let full = match &error {
            DmaError::Limit { .. } => true,
            DmaError::Map { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC | libc::EDQUOT))
            }
            DmaError::Unreachable { .. } => false,
        };
        let kind = if full {
            io::ErrorKind::OutOfMemory
        } else {
            io::ErrorKind::Other
        };
        Err(io::Error::new(kind, text))
    }
}

impl Shadow for Follower {
    fn reach_all(&self) -> io::Result<()> {
        self.told(self.reach.reach_all())
    }

    fn reach_nothing(&self) {
        self.reach.reach_nothing();
    }

    fn map(&self, iovas: RangeInclusive<u64>, phys: u64, writable: bool) -> io::Result<()> {
        let len = iovas.end() - iovas.start() + 1;
        self.told(self.reach.map(*iovas.start(), len, phys, writable))
    }

    fn unmap(&self, iovas: RangeInclusive<u64>) {
        self.reach.unmap(iovas);
    }

    fn gaps(&self) -> Vec<RangeInclusive<u64>> {
        self.reach.gaps(LAST_ADDRESS).unwrap_or_else(|error| {
            tracing::warn!("the host's IOMMU does not tell what {} can use: {error}", self.name);
            Vec::new()
        })
    }
}

/// A VM as devices of the host see it.
pub(crate) struct Host {
    slots: MemorySlots,
    groups: VfioGroups,
    interrupts: Arc<Interrupts>,
}

impl Host {
    pub(crate) fn of(vm: &Vm, interrupts: &Arc<Interrupts>) -> Arc<dyn triarch_vfio::Vm> {
        Arc::new(Self {
            slots: vm.memory_slots().clone(),
            groups: vm.vfio_groups(),
            interrupts: interrupts.clone(),
        })
    }
}

fn failed(error: HypervisorError) -> io::Error {
    io::Error::other(triarch_api::chain(&error))
}

impl triarch_vfio::Vm for Host {
    fn map(&self, gpa: u64, registers: &Mapping) -> io::Result<()> {
        let mapped = self.slots.map_registers(gpa, registers.size(), registers.address());
        mapped.map_err(failed)
    }

    fn unmap(&self, gpa: u64) -> io::Result<()> {
        self.slots.unmap_region(gpa).map_err(failed)
    }

    fn admit(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        self.groups.add(group).map_err(failed)
    }

    fn dismiss(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        self.groups.remove(group).map_err(failed)
    }

    fn wire(&self, slot: u8, pin: u8, raised: &EventFd, lowered: &EventFd) -> io::Result<()> {
        self.interrupts.wire(pci_wire(slot, pin), raised, lowered)
    }

    fn unwire(&self, slot: u8, pin: u8, raised: &EventFd) -> io::Result<()> {
        self.interrupts.unwire(pci_wire(slot, pin), raised)
    }
}
