//! PCI: configuration space, BARs, MSI-X, the host bridge, root ports and the root that puts them on the guest's buses.
//!
//! A device implements [`PciFunction`], mostly out of a [`ConfigSpace`] and a [`MsiX`]; it knows neither where it sits nor how
//! the guest reaches it. [`PciRoot`] gives it a slot and BAR addresses, answers configuration accesses by both mechanisms (ports
//! 0xcf8/0xcfc and ECAM) and keeps the address spaces in step with what the guest writes to COMMAND and the BARs.
//!
//! Nothing here knows virtio or KVM.

mod access;
mod address;
mod bar;
mod bridge;
mod config;
mod function;
mod host_bridge;
mod msix;
mod root;

pub use access::{ConfigPorts, Ecam};
pub use address::{BUSES_OF_ROOT, ParseAddressError, PciAddress};
pub use bar::{Bar, BarAllocator, BarKind, Bars};
pub use bridge::{Bridge, RootPort};
pub use config::{ConfigSpace, ConfigStateError, ConfigStateV1, Identity, LayoutError, command};
pub use function::{PciFunction, ROM_BAR};
pub use host_bridge::HostBridge;
pub use msix::{MsiX, MsiXEntryV1, MsiXStateError, MsiXStateV1};
pub use root::{AddError, PciRoot, RemoveError};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks even after a panic elsewhere: the data behind these locks is consistent between any two statements.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
