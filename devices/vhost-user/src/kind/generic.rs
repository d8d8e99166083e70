//! Devices of any type, whose driver and daemon know more of it than the VMM.

use triarch_memory::GuestMemory;
use triarch_vhost_protocol::MAX_CONFIG;
use triarch_virtio::{Chain, DeviceId, feature};

use super::{Kind, Offer};

/// Feature bits of device types (virtio 1.2, 6): the others are about rings and the transport.
const TYPE_FEATURES: u64 = ((1 << 24) - 1) | (0x3fff << 50);

/// A device that a daemon serves, and of which nothing else is known.
#[derive(Debug, Clone)]
pub struct DaemonGeneric {
    id: u16,
    sizes: Vec<u16>,
}

impl DaemonGeneric {
    /// One of type `id`, with a queue of each of these sizes.
    pub fn new(id: u16, sizes: Vec<u16>) -> Self {
        Self { id, sizes }
    }
}

impl Kind for DaemonGeneric {
    fn id(&self) -> DeviceId {
        DeviceId::from_number(self.id)
    }

    fn noun(&self) -> &'static str {
        "device"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn queues(&self) -> u64 {
        // What daemons count differs with the type.
        1
    }

    fn config_length(&self) -> usize {
        // Each access is the daemon's to answer.
        0
    }

    fn check(&self, _offer: &Offer) -> Result<(), String> {
        Ok(())
    }

    fn features(&self, offer: &Offer) -> u64 {
        offer.features & TYPE_FEATURES & !feature::INDIRECT_DESC
    }

    fn config(&self, _offer: &Offer) -> Vec<u8> {
        Vec::new()
    }

    fn continues(&self, _known: &Offer, _now: &Offer) -> Result<(), String> {
        Ok(())
    }

    fn writable(&self, _features: u64, at: usize, data: &[u8]) -> bool {
        at.checked_add(data.len()).is_some_and(|end| end <= MAX_CONFIG as usize)
    }

    fn asks(&self) -> bool {
        true
    }

    fn answers(&self, _queue: u16) -> bool {
        // It may as well be one of buffers that wait for events.
        false
    }

    fn refuse(&self, _queue: u16, _request: &Chain, _memory: &GuestMemory) -> u32 {
        0
    }
}
