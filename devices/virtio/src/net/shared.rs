//! What a network device's threads and its owner share.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_net::PacketBackend;

use super::counters::{NetCounters, NetStats};
use super::features as f;
use crate::VirtioInterrupt;

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// VIRTIO_NET_S_ANNOUNCE.
const ANNOUNCE: u16 = 2;

/// Which frames the driver wants to see (virtio 1.2, 5.1.6.5.1). Kept for whoever asks; every frame the host sends is passed on,
/// and the guest drops what it does not want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RxModeV1 {
    /// All frames.
    pub promiscuous: bool,
    /// All multicast frames.
    pub all_multicast: bool,
    /// All unicast frames.
    pub all_unicast: bool,
    /// No multicast frames.
    pub no_multicast: bool,
    /// No unicast frames.
    pub no_unicast: bool,
    /// No broadcast frames.
    pub no_broadcast: bool,
}

/// What of a network device goes into a snapshot, beside its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// Hardware address, which the driver may have changed.
    pub mac: [u8; 6],
    /// Whether the link is up.
    pub link_up: bool,
    /// Whether the driver has yet to confirm a request to announce itself.
    pub announce: bool,
    /// Queue pairs in use.
    pub pairs: u16,
    /// Offloads towards the guest in use, as feature bits.
    pub offloads: u64,
    /// Which frames the driver wants.
    pub rx_mode: RxModeV1,
}

/// The driver's side while it is there.
pub(super) struct Driver {
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
}

pub(super) struct Status {
    pub(super) state: NetStateV1,
    pub(super) driver: Option<Driver>,
}

pub(super) struct Shared {
    pub(super) backend: Arc<dyn PacketBackend>,
    pub(super) counters: NetCounters,
    pub(super) mtu: u16,
    status: Mutex<Status>,
}

impl Shared {
    pub(super) fn new(backend: Arc<dyn PacketBackend>, mut counters: NetCounters, mac: [u8; 6], mtu: u16) -> Self {
        counters.extend_to(backend.queues().len());
        Self {
            backend,
            counters,
            mtu,
            status: Mutex::new(Status {
                state: initial(mac),
                driver: None,
            }),
        }
    }

    pub(super) fn pairs(&self) -> u16 {
        // A tap has at most 256 queues.
        self.backend.queues().len() as u16
    }

    pub(super) fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space (virtio 1.2, 5.1.4).
    pub(super) fn config(&self) -> [u8; 12] {
        let state = &self.status().state;
        let mut config = [0; 12];
        config[..6].copy_from_slice(&state.mac);
        let link = if state.link_up { LINK_UP } else { 0 };
        let announce = if state.announce { ANNOUNCE } else { 0 };
        config[6..8].copy_from_slice(&(link | announce).to_le_bytes());
        config[8..10].copy_from_slice(&self.pairs().to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    /// Makes the host use the first `pairs` queues; it is always told so before the driver is.
    pub(super) fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        let pairs = usize::from(pairs);
        let all = 0..self.backend.queues().len();
        // Those coming into use first, so that there is one at any time.
        for index in all.clone().filter(|i| *i < pairs) {
            self.backend.set_queue_active(index, true)?;
        }
        for index in all.filter(|i| *i >= pairs) {
            self.backend.set_queue_active(index, false)?;
        }
        Ok(())
    }

    pub(super) fn use_offloads(&self, offloads: u64) -> io::Result<()> {
        self.backend.set_offloads(f::to_host(offloads))
    }
}

/// What the device is like before a driver touches it.
pub(super) fn initial(mac: [u8; 6]) -> NetStateV1 {
    NetStateV1 {
        mac,
        link_up: true,
        announce: false,
        pairs: 1,
        offloads: 0,
        rx_mode: RxModeV1::default(),
    }
}

/// A way to a network device that its transport has taken in.
#[derive(Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// What it counted, over all its queues.
    pub fn stats(&self) -> NetStats {
        let mut sum = NetStats::default();
        for pair in self.0.counters.read() {
            sum.add(&pair);
        }
        sum
    }

    /// What goes into a snapshot; take it while the device's queues are stopped.
    pub fn state(&self) -> NetStateV1 {
        self.0.status().state.clone()
    }

    /// Plugs the cable in or pulls it, and tells the driver.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        let mut status = self.0.status();
        if std::mem::replace(&mut status.state.link_up, up) == up {
            return Ok(());
        }
        match &status.driver {
            Some(driver) => driver.interrupt.config(),
            None => Ok(()),
        }
    }

    /// Asks the driver to announce the guest's addresses to the network, as after a move to another host. Returns whether there
    /// is a driver that can.
    pub fn announce(&self) -> io::Result<bool> {
        let mut status = self.0.status();
        let Status {
            state,
            driver: Some(driver),
        } = &mut *status
        else {
            return Ok(false);
        };
        if driver.features & f::GUEST_ANNOUNCE == 0 {
            return Ok(false);
        }
        state.announce = true;
        driver.interrupt.config().map(|()| true)
    }
}
