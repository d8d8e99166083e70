//! `triarch-blkd`: disks over vhost-user, many in one process.
//!
//! An [`Export`] is a disk and a socket. A front end that connects gets a session, which is to the block device what the PCI transport is
//! in the VMM: requests are executed by the same code, one thread per queue.

mod daemon;
mod export;
mod options;

pub use daemon::Daemon;
pub use export::{Export, ExportCounters, ExportError};
pub use options::{ExportOptions, OptionsError};
