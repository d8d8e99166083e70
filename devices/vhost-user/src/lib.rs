//! Devices whose work another process does: the front end of the vhost-user protocol.
//!
//! A daemon may die and come back at any time, and it may say or do anything: only its own device suffers. Each device has a thread of
//! its own that talks to the daemon; neither a vCPU nor the controller ever waits for one longer than it takes to finish what is in
//! flight, and not for one that is silent.
//!
//! ```text
//!  guest's queue ──► Relay ──► shadow ring ──► daemon ──► shadow ring ──► Relay ──► guest's queue
//!                      │ requests without an answer, in order
//!                      └──────────────────► the next daemon
//! ```

mod connection;
mod device;
mod engine;
mod error;
mod kind;
mod message;
mod peer;
mod relay;
mod session;
mod shadow;
mod status;
#[cfg(test)]
mod tests;

pub use device::{VhostUser, VhostUserHandle};
pub use error::LinkError;
pub use kind::{DaemonBlock, Kind, Offer};
pub use peer::{Peer, PeerError, PeerOptions};
pub use status::{LinkState, LinkStatus, OnDisconnect};
