//! What a back end needs of a device beside what every transport does.

use std::sync::Arc;

use triarch_vhost_protocol::protocol;
use triarch_virtio::{Block, VirtioDevice, VirtioInterrupt};

/// A device that is served over vhost-user.
pub trait Served: VirtioDevice {
    /// The protocol features it offers, [`protocol::COMMON`] among them.
    fn protocol(&self) -> u64 {
        protocol::COMMON
    }

    /// The guest with this hardware address is here now; the network should learn of it ([`protocol::RARP`]).
    fn announce(&mut self, _mac: [u8; 6]) {}

    /// Changes of the configuration space are told here from now on, also while no driver uses the device: the front end answers for the
    /// device then, from what it knows.
    fn tell_changes(&mut self, _listener: Option<Arc<dyn VirtioInterrupt>>) {}
}

impl Served for Block {
    fn tell_changes(&mut self, listener: Option<Arc<dyn VirtioInterrupt>>) {
        self.set_listener(listener);
    }
}
