//! What a balloon's thread and its owner share.

use std::io;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::Observed;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::statistics::BalloonStatistics;
use super::{BALLOON_PAGE, BalloonObserver, CONFIG, pages_of};
use crate::config_listener::ConfigListener;

/// What of a balloon goes into a snapshot, beside what the transport saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStateV1 {
    /// Pages of 4 KiB that the host wants.
    pub target_pages: u32,
    /// Pages of 4 KiB that the driver says it has put in.
    pub actual_pages: u32,
    /// What the driver fills free pages with.
    pub poison: u32,
}

/// How a balloon stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Bytes the host wants.
    pub target: u64,
    /// Bytes the driver says it has put in; it may say what it likes.
    pub actual: u64,
    /// Whether there is a driver.
    pub active: bool,
}

/// What a balloon counted since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonCounters {
    /// Bytes of memory that were put in.
    pub inflated: u64,
    /// Bytes that were taken out.
    pub deflated: u64,
    /// Bytes that were reported as free.
    pub reported: u64,
    /// Bytes that were given back to the host.
    pub discarded: u64,
    /// Pages put in that are no memory of the guest.
    pub invalid: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) inflated: AtomicU64,
    pub(super) deflated: AtomicU64,
    pub(super) reported: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) invalid: AtomicU64,
}

pub(super) struct Shared {
    pub(super) target: AtomicU32,
    pub(super) actual: AtomicU32,
    pub(super) poison: AtomicU32,
    pub(super) counters: Counters,
    statistics: Mutex<Option<BalloonStatistics>>,
    /// Somebody would like newer statistics.
    wanted: AtomicBool,
    /// Wakes the thread for that.
    pub(super) refresh: EventFd,
    pub(super) driver: ConfigListener,
    pub(super) observed: Observed,
}

impl Shared {
    pub(super) fn new(target: u32, observer: BalloonObserver) -> io::Result<Self> {
        Ok(Self {
            target: target.into(),
            actual: AtomicU32::default(),
            poison: AtomicU32::default(),
            counters: Counters::default(),
            statistics: Mutex::default(),
            wanted: AtomicBool::default(),
            refresh: EventFd::new(EFD_NONBLOCK)?,
            driver: ConfigListener::default(),
            observed: Observed::new(observer),
        })
    }

    /// The configuration space (virtio 1.2, 5.5.4).
    pub(super) fn config(&self) -> [u8; CONFIG] {
        let fields = [
            self.target.load(SeqCst),
            self.actual.load(SeqCst),
            0,
            self.poison.load(Relaxed),
        ];
        let mut config = [0; CONFIG];
        for (bytes, field) in config.chunks_exact_mut(4).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        config
    }

    fn statistics(&self) -> MutexGuard<'_, Option<BalloonStatistics>> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_statistics(&self, statistics: BalloonStatistics) {
        *self.statistics() = Some(statistics);
    }

    /// Whether somebody asked for newer statistics since the last call.
    pub(super) fn take_wanted(&self) -> bool {
        self.wanted.swap(false, SeqCst)
    }

    /// A new driver knows nothing of what is in the balloon: to it, those pages are its own.
    pub(super) fn forget_driver(&self) {
        self.driver.set(None);
        self.poison.store(0, Relaxed);
        *self.statistics() = None;
        if self.actual.swap(0, SeqCst) != 0 {
            self.observed.changed();
        }
    }
}

/// A way to a balloon that its transport has taken in.
#[derive(Clone)]
pub struct BalloonHandle(pub(super) Arc<Shared>);

impl BalloonHandle {
    /// How it stands. After this its observer is told of the next change.
    pub fn status(&self) -> BalloonStatus {
        let shared = &self.0;
        shared.observed.looked();
        BalloonStatus {
            target: u64::from(shared.target.load(SeqCst)) * BALLOON_PAGE,
            actual: self.actual(),
            active: shared.driver.is_there(),
        }
    }

    /// Bytes the driver says it has put in.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(SeqCst)) * BALLOON_PAGE
    }

    /// Bytes the host wants.
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(SeqCst)) * BALLOON_PAGE
    }

    /// Asks the driver for a balloon of `bytes`, rounded down to whole pages. Without a driver, the next one will hear of it.
    pub fn set_target(&self, bytes: u64) -> io::Result<()> {
        self.0.target.store(pages_of(bytes), SeqCst);
        self.0.driver.config_changed()
    }

    /// The last statistics of the guest, if it gave any, and asks it for newer ones, for whoever comes next.
    pub fn statistics(&self) -> Option<BalloonStatistics> {
        let known = self.0.statistics().clone();
        if !self.0.wanted.swap(true, SeqCst) {
            // Fails only when it is readable already.
            let _ = self.0.refresh.write(1);
        }
        known
    }

    /// What it counted.
    pub fn counters(&self) -> BalloonCounters {
        let counters = &self.0.counters;
        BalloonCounters {
            inflated: counters.inflated.load(Relaxed),
            deflated: counters.deflated.load(Relaxed),
            reported: counters.reported.load(Relaxed),
            discarded: counters.discarded.load(Relaxed),
            invalid: counters.invalid.load(Relaxed),
        }
    }

    /// What goes into a snapshot; take it while the device's queues are stopped.
    pub fn state(&self) -> BalloonStateV1 {
        BalloonStateV1 {
            target_pages: self.0.target.load(SeqCst),
            actual_pages: self.0.actual.load(SeqCst),
            poison: self.0.poison.load(Relaxed),
        }
    }
}
