//! Attributes of the interrupt controller: its registers, and what KVM does with them (Linux, Documentation/virt/kvm/devices).

use kvm_bindings::kvm_device_attr;
use kvm_ioctls::DeviceFd;
use triarch_hypervisor::HypervisorError;

/// A group of attributes of a device, whose values are `T`s.
pub(super) struct Group<'a> {
    pub(super) device: &'a DeviceFd,
    pub(super) number: u32,
    /// What is done with them, in words that follow "cannot".
    pub(super) what: &'static str,
}

/// A value the kernel reads and writes.
pub(super) trait Number: Copy + Default {}
impl Number for u32 {}
impl Number for u64 {}

fn attribute<T>(group: u32, attr: u64, value: *mut T) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: value as u64,
    }
}

impl Group<'_> {
    /// Reads an attribute. The caller knows that this group's values are `T`s.
    pub(super) fn get<T: Number>(&self, attr: u64) -> Result<T, HypervisorError> {
        let mut value = T::default();
        let mut attribute = attribute(self.number, attr, &raw mut value);
        // SAFETY: the kernel writes a number of 32 bits in the groups of distributor, redistributors and levels, of 64 in the others,
        // as `T` is; it keeps no pointer.
        let result = unsafe { self.device.get_device_attr(&mut attribute) };
        result.map_err(|error| self.failed(error))?;
        Ok(value)
    }

    /// Sets an attribute; the kernel reads the value while it is borrowed.
    pub(super) fn set<T: Number>(&self, attr: u64, mut value: T) -> Result<(), HypervisorError> {
        let attribute = attribute(self.number, attr, &raw mut value);
        let result = self.device.set_device_attr(&attribute);
        result.map_err(|error| self.failed(error))
    }

    /// Has the device do something.
    pub(super) fn command(&self, attr: u32) -> Result<(), HypervisorError> {
        let attribute = attribute::<u64>(self.number, attr.into(), std::ptr::null_mut());
        let result = self.device.set_device_attr(&attribute);
        result.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: kvm_ioctls::Error) -> HypervisorError {
        HypervisorError::kvm(self.what)(error)
    }
}
