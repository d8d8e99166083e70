//! The back end of vhost-user, as a transport of virtio devices: what the PCI transport is to the VMM, this is to the daemon. The
//! device behind it is the same.

mod ask;
mod call;
mod channel;
mod dirty;
mod error;
mod fd;
mod guard;
mod inflight;
mod memory;
mod ring;
mod served;
mod session;
#[cfg(test)]
mod tests;

pub use channel::ChannelError;
pub use error::SessionError;
pub use fd::borrow;
pub use served::Served;
pub use session::{Session, SessionStats};
pub use triarch_vhost_protocol::protocol;
