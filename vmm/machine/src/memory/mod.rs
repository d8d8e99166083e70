//! The guest's memory: what it starts with, and what comes and goes while it runs.

mod dimms;
pub(crate) mod plan;
mod sizing;
#[cfg(test)]
mod tests;
pub(crate) mod virtio_mem;
mod zones;

pub(crate) use dimms::{Dimms, MemoryMeters};

use std::ops::Range;
use std::sync::Arc;

use triarch_hypervisor::Vm;
use triarch_legacy::MemoryPlace;
use triarch_memory::{GuestMemory, GuestMemoryHandle, RamOptions};
use triarch_state::SnapshotError;
use triarch_vhost_user::VhostUserHandle;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::MachineError;
use crate::passthrough::Reach;

/// Memory devices a guest may have at once.
pub(crate) const SLOTS: u32 = 32;

/// What the guest's memory consists of. It outlives the VM, which maps it.
pub(crate) struct Regions {
    handle: GuestMemoryHandle,
    options: RamOptions,
    /// What of it devices of the host reach. It goes before the memory does.
    reach: Reach,
}

impl Regions {
    /// `handle`'s memory, all of which was made with `options`.
    pub(crate) fn new(handle: GuestMemoryHandle, options: RamOptions) -> Self {
        let reach = Reach::default();
        Self { handle, options, reach }
    }

    /// Memory as it is now.
    pub(crate) fn memory(&self) -> impl std::ops::Deref<Target = GuestMemory> {
        self.handle.memory()
    }

    /// Lets devices of the host reach all of it, once there are some.
    pub(crate) fn expose(&self) -> Result<(), MachineError> {
        let memory = self.handle.memory();
        Ok(memory.iter().try_for_each(|region| self.reach.insert(region))?)
    }

    /// What of it devices of the host reach.
    pub(crate) fn reach(&self) -> &Reach {
        &self.reach
    }

    /// Has memory at `places`, which a guest had in its `room` when it was saved, before there is a VM.
    ///
    /// # Errors
    /// The host has not as much, or there is no such room.
    pub(crate) fn restore(&self, places: &[MemoryPlace], room: Option<Range<u64>>) -> Result<(), MachineError> {
        let room = room.unwrap_or_default();
        for &MemoryPlace { start, size } in places {
            let end = start.checked_add(size);
            if start < room.start || end.is_none_or(|end| end > room.end) {
                let text = format!(
                    "a memory device of {size:#x} bytes at {start:#x} is not in the guest's room for memory, {:#x} to {:#x}; config.json must \
                     have the memory the guest was saved with",
                    room.start, room.end
                );
                return Err(SnapshotError::Memory(text).into());
            }
            let at = GuestAddress(start);
            let there = self
                .handle
                .memory()
                .find_region(at)
                .map(|region| (region.start_addr(), region.len()));
            if there == Some((at, size)) {
                // It came before the guest did.
                continue;
            }
            let region = triarch_memory::allocate_region(&self.handle.memory(), at, size, &self.options)?;
            triarch_memory::insert(&self.handle, region)?;
        }
        Ok(())
    }

    /// Gives `vm` `size` bytes more at `base`. All devices and daemons have them when this returns: the guest can be told.
    ///
    /// # Errors
    /// The host has not as much, the addresses are taken, or a daemon cannot have them. Then everything is as before.
    pub(crate) fn add(
        &self,
        vm: &Vm,
        daemons: &[(String, VhostUserHandle)],
        base: u64,
        size: u64,
    ) -> Result<(), MachineError> {
        let at = GuestAddress(base);
        let region = triarch_memory::allocate_region(&self.handle.memory(), at, size, &self.options)?;
        vm.map_region(&region)?;
        if let Err(error) = triarch_memory::insert(&self.handle, Arc::clone(&region)) {
            vm.unmap_region(base)?;
            return Err(error.into());
        }
        let told = self.reach.insert(&region).map_err(MachineError::from);
        let told = told.and_then(|()| tell(daemons));
        if told.is_err() {
            self.remove(vm, daemons, base);
        }
        told
    }

    /// Takes the memory at `base` from `vm`, which does not use it any more, and from all devices and daemons.
    pub(crate) fn remove(&self, vm: &Vm, daemons: &[(String, VhostUserHandle)], base: u64) {
        if let Err(error) = vm.unmap_region(base) {
            // Then it has to stay where it is.
            return tracing::error!("cannot take memory from the guest: {}", triarch_api::chain(&error));
        }
        let region = triarch_memory::remove(&self.handle, GuestAddress(base));
        if let Some(region) = &region {
            self.reach.map().remove(base..base + region.len());
        }
        if let Err(error) = tell(daemons) {
            tracing::warn!("{}", error.chain());
        }
        drop(region);
    }
}

/// Has all daemons know which memory the guest has now. All are told at once, and then waited for.
fn tell(daemons: &[(String, VhostUserHandle)]) -> Result<(), MachineError> {
    let orders: Vec<_> = daemons.iter().map(|(id, daemon)| (id, daemon.remap())).collect();
    let mut done = Ok(());
    for (id, order) in orders {
        let told = order
            .wait()
            .map_err(|source| MachineError::Share { id: id.clone(), source });
        done = done.and(told);
    }
    done
}
