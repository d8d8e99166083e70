//! Where a guest's packets go: tap interfaces of the host. Knows nothing of virtio but the header format the kernel shares with it
//! (`struct virtio_net_hdr_v1`, 12 bytes before each frame).
//!
//! [`Tap`] opens, configures and, when dropped, puts back an interface. [`PacketBackend`] is what a network device needs of it.

mod announce;
mod backend;
mod error;
mod queue;
#[allow(unsafe_code)] // network ioctls
mod sys;
mod tap;
#[cfg(test)]
mod tests;

pub use announce::rarp;
pub use backend::{Offloads, PacketBackend};
pub use error::TapError;
pub use queue::PacketQueue;
pub use tap::Tap;

/// Bytes of header before each frame (`struct virtio_net_hdr_v1`; virtio 1.2, 5.1.6).
pub const HEADER_LEN: usize = 12;
/// The longest header and frame: a segment of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_PACKET: usize = HEADER_LEN + 18 + 65535;
