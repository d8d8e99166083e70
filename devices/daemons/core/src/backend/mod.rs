//! The back end of vhost-user, as a transport of virtio devices: what the PCI transport is to the VMM, this is to the daemon. The
//! device behind it is the same.

mod call;
mod channel;
mod dirty;
mod fd;
mod guard;
mod inflight;
mod memory;
mod message;
mod ring;
mod served;
mod session;

pub use channel::ChannelError;
pub use fd::borrow;
pub use message::protocol;
pub use served::Served;
pub use session::{Session, SessionError, SessionStats};
