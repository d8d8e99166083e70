//! One virtual machine in the kernel.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use triarch_device_core::{IoAddress, IoEvents};
use triarch_memory::{GuestMemory, GuestRegion};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{HypervisorError, Vcpu};

#[derive(Default)]
struct Slots {
    used: Vec<Slot>,
}

#[derive(Clone, Copy)]
struct Slot {
    number: u32,
    gpa: u64,
    len: u64,
}

/// A VM and its memory slots.
pub struct Vm {
    fd: Arc<VmFd>,
    slots: Mutex<Slots>,
    max_slots: u32,
    max_vcpus: usize,
}

impl Vm {
    /// Makes an empty VM.
    pub fn new(kvm: &Kvm) -> Result<Self, HypervisorError> {
        let fd = loop {
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other.map_err(HypervisorError::kvm("create a VM"))?,
            }
        };
        Ok(Self {
            fd: Arc::new(fd),
            slots: Mutex::default(),
            max_slots: kvm.get_nr_memslots() as u32,
            max_vcpus: kvm.get_max_vcpus(),
        })
    }

    /// The kernel's descriptor, for what is specific to an architecture.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// How many vCPUs the host's KVM allows.
    pub fn max_vcpus(&self) -> usize {
        self.max_vcpus
    }

    /// Whether the host's KVM has an extension.
    pub fn has(&self, capability: Cap) -> bool {
        self.fd.check_extension(capability)
    }

    /// Gives all regions of `memory` to the guest.
    pub fn map_memory(&self, memory: &GuestMemory) -> Result<(), HypervisorError> {
        memory.iter().try_for_each(|region| self.map_region(region))
    }

    /// Gives one region to the guest. The caller keeps its mapping alive for as long as this VM lives or until
    /// [`unmap_region`](Self::unmap_region).
    pub fn map_region(&self, region: &GuestRegion) -> Result<(), HypervisorError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..self.max_slots)
            .find(|n| slots.used.iter().all(|s| s.number != *n))
            .ok_or(HypervisorError::Capability("a free memory slot"))?;
        let slot = Slot {
            number,
            gpa: region.start_addr().raw_value(),
            len: region.len(),
        };
        self.set_slot(slot, region.as_ptr() as u64, false)?;
        slots.used.push(slot);
        Ok(())
    }

    /// Takes the region at `gpa` away from the guest.
    pub fn unmap_region(&self, gpa: u64) -> Result<(), HypervisorError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = slots.used.iter().position(|s| s.gpa == gpa) else {
            return Ok(());
        };
        self.set_slot(
            Slot {
                len: 0,
                ..slots.used[at]
            },
            0,
            false,
        )?;
        slots.used.swap_remove(at);
        Ok(())
    }

    /// Switches the dirty log of the region at `gpa` on or off.
    pub fn log_dirty_pages(&self, region: &GuestRegion, on: bool) -> Result<(), HypervisorError> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let gpa = region.start_addr().raw_value();
        match slots.used.iter().find(|s| s.gpa == gpa) {
            Some(slot) => self.set_slot(*slot, region.as_ptr() as u64, on),
            None => Ok(()),
        }
    }

    fn set_slot(&self, slot: Slot, host_address: u64, log: bool) -> Result<(), HypervisorError> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: host_address,
        };
        // SAFETY: either the slot is deleted (length 0), or the address is the start of a mapping of this length which the
        // caller keeps alive while the slot exists.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(HypervisorError::kvm("map guest memory"))
    }

    /// Makes the vCPU with APIC id or index `id`.
    pub fn create_vcpu(&self, id: u64) -> Result<Vcpu, HypervisorError> {
        let fd = self.fd.create_vcpu(id).map_err(HypervisorError::kvm("create a vCPU"))?;
        Ok(Vcpu::new(fd))
    }

    /// Attaches doorbells.
    pub fn io_events(&self) -> Arc<dyn IoEvents> {
        Arc::new(IoEventFds(self.fd.clone()))
    }
}

/// KVM's ioeventfds.
pub struct IoEventFds(Arc<VmFd>);

fn address(addr: IoAddress) -> IoEventAddress {
    match addr {
        IoAddress::Pio(port) => IoEventAddress::Pio(port),
        IoAddress::Mmio(gpa) => IoEventAddress::Mmio(gpa),
    }
}

impl IoEvents for IoEventFds {
    fn attach(&self, fd: &EventFd, addr: IoAddress) -> io::Result<()> {
        Ok(self.0.register_ioevent(fd, &address(addr), NoDatamatch)?)
    }
    fn detach(&self, fd: &EventFd, addr: IoAddress) -> io::Result<()> {
        Ok(self.0.unregister_ioevent(fd, &address(addr), NoDatamatch)?)
    }
}
