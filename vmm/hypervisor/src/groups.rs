//! IOMMU groups that a VM has devices of (Documentation/virt/kvm/devices/vfio.rst of the Linux kernel).

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD, KVM_DEV_VFIO_GROUP_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use crate::HypervisorError;

/// What KVM knows of them.
pub struct VfioGroups {
    vm: Arc<VmFd>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Made when there is a group for the first time.
    device: Option<DeviceFd>,
    /// How many devices the VM has of each.
    devices: BTreeMap<RawFd, usize>,
}

impl VfioGroups {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            known: Mutex::default(),
        }
    }

    /// The VM has one more device of `group`.
    ///
    /// # Errors
    /// KVM's.
    pub fn add(&self, group: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = group.as_raw_fd();
        if known.devices.get(&fd).copied().unwrap_or(0) == 0 {
            let device = match known.device.take() {
                Some(device) => device,
                None => self.make()?,
            };
            let done = set(&device, KVM_DEV_VFIO_GROUP_ADD, fd);
            known.device = Some(device);
            done?;
        }
        *known.devices.entry(fd).or_default() += 1;
        Ok(())
    }

    /// It has one less.
    ///
    /// # Errors
    /// KVM's.
    pub fn remove(&self, group: BorrowedFd<'_>) -> Result<(), HypervisorError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = group.as_raw_fd();
        match known.devices.get_mut(&fd) {
            Some(count) if *count > 1 => {
                *count -= 1;
                return Ok(());
            }
            None => return Ok(()),
            Some(_) => {}
        }
        known.devices.remove(&fd);
        let device = known.device.as_ref();
        device.map_or(Ok(()), |device| set(device, KVM_DEV_VFIO_GROUP_DEL, fd))
    }

    fn make(&self) -> Result<DeviceFd, HypervisorError> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            fd: 0,
            flags: 0,
        };
        let made = self.vm.create_device(&mut device);
        made.map_err(HypervisorError::kvm("pass devices of the host through"))
    }
}

fn set(device: &DeviceFd, what: u32, group: RawFd) -> Result<(), HypervisorError> {
    let attribute = kvm_device_attr {
        group: KVM_DEV_VFIO_GROUP,
        attr: what.into(),
        addr: std::ptr::from_ref(&group) as u64,
        flags: 0,
    };
    let done = device.set_device_attr(&attribute);
    done.map_err(HypervisorError::kvm("take note of an IOMMU group"))
}
