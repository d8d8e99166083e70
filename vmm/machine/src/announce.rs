//! The network learns where a guest is now.

use std::sync::Arc;

use triarch_net::{HEADER_LEN, PacketBackend, Tap, rarp};
use triarch_virtio::net::NetHandle;

/// An interface that this process serves.
pub(crate) struct Port {
    pub(crate) id: String,
    pub(crate) device: NetHandle,
    pub(crate) tap: Arc<Tap>,
}

impl Port {
    /// Tells the host's end by a frame in the guest's name, for switches; and asks the guest to tell of all its addresses.
    pub(crate) fn announce(&self) {
        let mut packet = [0; HEADER_LEN + 60];
        packet[HEADER_LEN..].copy_from_slice(&rarp(&self.device.state().mac));
        let sent = self.tap.queues().first().map_or(Ok(()), |queue| queue.send(&packet));
        // Its packets tell later.
        if let Err(error) = sent {
            tracing::warn!(
                id = self.id,
                "cannot tell the network of the guest's new place: {error}"
            );
        }
        if let Err(error) = self.device.announce() {
            tracing::warn!(id = self.id, "cannot ask the guest to announce itself: {error}");
        }
    }
}
