//! `triarch-netd`: a learning switch between guests over vhost-user, taps and network cards of the host.
//!
//! [`switch`] decides where frames go, without any I/O. [`plane`] moves them, on one thread. [`offload`] does what a sender left undone
//! where a receiver cannot. [`Registry`] has the ports, [`control`] is how others reach it.

mod card;
pub mod control;
mod device;
pub mod features;
mod host;
mod metrics;
pub mod offload;
mod options;
pub mod plane;
mod registry;
mod server;
pub mod switch;

pub use card::CardError;
pub use device::{DeviceOptions, PortDevice};
pub use options::{MAX_QUEUES, Mode, OptionsError, PortOptions, Settings};
pub use registry::{Described, Opened, Registry, RegistryError};
pub use server::{Door, PortServer, ServerCounters};
