//! Devices whose work another process does: the front end of the vhost-user protocol.
//!
//! A daemon may die and come back at any time, and it may say or do anything: only its own device suffers. Each device has a thread of
//! its own that talks to the daemon; neither a vCPU nor the controller ever waits for one longer than it takes to finish what is in
//! flight, and not for one that is silent.
//!
//! Requests go one of two ways. A daemon that keeps a record of what it has works on the guest's rings (`direct.rs`):
//!
//! ```text
//!  guest's queue ◄──► daemon ──► guest's interrupt
//!                       │ requests it has
//!                       └────────► record (`inflight.rs`) ──► the next daemon
//! ```
//!
//! For one that does not, the device's thread keeps it (`relay.rs`):
//!
//! ```text
//!  guest's queue ──► Relay ──► shadow ring ──► daemon ──► shadow ring ──► Relay ──► guest's queue
//!                      │ requests without an answer, in order
//!                      └──────────────────► the next daemon
//! ```
//!
//! A queue can go from one way to the other with every daemon.

mod connection;
mod device;
mod direct;
mod endpoint;
mod engine;
mod error;
mod inflight;
mod kind;
mod pages;
mod peer;
#[allow(unsafe_code)] // descriptors of others' events
mod raw;
mod relay;
mod room;
mod session;
mod shadow;
mod state;
mod status;
#[cfg(test)]
mod tests;

pub use device::{VhostUser, VhostUserHandle};
pub use endpoint::{Door, Endpoint};
pub use engine::Remap;
pub use error::LinkError;
pub use kind::{DaemonBlock, DaemonFs, DaemonGeneric, DaemonNet, Done, Kind, NetOptions, Offer, Own, Setting};
pub use pages::{LOG_PAGE, PageLog};
pub use peer::{Peer, PeerError, PeerOptions};
pub use state::{StateError, StateLimits};
pub use status::{DataPath, LinkState, LinkStatus, OnDisconnect};
