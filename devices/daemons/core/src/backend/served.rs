//! What a back end needs of a device beside what every transport does.

use triarch_vhost_protocol::protocol;
use triarch_virtio::{Block, VirtioDevice};

/// A device that is served over vhost-user.
pub trait Served: VirtioDevice {
    /// The protocol features it offers, [`protocol::COMMON`] among them.
    fn protocol(&self) -> u64 {
        protocol::COMMON
    }

    /// The guest with this hardware address is here now; the network should learn of it ([`protocol::RARP`]).
    fn announce(&mut self, _mac: [u8; 6]) {}
}

impl Served for Block {}
