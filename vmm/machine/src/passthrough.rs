//! Devices of the host in a guest: what they need of its VM.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use triarch_arch::pci_wire;
use triarch_hypervisor::{HypervisorError, Interrupts, MemorySlots, VfioGroups, Vm};
use triarch_memory::GuestRegion;
use triarch_vfio::{DmaError, DmaMap, Mapping};
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
