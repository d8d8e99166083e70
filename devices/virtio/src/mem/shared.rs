//! What a memory device's thread and its owner share.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::Observed;

use super::region::{PlugError, Region, Trouble};
use super::request::{Answer, Request};
use super::{MemError, MemObserver, MemOptions};
use crate::config_listener::ConfigListener;

/// Bytes of the configuration space.
pub(super) const CONFIG: usize = 56;

/// What of a memory device goes into a snapshot, beside what the transport saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioMemStateV1 {
    /// GPA of the region.
    pub addr: u64,
    /// Its bytes.
    pub region_size: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes the host wants plugged.
    pub requested_size: u64,
    /// Plugged blocks, in order.
    pub plugged: Vec<BlockRunV1>,
}

/// Plugged blocks that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRunV1 {
    /// Number of the first, counted from the begin of the region.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// How a memory device stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemStatus {
    /// Bytes the host wants plugged.
    pub requested: u64,
    /// Bytes that are.
    pub plugged: u64,
    /// Bytes that the guest can reach: those of parts with a plugged block.
    pub open: u64,
    /// Whether there is a driver.
    pub active: bool,
}

/// What a memory device counted since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemCounters {
    /// Bytes that were plugged.
    pub plugged: u64,
    /// Bytes that were unplugged.
    pub unplugged: u64,
    /// Requests answered with NACK: more than the host wants.
    pub nack: u64,
    /// Requests answered with BUSY: the host could not, or the guest spreads its blocks too far.
    pub busy: u64,
    /// Requests answered with ERROR: not what a driver may ask.
    pub error: u64,
}

#[derive(Default)]
struct Counters {
    plugged: AtomicU64,
    unplugged: AtomicU64,
    nack: AtomicU64,
    busy: AtomicU64,
    error: AtomicU64,
}

pub(super) struct Shared {
    pub(super) options: MemOptions,
    /// Locked while the host works on a request; who must not wait reads the numbers below.
    region: Mutex<Region>,
    requested: AtomicU64,
    plugged: AtomicU64,
    open: AtomicU64,
    counters: Counters,
    pub(super) driver: ConfigListener,
    pub(super) observed: Observed,
}

impl Shared {
    pub(super) fn new(region: Region, options: MemOptions, observer: MemObserver) -> Self {
        Self {
            options,
            region: Mutex::new(region),
            requested: options.requested.into(),
            plugged: AtomicU64::default(),
            open: AtomicU64::default(),
            counters: Counters::default(),
            driver: ConfigListener::default(),
            observed: Observed::new(observer),
        }
    }

    /// The configuration space (virtio 1.2, 5.15.4). All of the region is usable: how much of it, `requested_size` says.
    pub(super) fn config(&self) -> [u8; CONFIG] {
        let MemOptions {
            addr,
            size,
            block,
            node,
            ..
        } = self.options;
        let fields = [
            block,
            node.unwrap_or(0).into(),
            addr,
            size,
            size,
            self.plugged.load(SeqCst),
            self.requested.load(SeqCst),
        ];
        let mut config = [0; CONFIG];
        for (bytes, field) in config.chunks_exact_mut(8).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        config
    }

    /// Serves a request. `stop` can end it early, and then it has to be asked again.
    pub(super) fn serve(&self, request: Request, stop: &mut dyn FnMut() -> bool) -> (Answer, Option<Trouble>) {
        let mut region = self.region();
        let before = region.plugged();
        let answer = match request {
            Request::Plug(span) => region.plug(span, self.requested.load(SeqCst), stop),
            Request::Unplug(span) => region.unplug(span),
            Request::UnplugAll => region.unplug_all(),
            Request::State(span) => region.state(span),
            Request::Unknown => Answer::Error,
        };
        let now = region.plugged();
        self.show(&region);
        let trouble = region.take_trouble();
        drop(region);
        let counters = &self.counters;
        counters.plugged.fetch_add(now.saturating_sub(before), Relaxed);
        counters.unplugged.fetch_add(before.saturating_sub(now), Relaxed);
        let refused = match answer {
            Answer::Nack => Some(&counters.nack),
            Answer::Busy => Some(&counters.busy),
            Answer::Error => Some(&counters.error),
            Answer::Ack | Answer::State(_) => None,
        };
        if let Some(counter) = refused {
            counter.fetch_add(1, Relaxed);
        }
        if now != before {
            self.observed.changed();
        }
        (answer, trouble)
    }

    pub(super) fn restore(&self, state: &VirtioMemStateV1) -> Result<(), PlugError> {
        let mut region = self.region();
        let own = (self.options.addr, self.options.size, self.options.block);
        if own != (state.addr, state.region_size, state.block_size) || region.check_size(state.requested_size).is_err()
        {
            return Err(PlugError::Other);
        }
        let done = region.restore(&state.plugged);
        self.requested.store(state.requested_size, SeqCst);
        self.show(&region);
        done
    }

    fn show(&self, region: &Region) {
        self.plugged.store(region.plugged(), SeqCst);
        self.open.store(region.open(), SeqCst);
    }

    fn region(&self) -> MutexGuard<'_, Region> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A way to a memory device that its transport has taken in.
#[derive(Clone)]
pub struct MemHandle(pub(super) Arc<Shared>);

impl MemHandle {
    /// How it stands. After this its observer is told of the next change.
    pub fn status(&self) -> MemStatus {
        self.0.observed.looked();
        MemStatus {
            requested: self.requested(),
            plugged: self.plugged(),
            open: self.0.open.load(SeqCst),
            active: self.0.driver.is_there(),
        }
    }

    /// What it is like. `requested` is what it began with.
    pub fn options(&self) -> &MemOptions {
        &self.0.options
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(SeqCst)
    }

    /// Bytes that the guest can reach.
    pub fn open(&self) -> u64 {
        self.0.open.load(SeqCst)
    }

    /// Bytes the host wants plugged.
    pub fn requested(&self) -> u64 {
        self.0.requested.load(SeqCst)
    }

    /// Checks that the host may want `bytes`.
    pub fn check(&self, bytes: u64) -> Result<(), MemError> {
        let MemOptions { size, block, .. } = self.0.options;
        match bytes <= size && bytes.is_multiple_of(block) {
            true => Ok(()),
            false => Err(MemError::Size { bytes, block, size }),
        }
    }

    /// Asks the driver for `bytes` plugged, which [`check`](Self::check) has accepted. Without a driver, the next one will hear of it.
    pub fn set_requested(&self, bytes: u64) -> io::Result<()> {
        self.0.requested.store(bytes, SeqCst);
        self.0.driver.config_changed()
    }

    /// What it counted.
    pub fn counters(&self) -> MemCounters {
        let counters = &self.0.counters;
        MemCounters {
            plugged: counters.plugged.load(Relaxed),
            unplugged: counters.unplugged.load(Relaxed),
            nack: counters.nack.load(Relaxed),
            busy: counters.busy.load(Relaxed),
            error: counters.error.load(Relaxed),
        }
    }

    /// What goes into a snapshot; take it while the device's queue is stopped.
    pub fn state(&self) -> VirtioMemStateV1 {
        let region = self.0.region();
        VirtioMemStateV1 {
            addr: self.0.options.addr,
            region_size: self.0.options.size,
            block_size: self.0.options.block,
            requested_size: self.requested(),
            plugged: region.saved(),
        }
    }
}
