//! What a back end needs of a device beside what every transport does.

use triarch_virtio::{Block, VirtioDevice};

use super::message::protocol;

/// A device that is served over vhost-user.
pub trait Served: VirtioDevice {
    /// The protocol features it offers, [`protocol::COMMON`] among them.
    fn protocol(&self) -> u64 {
        protocol::COMMON
    }

    /// The answer to GET_QUEUE_NUM: how many queues there are at most, in the unit that front ends of such devices count in.
    fn queue_number(&self) -> u64 {
        self.queue_sizes().len() as u64
    }

    /// The guest with this hardware address is here now; the network should learn of it ([`protocol::RARP`]).
    fn announce(&mut self, _mac: [u8; 6]) {}
}

impl Served for Block {}
