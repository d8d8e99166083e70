//! Assembles a guest from its configuration and leads it through its phases.
//!
//! [`Controller`] owns the one guest of the process. It runs on the main thread: requests, events of the guest and signals all come to
//! it through its [`Inbox`], one after the other, so nothing here needs a lock of its own. [`Machine`] is one built guest; a reset
//! drops it and builds the next from the same configuration, on the consoles that stay open in between.

mod announce;
#[allow(unsafe_code)] // inherited descriptors
mod backends;
mod build;
mod changes;
mod configured;
mod consoles;
mod control;
mod cpu_features;
mod cpus;
mod daemons;
mod devices;
mod edit;
mod error;
mod handed;
mod identity;
mod inbox;
mod memory;
mod metrics;
mod migration;
mod passthrough;
mod plug;
mod progress;
mod resize;
#[allow(unsafe_code)] // signal masks
mod signals;
mod snapshot;
mod start;
mod supervisor;
mod vhost;

pub use build::Machine;
pub use control::{Controller, Outcome};
pub use daemons::{DaemonError, DaemonOrder, DaemonSockets, Daemons};
pub use error::MachineError;
pub use inbox::{GuestEvent, Inbox, Message};
pub use migration::Call;
pub use signals::{ENDED_AT_ONCE, HeldSignals, hold_signals, told_to_end};
pub use supervisor::{Supervisor, Unsupervised};

pub use triarch_arch::OLDER_SYSCALLS;
pub use triarch_legacy::console::restore_terminal;
