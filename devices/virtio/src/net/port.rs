//! What a driver sees of an interface beside its packets. It is the same whether this process moves those or a daemon does.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::{Sandbox, Worker};

use super::control::Control;
use super::counters::{NetCounters, NetStats};
use super::features as f;
use crate::{VirtQueue, VirtioInterrupt};

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

/// Whoever moves the packets, as far as the driver steers it.
pub trait NetSide: Send + Sync {
    /// Makes it use the first `pairs` queue pairs only.
    fn use_pairs(&self, pairs: u16) -> io::Result<()>;

    /// Sets the offloads towards the guest, which are feature bits.
    fn use_offloads(&self, offloads: u64) -> io::Result<()>;
}

/// What a driver sees of an interface beside its packets: address, link, how many queue pairs it uses; and the control queue.
pub struct NetPort {
    side: Box<dyn NetSide>,
    pairs: u16,
    mtu: u16,
    status: Mutex<Status>,
}

impl NetPort {
    /// What every interface can offer with it.
    pub const FEATURES: u64 = f::OURS;
    /// Descriptors of the control queue: drivers send one command at a time.
    pub const CONTROL_QUEUE_SIZE: u16 = 64;

    /// One with `pairs` queue pairs, which `side` serves. `mtu` is 0 if the guest is told none.
    pub fn new(side: Box<dyn NetSide>, mac: [u8; 6], pairs: u16, mtu: u16) -> Self {
        Self {
            side,
            pairs,
            mtu,
            status: Mutex::new(Status {
                state: initial(mac),
                driver: None,
            }),
        }
    }

    pub(super) fn pairs(&self) -> u16 {
        self.pairs
    }

    pub(super) fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which queue the control queue is depends on whether the driver knows of the pairs in between (virtio 1.2, 5.1.2).
    pub fn control_queue(&self, features: u64) -> u16 {
        if features & f::MQ != 0 { 2 * self.pairs } else { 2 }
    }

    /// A driver came that agreed to `features`. It uses one pair until it says otherwise.
    pub fn attach(&self, features: u64, interrupt: Arc<dyn VirtioInterrupt>) {
        self.status().driver = Some(Driver { features, interrupt });
    }

    /// The driver is gone. The cable stays where it was; the address is `mac` again.
    pub fn detach(&self, mac: [u8; 6]) {
        let mut status = self.status();
        let link_up = status.state.link_up;
        status.driver = None;
        status.state = initial(mac);
        status.state.link_up = link_up;
    }

    /// What goes into a snapshot; take it while the device's queues are stopped.
    pub fn state(&self) -> NetStateV1 {
        self.status().state.clone()
    }

    /// Continues from `state`, which was saved elsewhere, of a driver that agreed to `features`. Returns how many queue pairs are in use.
    pub fn restore(&self, state: NetStateV1, features: u64) -> u16 {
        // It is not trusted to fit.
        let most = if features & f::MQ != 0 { self.pairs } else { 1 };
        let pairs = state.pairs.clamp(1, most);
        let mut status = self.status();
        // The cable is the host's.
        let link_up = status.state.link_up;
        status.state = NetStateV1 {
            pairs,
            link_up,
            ..state
        };
        pairs
    }

    /// The address, which the driver may have changed.
    pub fn mac(&self) -> [u8; 6] {
        self.status().state.mac
    }

    /// Plugs the cable in or pulls it, and tells the driver.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        let mut status = self.status();
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
        let mut status = self.status();
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

    /// Serves the control queue on a thread called `name` (virtio 1.2, 5.1.6.5).
    pub fn serve(
        self: &Arc<Self>,
        name: String,
        queue: VirtQueue,
        sandbox: &Arc<dyn Sandbox>,
    ) -> io::Result<NetControl> {
        let port = self.clone();
        Control { name, queue, port }.spawn(sandbox).map(NetControl)
    }

    /// The configuration space (virtio 1.2, 5.1.4).
    pub fn config(&self) -> [u8; 12] {
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
        self.side.use_pairs(pairs)
    }

    pub(super) fn use_offloads(&self, offloads: u64) -> io::Result<()> {
        self.side.use_offloads(offloads)
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

/// A control queue that is served.
pub struct NetControl(Worker<Control>);

impl NetControl {
    /// Ends that; gives the queue back.
    pub fn stop(self) -> Option<VirtQueue> {
        self.0.stop().map(|control| control.queue)
    }
}

/// A way to a network device that its transport has taken in.
#[derive(Clone)]
pub struct NetHandle {
    pub(super) port: Arc<NetPort>,
    pub(super) counters: NetCounters,
}

impl NetHandle {
    /// What it counted, over all its queues.
    pub fn stats(&self) -> NetStats {
        let mut sum = NetStats::default();
        for pair in self.counters.read() {
            sum.add(&pair);
        }
        sum
    }

    /// What goes into a snapshot; take it while the device's queues are stopped.
    pub fn state(&self) -> NetStateV1 {
        self.port.state()
    }

    /// Plugs the cable in or pulls it, and tells the driver.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        self.port.set_link(up)
    }

    /// Asks the driver to announce the guest's addresses, as [`NetPort::announce`].
    pub fn announce(&self) -> io::Result<bool> {
        self.port.announce()
    }
}
