//! A port as the network device that a front end sees.

use std::io;

use triarch_daemon::backend::{Served, protocol};
use triarch_virtio::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, read_config_bytes};

use crate::features;
use crate::plane::{PlaneHandle, PortKey};
use crate::switch::frame::Mac;

/// Longest queue; front ends choose how long theirs are.
const QUEUE_SIZE: u16 = 1024;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// What a guest's device is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Pairs of queues it may have.
    pub pairs: u16,
    /// Its hardware address, if it is known here.
    pub mac: Option<Mac>,
    /// Its MTU, if there is one.
    pub mtu: Option<u16>,
}

/// A network device whose queues the switch works on.
pub struct PortDevice {
    plane: PlaneHandle,
    key: PortKey,
    sizes: Vec<u16>,
    features: u64,
    config: [u8; 12],
    active: bool,
}

impl PortDevice {
    /// The device at port `key`.
    pub fn new(plane: PlaneHandle, key: PortKey, options: &DeviceOptions) -> Self {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&options.mac.unwrap_or_default());
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&options.pairs.to_le_bytes());
        config[10..].copy_from_slice(&options.mtu.unwrap_or(0).to_le_bytes());
        Self {
            plane,
            key,
            sizes: vec![QUEUE_SIZE; 2 * usize::from(options.pairs)],
            features: features::offered(options.pairs.into(), options.mac.is_some(), options.mtu.is_some()),
            config,
            active: false,
        }
    }

    /// Tells the other ports where the guest is now.
    pub fn tell(&self, mac: Option<Mac>) {
        let key = self.key;
        // Without a switch there is nobody to tell.
        let _ = self.plane.call(move |plane| plane.announce(key, mac));
    }
}

fn failed(what: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> ActivateError {
    ActivateError::Host {
        what,
        source: io::Error::other(error),
    }
}

impl VirtioDevice for PortDevice {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        let (what, key) = ("the port", self.key);
        let attached = self.plane.call(move |plane| plane.attach(key, &context));
        attached.map_err(|e| failed(what, e))?.map_err(|e| failed(what, e))?;
        self.active = true;
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        if !self.active {
            return Err(ActivateError::Driver("a queue starts before there is a driver"));
        }
        let (what, key, index) = ("a queue", self.key, queue.index());
        let started = self.plane.call(move |plane| plane.start_queue(key, queue));
        started.map_err(|e| failed(what, e))?.map_err(|e| failed(what, e))?;
        if index == 1 {
            // Where it has been before, if anywhere, may be another place.
            self.tell(None);
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let key = self.key;
        self.plane.call(move |plane| plane.stop_queue(key, index)).ok()?
    }

    fn reset(&mut self) {
        let key = self.key;
        self.active = false;
        let _ = self.plane.call(move |plane| plane.detach(key));
    }
}

impl Served for PortDevice {
    fn protocol(&self) -> u64 {
        protocol::COMMON | protocol::RARP | protocol::NET_MTU
    }

    fn announce(&mut self, mac: [u8; 6]) {
        let valid = mac[0] & 1 == 0 && mac != [0; 6];
        self.tell(valid.then_some(mac));
    }
}
