//! One virtual machine in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use triarch_device_core::{IoAddress, IoEvents};
use triarch_memory::{GuestMemory, GuestRegion};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{HypervisorError, Vcpu, VfioGroups};

#[derive(Clone, Copy)]
struct Slot {
    number: u32,
    gpa: u64,
    len: u64,
    /// Where it is mapped in this process.
    host: u64,
    /// It is RAM, and not registers of a device.
    ram: bool,
    /// No other slot of this VM has or had the same.
    serial: u64,
}

/// The slots in use, by GPA.
#[derive(Default)]
struct Used {
    slots: BTreeMap<u64, Slot>,
    /// Writes are logged, also to slots that come.
    logged: bool,
    /// How many were ever made.
    made: u64,
}

/// The memory slots of a VM: what guest memory its vCPUs reach. Clones are of the same VM, and keep it.
#[derive(Clone)]
pub struct MemorySlots {
    fd: Arc<VmFd>,
    used: Arc<Mutex<Used>>,
    max: u32,
    /// How many those are, for whoever counts.
    count: Arc<AtomicU64>,
}

impl MemorySlots {
    /// Gives one region to the guest. The caller keeps its mapping alive for as long as the VM lives or until
    /// [`unmap_region`](Self::unmap_region).
    pub fn map_region(&self, region: &GuestRegion) -> Result<(), HypervisorError> {
        self.map(
            region.start_addr().raw_value(),
            region.len(),
            region.as_ptr() as u64,
            true,
        )
    }

    /// Gives `len` bytes of a device's registers, which are mapped at `host`, to the guest at `gpa`, all whole pages. What is written there is
    /// never logged. The caller keeps the mapping alive for as long as the VM lives or until [`unmap_region`](Self::unmap_region).
    pub fn map_registers(&self, gpa: u64, len: u64, host: u64) -> Result<(), HypervisorError> {
        self.map(gpa, len, host, false)
    }

    fn map(&self, gpa: u64, len: u64, host: u64, ram: bool) -> Result<(), HypervisorError> {
        let mut used = self.used();
        let taken: BTreeSet<u32> = used.slots.values().map(|slot| slot.number).collect();
        let free = (0u32..).zip(&taken).find(|(number, taken)| number != *taken);
        let number = free.map_or(taken.len() as u32, |(number, _)| number);
        if number >= self.max {
            return Err(HypervisorError::Capability("a free memory slot"));
        }
        let slot = Slot {
            number,
            gpa,
            len,
            host,
            ram,
            serial: used.made,
        };
        self.set(slot, used.logged && ram)?;
        used.made += 1;
        used.slots.insert(slot.gpa, slot);
        self.count.store(used.slots.len() as u64, Relaxed);
        Ok(())
    }

    /// Takes the region at `gpa` away from the guest.
    pub fn unmap_region(&self, gpa: u64) -> Result<(), HypervisorError> {
        let mut used = self.used();
        let Some(slot) = used.slots.get(&gpa) else {
            return Ok(());
        };
        self.set(
            Slot {
                len: 0,
                host: 0,
                ..*slot
            },
            false,
        )?;
        used.slots.remove(&gpa);
        self.count.store(used.slots.len() as u64, Relaxed);
        Ok(())
    }

    /// Has KVM log which pages vCPUs write, in all memory there is and that comes, or no longer.
    ///
    /// # Errors
    /// KVM's. Then nothing is logged, as far as KVM lets that be.
    pub fn log_writes(&self, on: bool) -> Result<(), HypervisorError> {
        let mut used = self.used();
        if !on && !used.logged {
            return Ok(());
        }
        let mut ram = used.slots.values().filter(|slot| slot.ram);
        let result = ram.try_for_each(|slot| self.set(*slot, on));
        used.logged = on && result.is_ok();
        if on && result.is_err() {
            for slot in used.slots.values().filter(|slot| slot.ram) {
                let _ = self.set(*slot, false);
            }
        }
        result
    }

    /// Pages of the region at `gpa` that vCPUs have written since the log began, or since this was asked the last time: a bit for each
    /// page of the host, the first in the lowest bit of the first word.
    ///
    /// # Errors
    /// There is no such region, or nothing is logged.
    pub fn written(&self, gpa: u64) -> Result<Vec<u64>, HypervisorError> {
        let used = self.used();
        let slot = used.slots.get(&gpa).filter(|slot| used.logged && slot.ram);
        let log = match slot {
            Some(slot) => self.fd.get_dirty_log(slot.number, slot.len as usize),
            None => Err(kvm_ioctls::Error::new(libc::ENOENT)),
        };
        log.map_err(HypervisorError::kvm("tell which pages the guest wrote"))
    }

    /// What tells the region at `gpa` from all others that were or will be there. `None`: there is none.
    pub fn serial(&self, gpa: u64) -> Option<u64> {
        self.used().slots.get(&gpa).map(|slot| slot.serial)
    }

    /// How many are in use. It does not keep the VM.
    pub fn count(&self) -> &Arc<AtomicU64> {
        &self.count
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, slot: Slot, log: bool) -> Result<(), HypervisorError> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        // SAFETY: either the slot is deleted (length 0), or the address is the start of a mapping of this length which the
        // caller keeps alive while the slot exists.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(HypervisorError::kvm("map guest memory"))
    }
}

/// A VM and its memory slots.
pub struct Vm {
    fd: Arc<VmFd>,
    slots: MemorySlots,
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
        let fd = Arc::new(fd);
        let slots = MemorySlots {
            fd: fd.clone(),
            used: Arc::default(),
            max: kvm.get_nr_memslots() as u32,
            count: Arc::default(),
        };
        Ok(Self {
            fd,
            slots,
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

    /// What of memory the guest reaches, for whoever changes that while it runs.
    pub fn memory_slots(&self) -> &MemorySlots {
        &self.slots
    }

    /// Gives all regions of `memory` to the guest.
    pub fn map_memory(&self, memory: &GuestMemory) -> Result<(), HypervisorError> {
        memory.iter().try_for_each(|region| self.map_region(region))
    }

    /// Gives one region to the guest. The caller keeps its mapping alive for as long as this VM lives or until
    /// [`unmap_region`](Self::unmap_region).
    pub fn map_region(&self, region: &GuestRegion) -> Result<(), HypervisorError> {
        self.slots.map_region(region)
    }

    /// Takes the region at `gpa` away from the guest.
    pub fn unmap_region(&self, gpa: u64) -> Result<(), HypervisorError> {
        self.slots.unmap_region(gpa)
    }

    /// Makes the vCPU with APIC id or index `id`.
    pub fn create_vcpu(&self, id: u64) -> Result<Vcpu, HypervisorError> {
        let fd = self.fd.create_vcpu(id).map_err(HypervisorError::kvm("create a vCPU"))?;
        Ok(Vcpu::new(fd))
    }

    /// The IOMMU groups it has devices of.
    pub fn vfio_groups(&self) -> VfioGroups {
        VfioGroups::new(self.fd.clone())
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
