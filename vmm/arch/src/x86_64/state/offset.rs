//! How much more a vCPU's time stamp counter counts than the host's (KVM_VCPU_TSC_OFFSET, since Linux 5.16).

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use triarch_hypervisor::Vcpu;

/// KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR, which its crate does not have for vCPUs.
const SET_DEVICE_ATTR: libc::Ioctl = 0x4018_aee1_u32 as libc::Ioctl;
const GET_DEVICE_ATTR: libc::Ioctl = 0x4018_aee2_u32 as libc::Ioctl;

fn attribute(address: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address as u64,
    }
}

/// `None` where KVM does not tell.
pub(super) fn get(vcpu: &Vcpu) -> Option<u64> {
    let mut offset = 0_u64;
    let attribute = attribute(&raw mut offset);
    // SAFETY: for this attribute the kernel writes eight bytes to the address, where a u64 is, and keeps no pointer.
    let result = unsafe { libc::ioctl(vcpu.fd().as_raw_fd(), GET_DEVICE_ATTR, &raw const attribute) };
    (result == 0).then_some(offset)
}

pub(super) fn set(vcpu: &Vcpu, mut offset: u64) -> io::Result<()> {
    let attribute = attribute(&raw mut offset);
    // SAFETY: for this attribute the kernel reads eight bytes at the address, where a u64 is, and keeps no pointer.
    let result = unsafe { libc::ioctl(vcpu.fd().as_raw_fd(), SET_DEVICE_ATTR, &raw const attribute) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
