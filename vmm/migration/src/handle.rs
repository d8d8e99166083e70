//! What others see of a migration that runs, and how they act on it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::pace::Pacer;
use crate::stream::Interrupt;

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The two sides make each other's acquaintance.
    Connecting,
    /// Memory is copied while the guest runs.
    Copying,
    /// The destination has the guest's memory, and prepares a machine while the guest runs.
    HandingOver,
    /// The guest is paused, and the rest is copied.
    Switching,
    /// The guest was given away; its end is awaited.
    Committed,
    /// The guest runs at the destination, and memory that it lacks comes from the source.
    PostCopy,
    /// The same, and the connection is lost: whoever touches what is lacking waits.
    PostCopyPaused,
    /// It is over.
    Over,
}

/// How far a migration is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// Since when it runs.
    pub elapsed: Duration,
    /// Rounds that began.
    pub rounds: u32,
    /// Bytes of guest memory.
    pub total: u64,
    /// Bytes of memory left in this round.
    pub remaining: u64,
    /// Pages sent with what is on them, each time they were.
    pub pages: u64,
    /// Pages that were zeroes: told in a few bytes, or not at all.
    pub zero_pages: u64,
    /// Bytes on the wire, before TLS.
    pub wire_bytes: u64,
    /// Bytes of memory that go a second, as measured lately.
    pub rate: u64,
    /// Bytes of memory that the guest writes a second, as measured in the last round.
    pub dirty_rate: u64,
    /// How long the guest would be paused if it were switched at the end of this round.
    pub expected_downtime: Option<Duration>,
    /// By how many percent its vCPUs are slowed down.
    pub throttle: u8,
    /// How often it was paused, and let run again since the promise would not have been kept.
    pub retreats: u32,
    /// Why it stands, while it does.
    pub trouble: Option<String>,
}

/// What several threads count.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    pub(crate) wire_bytes: AtomicU64,
    pub(crate) remaining: AtomicU64,
    pub(crate) rounds: AtomicU32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Will {
    Open,
    Cancelled,
    Committed,
}

#[derive(Debug)]
struct Seen {
    phase: Phase,
    began: Instant,
    ended: Option<Instant>,
    total: u64,
    rate: u64,
    dirty_rate: u64,
    expected_downtime: Option<Duration>,
    throttle: u8,
    retreats: u32,
    will: Will,
    trouble: Option<String>,
}

/// A migration that runs, for other threads than its own.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    seen: Mutex<Seen>,
    pub(crate) counters: Counters,
    pacer: Pacer,
    interrupt: Interrupt,
    wish: Wish,
}

/// What somebody asked for, of post-copy.
#[derive(Debug, Default)]
struct Wish {
    /// Switch now.
    switch: AtomicBool,
    /// Try to connect again.
    recover: AtomicBool,
    /// Give the guest up.
    abandon: AtomicBool,
}

impl Handle {
    /// One for a migration that is about to begin, with at most `cap` bytes a second on the wire.
    pub fn new(cap: Option<u64>) -> Self {
        Self(Arc::new(Inner {
            seen: Mutex::new(Seen {
                phase: Phase::Connecting,
                began: Instant::now(),
                ended: None,
                total: 0,
                rate: 0,
                dirty_rate: 0,
                expected_downtime: None,
                throttle: 0,
                retreats: 0,
                will: Will::Open,
                trouble: None,
            }),
            counters: Counters::default(),
            pacer: Pacer::new(cap),
            interrupt: Interrupt::default(),
            wish: Wish::default(),
        }))
    }

    /// Ends the migration; its guest stays where it is. `false`: it is too late, the guest was given away or is about to be.
    pub fn cancel(&self) -> bool {
        let cancelled = self.with(|seen| {
            if seen.will == Will::Open {
                seen.will = Will::Cancelled;
            }
            seen.will == Will::Cancelled
        });
        if cancelled {
            self.0.interrupt.raise();
        }
        cancelled
    }

    /// Whether somebody [`cancelled`](Self::cancel) it.
    pub fn is_cancelled(&self) -> bool {
        self.with(|seen| seen.will == Will::Cancelled)
    }

    /// Sets how many bytes a second may go from now on; `None`: as many as there is room for.
    pub fn set_cap(&self, cap: Option<u64>) {
        self.0.pacer.set(cap);
    }

    /// Bytes that may go a second.
    pub fn cap(&self) -> Option<u64> {
        self.0.pacer.cap()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let counters = &self.0.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.with(|seen| Progress {
            phase: seen.phase,
            elapsed: seen
                .ended
                .unwrap_or_else(Instant::now)
                .saturating_duration_since(seen.began),
            rounds: counters.rounds.load(Ordering::Relaxed),
            total: seen.total,
            remaining: count(&counters.remaining),
            pages: count(&counters.pages),
            zero_pages: count(&counters.zero_pages),
            wire_bytes: count(&counters.wire_bytes),
            rate: seen.rate,
            dirty_rate: seen.dirty_rate,
            expected_downtime: seen.expected_downtime,
            throttle: seen.throttle,
            retreats: seen.retreats,
            trouble: seen.trouble.clone(),
        })
    }

    /// Has the guest switched now, although not all of its memory is there, if the migration is one that may. `false`: it is too late.
    pub fn switch_to_post_copy(&self) -> bool {
        let open = self.with(|seen| matches!(seen.phase, Phase::Connecting | Phase::Copying));
        if open {
            self.0.wish.switch.store(true, Ordering::Release);
        }
        open
    }

    /// Has the source try to connect again, now. `false`: no connection is lost.
    pub fn recover(&self) -> bool {
        let lost = self.with(|seen| seen.phase == Phase::PostCopyPaused);
        if lost {
            self.0.wish.recover.store(true, Ordering::Release);
        }
        lost
    }

    /// Gives up a guest whose connection is lost: at the source its memory is needed no more. `false`: no connection is lost.
    pub fn abandon(&self) -> bool {
        let lost = self.with(|seen| seen.phase == Phase::PostCopyPaused);
        if lost {
            self.0.wish.abandon.store(true, Ordering::Release);
        }
        lost
    }

    /// The VMM ends: whoever follows a guest that lacks memory, at either side, stops.
    pub fn leave(&self) {
        self.0.wish.abandon.store(true, Ordering::Release);
    }

    pub(crate) fn wants_switch(&self) -> bool {
        self.0.wish.switch.load(Ordering::Acquire)
    }

    pub(crate) fn take_recover(&self) -> bool {
        self.0.wish.recover.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.0.wish.abandon.load(Ordering::Acquire)
    }

    /// It stands in [`PostCopyPaused`](Phase::PostCopyPaused) until it [enters](Self::enter) another phase, and why.
    pub(crate) fn stand(&self, why: String) {
        self.with(|seen| (seen.phase, seen.trouble) = (Phase::PostCopyPaused, Some(why)));
    }

    fn with<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.0.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From here on it cannot be cancelled; `false`: it was.
    pub(crate) fn commit(&self) -> bool {
        self.with(|seen| {
            if seen.will == Will::Open {
                seen.will = Will::Committed;
            }
            seen.will == Will::Committed
        })
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.with(|seen| {
            (seen.phase, seen.trouble) = (phase, None);
            if phase == Phase::Over {
                seen.ended = Some(Instant::now());
            }
        });
    }

    pub(crate) fn set_total(&self, total: u64) {
        self.with(|seen| seen.total = total);
    }

    pub(crate) fn set_rates(&self, rate: u64, dirty_rate: u64, expected_downtime: Option<Duration>) {
        self.with(|seen| {
            (seen.rate, seen.dirty_rate, seen.expected_downtime) = (rate, dirty_rate, expected_downtime);
        });
    }

    pub(crate) fn set_throttle(&self, percent: u8) {
        self.with(|seen| seen.throttle = percent);
    }

    pub(crate) fn count_retreat(&self) {
        self.with(|seen| seen.retreats += 1);
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.0.counters
    }

    pub(crate) fn pacer(&self) -> &Pacer {
        &self.0.pacer
    }

    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.0.interrupt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_is_cancelled_or_committed() {
        let handle = Handle::new(None);
        assert!(handle.cancel() && handle.cancel() && handle.is_cancelled());
        assert!(!handle.commit());
        let handle = Handle::new(None);
        assert!(handle.commit() && handle.commit());
        assert!(!handle.cancel() && !handle.is_cancelled() && !handle.interrupt().is_raised());
    }

    #[test]
    fn what_was_refused_is_not_done_later() {
        let handle = Handle::new(None);
        handle.enter(Phase::Switching);
        assert!(!handle.switch_to_post_copy());
        // The guest runs on, and is copied again.
        handle.enter(Phase::Copying);
        assert!(!handle.wants_switch());
        assert!(handle.switch_to_post_copy() && handle.wants_switch());
    }
}
