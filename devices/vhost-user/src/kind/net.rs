//! Network interfaces (virtio 1.2, 5.1).
//!
//! The daemon moves packets and nothing else: address, link, the number of queue pairs in use and the control queue are the VMM's, so that
//! they outlive it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use triarch_device_core::{Event, Sandbox};
use triarch_memory::GuestMemory;
use triarch_vhost_protocol::{Request, protocol};
use triarch_virtio::net::{NetCounters, NetPort, NetSide, NetStateV1, OffloadGroups, features as f};
use triarch_virtio::{Chain, DeviceContext, DeviceId, VirtQueue};
use vm_memory::{Bytes, GuestAddress};

use super::{Done, Kind, Offer, Own, Setting};
use crate::LinkState;

/// Bytes of the configuration space (5.1.4, up to mtu).
const CONFIG: usize = 12;
/// Bytes before each packet (5.1.6).
const HEADER: u32 = 12;
/// Offset of `num_buffers` in them.
const NUM_BUFFERS: u64 = 10;

/// What the configuration asks of an interface.
#[derive(Debug, Clone)]
pub struct NetOptions {
    /// Pairs of a receive and a transmit queue.
    pub pairs: u16,
    /// Descriptors of each queue: a power of two up to 32768.
    pub queue_size: u16,
    /// The guest's hardware address, if it is not the daemon's to say.
    pub mac: Option<[u8; 6]>,
    /// The address when nobody says one.
    pub fallback_mac: [u8; 6],
    /// Largest packet in bytes that the guest is told, without the Ethernet header.
    pub mtu: Option<u16>,
    /// Offloads that may be offered if the daemon has them.
    pub offloads: OffloadGroups,
}

/// What the driver chose, for the thread of the device to tell the daemon.
struct Choice {
    /// Pairs in use.
    pairs: AtomicU16,
    /// Wakes that thread, since a driver came.
    wake: Mutex<Option<Event>>,
}

/// A network interface that a daemon serves.
pub struct DaemonNet {
    options: NetOptions,
    sizes: Vec<u16>,
    port: Arc<NetPort>,
    mac: Mutex<[u8; 6]>,
    choice: Arc<Choice>,
    /// What the next driver continues from.
    restored: Mutex<Option<NetStateV1>>,
    /// The driver takes packets that fill several buffers.
    merges: AtomicBool,
    /// For each pair, buffers that belong to a packet which is counted already.
    rest: Vec<AtomicU16>,
    counters: NetCounters,
}

impl DaemonNet {
    /// An interface; what goes through it is counted in `counters`.
    pub fn new(options: NetOptions, counters: NetCounters) -> Self {
        let choice = Arc::new(Choice {
            pairs: AtomicU16::new(1),
            wake: Mutex::new(None),
        });
        let mac = options.mac.unwrap_or(options.fallback_mac);
        let side = Box::new(Side(choice.clone()));
        let port = NetPort::new(side, mac, options.pairs, options.mtu.unwrap_or(0));
        Self {
            sizes: vec![options.queue_size; 2 * usize::from(options.pairs)],
            port: Arc::new(port),
            mac: Mutex::new(mac),
            choice,
            restored: Mutex::new(None),
            merges: AtomicBool::new(false),
            rest: (0..options.pairs).map(|_| AtomicU16::new(0)).collect(),
            options,
            counters,
        }
    }

    /// The address that a driver finds.
    fn mac(&self) -> [u8; 6] {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread of the device, as far as the driver steers it.
struct Side(Arc<Choice>);

impl NetSide for Side {
    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        self.0.pairs.store(pairs, Relaxed);
        let wake = self.0.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = &*wake {
            wake.ring();
        }
        Ok(())
    }

    fn use_offloads(&self, _offloads: u64) -> io::Result<()> {
        // CTRL_GUEST_OFFLOADS is not offered: a daemon learns its offloads once, with the features.
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Kind for DaemonNet {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn noun(&self) -> &'static str {
        "interface"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn queues(&self) -> u64 {
        // Those that count pairs say fewer than those that count queues; enough of either is enough.
        self.options.pairs.into()
    }

    fn config_length(&self) -> usize {
        CONFIG
    }

    fn protocol(&self) -> u64 {
        protocol::RARP | protocol::NET_MTU
    }

    fn check(&self, _offer: &Offer) -> Result<(), String> {
        Ok(())
    }

    fn features(&self, offer: &Offer) -> u64 {
        let passed = offer.features & f::MOVER & !self.options.offloads.withheld();
        let mut features = passed | NetPort::FEATURES;
        if self.options.pairs > 1 {
            features |= f::MQ;
        }
        if self.options.mtu.is_some() {
            features |= f::MTU;
        }
        features
    }

    fn config(&self, _offer: &Offer) -> Vec<u8> {
        self.port.config().to_vec()
    }

    fn continues(&self, _known: &Offer, _now: &Offer) -> Result<(), String> {
        Ok(())
    }

    fn adopt(&self, offer: &Offer) {
        let theirs = offer.config.first_chunk::<6>();
        let told = theirs.filter(|mac| offer.features & f::MAC != 0 && mac[0] & 1 == 0 && **mac != [0; 6]);
        if let (None, Some(mac)) = (self.options.mac, told) {
            *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = *mac;
            self.port.detach(*mac);
        }
    }

    fn attach(&self, context: &DeviceContext, wake: &Event) {
        self.merges.store(context.features & f::MRG_RXBUF != 0, Relaxed);
        let restored = self.restored.lock().unwrap_or_else(PoisonError::into_inner).take();
        let pairs = restored.map_or(1, |state| self.port.restore(state, context.features));
        self.choice.pairs.store(pairs, Relaxed);
        *self.choice.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake.clone());
        self.port.attach(context.features, context.interrupt.clone());
    }

    fn detach(&self) {
        self.port.detach(self.mac());
        *self.choice.wake.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.rest.iter().for_each(|rest| rest.store(0, Relaxed));
    }

    fn enabled(&self, queue: u16) -> bool {
        queue / 2 < self.choice.pairs.load(Relaxed)
    }

    fn settings(&self, features: u64) -> Vec<Setting> {
        let mtu = self.options.mtu.filter(|_| features & f::MTU != 0);
        let setting = |mtu| Setting {
            needs: protocol::NET_MTU,
            request: Request::NET_SET_MTU,
            value: u64::from(mtu),
        };
        mtu.map(setting).into_iter().collect()
    }

    fn port(&self) -> Option<NetStateV1> {
        Some(self.port.state())
    }

    fn restore_port(&self, state: NetStateV1) {
        *self.restored.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    fn announce(&self) {
        // Without an interrupt the guest hears of it later.
        let _ = self.port.announce();
    }

    fn returned(&self) -> Vec<Setting> {
        // Where the daemon leads to may be another place of the network, and a switch learns from packets only. The guest's own
        // announcement tells of all its addresses, a daemon's of the one here.
        self.announce();
        let [a, b, c, d, e, g] = self.port.mac();
        vec![Setting {
            needs: protocol::RARP,
            request: Request::SEND_RARP,
            value: u64::from_le_bytes([a, b, c, d, e, g, 0, 0]),
        }]
    }

    fn link(&self, state: LinkState) {
        // As above.
        let _ = self.port.set_link(state != LinkState::Failing);
    }

    fn own_queue(&self, features: u64) -> Option<u16> {
        Some(self.port.control_queue(features))
    }

    fn own_queue_size(&self) -> Option<u16> {
        Some(NetPort::CONTROL_QUEUE_SIZE)
    }

    fn serve(&self, id: &str, queue: VirtQueue, sandbox: &Arc<dyn Sandbox>) -> io::Result<Own> {
        let control = self.port.serve(format!("{id}_ctrl"), queue, sandbox)?;
        Ok(Box::new(move || control.stop()))
    }

    fn answers(&self, queue: u16) -> bool {
        // Buffers to receive into wait for packets, for ever if there are none.
        queue % 2 == 1
    }

    fn needs_record(&self) -> bool {
        false
    }

    fn refuse(&self, _queue: u16, _request: &Chain, _memory: &GuestMemory) -> u32 {
        // A packet is lost, as on a wire that leads nowhere.
        0
    }

    fn done(&self, queue: u16, request: &Done, memory: &GuestMemory) {
        let pair = usize::from(queue / 2);
        if queue % 2 == 1 {
            let bytes = request.readable.saturating_sub(HEADER);
            return self.counters.passed(pair, false, 1, bytes.into());
        }
        let Some(rest) = self.rest.get(pair) else {
            return;
        };
        let left = rest.load(Relaxed);
        if left > 0 {
            rest.store(left - 1, Relaxed);
            return self.counters.passed(pair, true, 0, request.written.into());
        }
        if request.written < HEADER {
            return;
        }
        if self.merges.load(Relaxed) {
            // What the daemon wrote there is at most a wrong count.
            let at = request.writable.checked_add(NUM_BUFFERS).map(GuestAddress);
            let buffers: u16 = at.and_then(|at| memory.read_obj(at).ok()).map_or(1, u16::from_le);
            rest.store(buffers.saturating_sub(1), Relaxed);
        }
        let bytes = request.written - HEADER;
        self.counters.passed(pair, true, 1, bytes.into());
    }
}
