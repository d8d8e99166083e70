//! `triarch-blkd`: disks over vhost-user, many in one process.
//!
//! An [`Export`] is a disk and a socket. A front end that connects gets a session, which is to the block device what the PCI transport is
//! in the VMM: requests are executed by the same code, one thread per queue.

mod control;
mod daemon;
mod export;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hand_over;
mod metrics;
mod options;

pub use control::{ControlService, End, Order, obey};
pub use daemon::Daemon;
pub use export::{Export, ExportCounters, ExportError};
pub use hand_over::{HandOverError, Taken};
pub use options::{ExportOptions, LimitOptions, LockTime, OptionsError};
