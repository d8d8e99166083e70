//! PCI devices of the host that a guest drives by itself (VFIO; Documentation/driver-api/vfio.rst of the Linux kernel).
//!
//! [`Iommu`] opens devices and holds their container, the part of the host's IOMMU that is the guest's. [`DmaMap`] has that follow the
//! guest's memory; a device behind the guest's own IOMMU has a container of its own, which follows that ([`Translated`]). [`VfioPci`] is the function that the guest sees: its configuration space is made register by register of what is known
//! to be harmless, its BARs are mapped into the guest, its interrupts go from the device to the guest inside the kernel.
//!
//! Nothing here knows KVM: what is needed of the VM is the trait [`Vm`]. Everything the kernel does for VFIO is behind the traits of
//! [`kernel`], so that tests need neither a device nor an IOMMU.

mod alarms;
mod areas;
mod config;
mod dma;
mod error;
mod fleet;
mod function;
mod given;
mod handle;
mod host;
mod interrupts;
mod intx;
pub mod kernel;
mod limit;
mod meters;
mod mover;
mod rom;
#[allow(unsafe_code)] // ioctls, and mappings of devices' registers
mod sys;
mod sysfs;
#[cfg(test)]
mod tests;
mod translated;

pub use alarms::Alarm;
pub use config::CliqueError;
pub use dma::{DmaError, DmaMap};
pub use error::{DescriptorError, OpenError};
pub use fleet::Fleet;
pub use function::{FunctionError, Options, SavedFunction, VfioPci, Vm};
pub use given::Kind;
pub use host::{Container, HostDevice, Iommu};
pub use meters::{Counters, Reached};
pub use mover::{Immovable, MoveError, Mover, Piece};
pub use sys::{Linux, Mapping};
pub use translated::Translated;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks even after a panic elsewhere: the data behind these locks is consistent between any two statements.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
