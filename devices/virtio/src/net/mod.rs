//! Network device (virtio 1.2, 5.1): queue pairs between a guest and a [`PacketBackend`], most often a tap.
//!
//! Each pair has a thread that moves packets between the host's queue and the guest's buffers without a copy in between; the
//! control queue has one too. An interface that is slower than the guest makes the guest's queue wait, one that is faster drops
//! packets before they get here, as a wire does.

mod control;
mod counters;
pub mod features;
mod port;
mod rx;
#[cfg(test)]
mod tests;
mod tx;
mod vectors;
mod worker;

use std::io;
use std::sync::Arc;

use thiserror::Error;
use triarch_device_core::Worker;
use triarch_net::PacketBackend;

pub use self::counters::{DirectionStats, NetCounters, NetStats};
use self::features as f;
pub use self::features::OffloadGroups;
pub use self::port::{NetControl, NetHandle, NetPort, NetSide, NetStateV1, RxModeV1};
use self::rx::Rx;
use self::tx::Tx;
use self::worker::Pair;
use crate::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, feature, read_config_bytes};

/// The smallest MTU a device may offer (virtio 1.2, 5.1.4.1).
const MIN_MTU: u16 = 68;

/// What a network device is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOptions {
    /// What its threads are called by: `_net0` gives `_net0_qp0`, `_net0_qp1`, `_net0_ctrl`.
    pub id: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// MTU the guest is told, in bytes; `None` for the backend's.
    pub mtu: Option<u16>,
    /// Descriptors of each receive and transmit queue: a power of two up to 32768.
    pub queue_size: u16,
    /// Offloads that may be offered.
    pub offloads: OffloadGroups,
}

/// Why a network device cannot be made as asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NetOptionsError {
    /// The queue size is not one the ring layout has.
    #[error("queue size {0} is not a power of two from 2 to 32768")]
    QueueSize(u16),
    /// The address is that of a group.
    #[error("{} is a multicast address; a guest's has an even first byte", .0.map(|b| format!("{b:02x}")).join(":"))]
    Mac([u8; 6]),
    /// The MTU is smaller than IPv4 allows.
    #[error("MTU {0} is too small; the least is {MIN_MTU}")]
    Mtu(u16),
}

/// A network device. See the [module](self).
pub struct Net {
    options: NetOptions,
    features: u64,
    queue_sizes: Vec<u16>,
    backend: Arc<dyn PacketBackend>,
    port: Arc<NetPort>,
    counters: NetCounters,
    context: Option<DeviceContext>,
    restored: Option<NetStateV1>,
    pairs: Vec<Option<Worker<Pair>>>,
    control: Option<NetControl>,
}

impl Net {
    /// A device with a queue pair for each queue of `backend`.
    pub fn new(options: NetOptions, backend: Arc<dyn PacketBackend>) -> Result<Self, NetOptionsError> {
        Self::counting(options, backend, NetCounters::default())
    }

    /// Such a device that counts in `counters`, which may be those of a device before it.
    pub fn counting(
        options: NetOptions,
        backend: Arc<dyn PacketBackend>,
        mut counters: NetCounters,
    ) -> Result<Self, NetOptionsError> {
        let size = options.queue_size;
        if !size.is_power_of_two() || !(2..=32768).contains(&size) {
            return Err(NetOptionsError::QueueSize(size));
        }
        if options.mac[0] & 1 != 0 {
            return Err(NetOptionsError::Mac(options.mac));
        }
        if let Some(mtu) = options.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetOptionsError::Mtu(mtu));
        }
        let of_backend = || {
            backend
                .mtu()
                .and_then(|m| u16::try_from(m).ok())
                .filter(|m| *m >= MIN_MTU)
        };
        let mtu = options.mtu.or_else(of_backend);
        let pairs = backend.queues().len();
        let mut features = feature::COMMON | f::BASE | f::offered(options.offloads, backend.offloads());
        if mtu.is_some() {
            features |= f::MTU;
        }
        if pairs > 1 {
            features |= f::MQ;
        }
        let mut queue_sizes = vec![size; 2 * pairs];
        queue_sizes.push(NetPort::CONTROL_QUEUE_SIZE);
        counters.extend_to(pairs);
        let side = Box::new(Packets(backend.clone()));
        // A tap has at most 256 queues.
        let port = NetPort::new(side, options.mac, pairs as u16, mtu.unwrap_or(0));
        Ok(Self {
            features,
            queue_sizes,
            backend,
            port: Arc::new(port),
            counters,
            options,
            context: None,
            restored: None,
            pairs: (0..pairs).map(|_| None).collect(),
            control: None,
        })
    }

    /// A way to the device for when its transport has it.
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            port: self.port.clone(),
            counters: self.counters.clone(),
        }
    }

    /// Makes the next activation continue from `state` instead of from a device that was reset.
    pub fn restore(&mut self, state: NetStateV1) {
        self.port.status().state = state.clone();
        self.restored = Some(state);
    }

    fn start_pair_queue(&mut self, queue: VirtQueue, context: &DeviceContext) -> Result<(), ActivateError> {
        let index = usize::from(queue.index());
        let number = index / 2;
        let (Some(worker), Some(host), Some(counters)) = (
            self.pairs.get_mut(number),
            self.backend.queues().get(number),
            self.counters.pair(number),
        ) else {
            return Err(ActivateError::Driver("it starts a queue the device does not have"));
        };
        // A thread that serves the other queue of the pair already takes this one in.
        let mut pair = match worker.take() {
            Some(running) => running.stop().ok_or_else(worker_died)?,
            None => Pair {
                name: format!("{}_qp{number}", self.options.id),
                host: host.clone(),
                counters: counters.clone(),
                rx: None,
                tx: None,
            },
        };
        if index.is_multiple_of(2) {
            pair.rx = Some(Rx::new(queue, context.features & f::MRG_RXBUF != 0));
        } else {
            pair.tx = Some(Tx::new(queue));
        }
        *worker = Some(pair.spawn(&context.sandbox).map_err(no_thread)?);
        Ok(())
    }

    fn stop_pair_queue(&mut self, index: usize) -> Option<VirtQueue> {
        let worker = self.pairs.get_mut(index / 2)?;
        let mut pair = worker.take()?.stop()?;
        let queue = if index.is_multiple_of(2) {
            pair.rx.take().map(Rx::into_queue)
        } else {
            pair.tx.take().map(Tx::into_queue)
        };
        if let (true, Some(context)) = (pair.rx.is_some() || pair.tx.is_some(), &self.context) {
            match pair.spawn(&context.sandbox) {
                Ok(running) => *worker = Some(running),
                Err(error) => {
                    tracing::error!("cannot go on with the other queue of a pair: {error}");
                    context.interrupt.needs_reset();
                }
            }
        }
        queue
    }

    /// Brings the host's side in line with the driver.
    fn apply(&mut self, features: u64) -> io::Result<()> {
        let offered = f::guest_offloads(features);
        let most = if features & f::MQ != 0 { self.port.pairs() } else { 1 };
        let (pairs, offloads) = match self.restored.take() {
            // What was saved elsewhere is not trusted to fit.
            Some(state) => (state.pairs.clamp(1, most), state.offloads & offered),
            None => (1, offered),
        };
        self.port.use_offloads(offloads)?;
        self.port.use_pairs(pairs)?;
        let mut status = self.port.status();
        status.state.pairs = pairs;
        status.state.offloads = offloads;
        Ok(())
    }
}

/// What moves packets, as far as the driver steers it.
struct Packets(Arc<dyn PacketBackend>);

impl NetSide for Packets {
    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        let pairs = usize::from(pairs);
        let all = 0..self.0.queues().len();
        // Those coming into use first, so that there is one at any time.
        for index in all.clone().filter(|i| *i < pairs) {
            self.0.set_queue_active(index, true)?;
        }
        for index in all.filter(|i| *i >= pairs) {
            self.0.set_queue_active(index, false)?;
        }
        Ok(())
    }

    fn use_offloads(&self, offloads: u64) -> io::Result<()> {
        self.0.set_offloads(f::to_host(offloads))
    }
}

fn worker_died() -> ActivateError {
    no_thread(io::Error::other("the thread of the queue pair died"))
}

fn no_thread(source: io::Error) -> ActivateError {
    ActivateError::Host {
        what: "the thread of a queue",
        source,
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> DeviceId {
        DeviceId::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.port.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // All fields are read-only: the address is set over the control queue.
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the device is active already"));
        }
        self.apply(context.features).map_err(|source| ActivateError::Host {
            what: "the host's network interface",
            source,
        })?;
        self.port.attach(context.features, context.interrupt.clone());
        self.context = Some(context);
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = self.context.clone() else {
            return Err(ActivateError::Driver("a queue starts before the device is active"));
        };
        if queue.index() != self.port.control_queue(context.features) {
            return self.start_pair_queue(queue, &context);
        }
        if self.control.is_some() {
            return Err(ActivateError::Driver("the control queue runs already"));
        }
        let name = format!("{}_ctrl", self.options.id);
        let control = self.port.serve(name, queue, &context.sandbox);
        self.control = Some(control.map_err(no_thread)?);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let features = self.context.as_ref()?.features;
        if index == self.port.control_queue(features) {
            return self.control.take()?.stop();
        }
        self.stop_pair_queue(usize::from(index))
    }

    fn reset(&mut self) {
        self.control.take().map(NetControl::stop);
        for worker in &mut self.pairs {
            worker.take().map(Worker::stop);
        }
        self.context = None;
        self.restored = None;
        self.port.detach(self.options.mac);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
