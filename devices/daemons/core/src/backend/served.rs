//! What a back end needs of a device beside what every transport does.

use std::io;
use std::sync::Arc;

use triarch_vhost_protocol::protocol;
use triarch_virtio::{ActivateError, Block, VirtioDevice, VirtioInterrupt};

/// A device that is served over vhost-user.
pub trait Served: VirtioDevice {
    /// The protocol features it offers, [`protocol::COMMON`] among them.
    fn protocol(&self) -> u64 {
        protocol::COMMON
    }

    /// The front end is about to use what only one may have, as the lock of an image; or it lets go of that while its driver stays, since
    /// another one is to take it. No queue runs.
    ///
    /// # Errors
    /// Somebody else has it, or it cannot be made durable; nothing has changed then.
    fn keep(&mut self, _on: bool) -> Result<(), ActivateError> {
        Ok(())
    }

    /// The guest with this hardware address is here now; the network should learn of it ([`protocol::RARP`]).
    fn announce(&mut self, _mac: [u8; 6]) {}

    /// Changes of the configuration space are told here from now on, also while no driver uses the device: the front end answers for the
    /// device then, from what it knows.
    fn tell_changes(&mut self, _listener: Option<Arc<dyn VirtioInterrupt>>) {}
}

impl Served for Block {
    fn keep(&mut self, on: bool) -> Result<(), ActivateError> {
        let (disk, what) = (self.handle(), "the lock of its disk");
        let failed = |source| ActivateError::Host { what, source };
        let disk = disk.disk();
        match on {
            true => disk.take_lock().map_err(|error| failed(io::Error::other(error))),
            false => disk.sync().and_then(|()| disk.release_lock()).map_err(failed),
        }
    }

    fn tell_changes(&mut self, listener: Option<Arc<dyn VirtioInterrupt>>) {
        self.set_listener(listener);
    }
}
