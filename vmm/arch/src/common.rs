//! What every architecture uses.

use thiserror::Error;
use triarch_hypervisor::Vcpu;

/// The vCPUs of a guest.
pub struct Vcpus {
    /// Those it starts with.
    pub running: Vec<Vcpu>,
    /// Those it may get later and that the architecture has to make now. They have to live as long as the VM.
    pub parked: Vec<Vcpu>,
}

/// RAM that ends beyond what guests can address on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "{mib} MiB of memory do not fit into the addresses of {bits} bits that this host gives guests; lower --memory size"
)]
pub struct AddressLimit {
    mib: u64,
    bits: u8,
}

impl AddressLimit {
    /// Checks that `size` bytes of RAM that end at `end` (`None`: beyond 64 bits) can be addressed.
    pub(crate) fn check(size: u64, end: Option<u64>, bits: u8) -> Result<(), Self> {
        let limit = 1u64.checked_shl(u32::from(bits)).unwrap_or(u64::MAX);
        match end {
            Some(end) if end <= limit => Ok(()),
            _ => Err(Self { mib: size >> 20, bits }),
        }
    }
}
