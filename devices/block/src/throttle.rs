//! Limits on how much a disk may do.
//!
//! A bucket holds tokens: operations, or bytes. It fills continuously, computed from the time that passed and never in ticks, up to the
//! burst. An operation goes when there is a token at all and takes what it costs, if need be on credit, which is paid back before the next
//! one goes. So over any time `t` a disk does at most `burst + rate * t` and one operation more, large operations are not starved by small
//! ones, and no rounding adds up: tokens are counted in billionths.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use crate::buffer::IoBuf;
use crate::queue::{Full, IoQueue, OnCompletion, Op};
use crate::sys;

/// Billionths, the unit tokens are counted in: what a rate of one per second yields in a nanosecond.
const UNIT: i128 = 1_000_000_000;

/// How much of something a disk may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Per second, at least 1.
    pub per_second: u64,
    /// What may be done at once after a pause, at least 1.
    pub burst: u64,
}

/// Limits of a disk; what has none is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Operations of any kind.
    pub operations: Option<Rate>,
    /// Bytes read and written.
    pub bytes: Option<Rate>,
}

/// Tokens of one kind. Time is given, in nanoseconds of any steady clock.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// In billionths; below zero on credit.
    level: i128,
    filled: u64,
}

impl Bucket {
    fn new(rate: Rate, now: u64) -> Self {
        let rate = Rate {
            per_second: rate.per_second.max(1),
            burst: rate.burst.max(1),
        };
        Self {
            rate,
            level: i128::from(rate.burst) * UNIT,
            filled: now,
        }
    }

    fn fill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        let more = i128::from(passed) * i128::from(self.rate.per_second);
        self.level = (self.level + more).min(i128::from(self.rate.burst) * UNIT);
    }

    /// Nanoseconds until there is a token; zero if there is one.
    fn wait(&self) -> u64 {
        let missing = UNIT - self.level;
        if missing <= 0 {
            return 0;
        }
        let rate = i128::from(self.rate.per_second);
        u64::try_from((missing + rate - 1) / rate).unwrap_or(u64::MAX)
    }

    fn take(&mut self, cost: u64) {
        self.level -= i128::from(cost) * UNIT;
    }

    /// Another rate. Credit is kept, and what was saved up is as long as the new burst allows.
    fn change(&mut self, rate: Rate, now: u64) {
        self.fill(now);
        let fresh = Self::new(rate, now);
        self.level = self.level.min(fresh.level);
        self.rate = fresh.rate;
    }
}

#[derive(Debug, Default)]
struct Buckets {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Buckets {
    fn set(&mut self, limits: &Limits, now: u64) {
        let put = |bucket: &mut Option<Bucket>, rate: Option<Rate>| match (bucket.as_mut(), rate) {
            (Some(bucket), Some(rate)) => bucket.change(rate, now),
            (_, rate) => *bucket = rate.map(|rate| Bucket::new(rate, now)),
        };
        put(&mut self.operations, limits.operations);
        put(&mut self.bytes, limits.bytes);
    }

    /// Takes what an operation of `bytes` costs, or says in how many nanoseconds to try again. With `credit` it is taken in any case.
    fn take(&mut self, bytes: u64, now: u64, credit: bool) -> Result<(), u64> {
        let mut kinds = [(&mut self.operations, 1), (&mut self.bytes, bytes)];
        let mut wait = 0;
        for bucket in kinds.iter_mut().filter_map(|(bucket, _)| bucket.as_mut()) {
            bucket.fill(now);
            wait = wait.max(bucket.wait());
        }
        if wait > 0 && !credit {
            return Err(wait);
        }
        for (bucket, cost) in &mut kinds {
            if let Some(bucket) = bucket {
                bucket.take(*cost);
            }
        }
        Ok(())
    }
}

/// The limits of one disk, shared by its queues. They can change at any time.
#[derive(Debug)]
pub(crate) struct Throttle {
    active: AtomicBool,
    limits: Mutex<Limits>,
    buckets: Mutex<Buckets>,
    /// The alarms of all queues, which look again when limits change.
    alarms: Mutex<Vec<Weak<File>>>,
    held: AtomicU64,
    started: Instant,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Throttle {
    pub(crate) fn new(limits: &Limits) -> Arc<Self> {
        let throttle = Self {
            active: AtomicBool::new(false),
            limits: Mutex::default(),
            buckets: Mutex::default(),
            alarms: Mutex::default(),
            held: AtomicU64::new(0),
            started: Instant::now(),
        };
        throttle.set(limits);
        Arc::new(throttle)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn limits(&self) -> Limits {
        *locked(&self.limits)
    }

    /// Operations that had to wait so far.
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Relaxed)
    }

    /// Changes the limits, for operations that wait already, too.
    pub(crate) fn set(&self, limits: &Limits) {
        *locked(&self.limits) = *limits;
        locked(&self.buckets).set(limits, self.now());
        self.active.store(*limits != Limits::default(), Relaxed);
        locked(&self.alarms).retain(|alarm| {
            let alarm = alarm.upgrade();
            if let Some(alarm) = &alarm {
                sys::set_alarm(alarm, 1);
            }
            alarm.is_some()
        });
    }

    fn take(&self, bytes: u64, credit: bool) -> Result<(), u64> {
        if !self.active.load(Relaxed) {
            return Ok(());
        }
        locked(&self.buckets).take(bytes, self.now(), credit)
    }
}

/// An operation that waits, with a copy of its list of buffers.
#[derive(Debug)]
struct Held {
    op: Op<'static>,
    bufs: Vec<IoBuf>,
    tag: u64,
}

/// A queue whose operations wait until they may go, in the order in which they came.
pub(crate) struct ThrottledQueue {
    inner: Box<dyn IoQueue>,
    throttle: Arc<Throttle>,
    held: VecDeque<Held>,
    /// Lists of buffers to use again.
    spare: Vec<Vec<IoBuf>>,
    alarm: Arc<File>,
}

impl ThrottledQueue {
    pub(crate) fn new(inner: Box<dyn IoQueue>, throttle: Arc<Throttle>) -> io::Result<Self> {
        let alarm = Arc::new(sys::alarm_file()?);
        locked(&throttle.alarms).push(Arc::downgrade(&alarm));
        Ok(Self {
            inner,
            throttle,
            held: VecDeque::new(),
            spare: Vec::new(),
            alarm,
        })
    }

    fn hold(&mut self, op: &Op<'_>, tag: u64) {
        let mut bufs = self.spare.pop().unwrap_or_default();
        bufs.clear();
        let op = match *op {
            Op::Read { offset, bufs: list } => {
                bufs.extend_from_slice(list);
                Op::Read { offset, bufs: &[] }
            }
            Op::Write {
                offset,
                bufs: list,
                durable,
            } => {
                bufs.extend_from_slice(list);
                Op::Write {
                    offset,
                    bufs: &[],
                    durable,
                }
            }
            Op::Flush => Op::Flush,
            Op::Discard { offset, len, durable } => Op::Discard { offset, len, durable },
            Op::WriteZeroes {
                offset,
                len,
                unmap,
                durable,
            } => Op::WriteZeroes {
                offset,
                len,
                unmap,
                durable,
            },
        };
        self.throttle.held.fetch_add(1, Relaxed);
        self.held.push_back(Held { op, bufs, tag });
    }

    /// Lets go what may go; with `credit`, all. Returns whether there was anything.
    fn release(&mut self, credit: bool) -> bool {
        let mut any = false;
        while let Some(first) = self.held.front() {
            if let Err(wait) = self.throttle.take(cost(&first.bufs), credit) {
                sys::set_alarm(&self.alarm, wait);
                break;
            }
            let Some(Held { op, bufs, tag }) = self.held.pop_front() else {
                break;
            };
            any = true;
            let op = match op {
                Op::Read { offset, .. } => Op::Read { offset, bufs: &bufs },
                Op::Write { offset, durable, .. } => Op::Write {
                    offset,
                    bufs: &bufs,
                    durable,
                },
                other => other,
            };
            // There is room: what is held counts as in flight.
            let _ = self.inner.submit(&op, tag);
            self.spare.push(bufs);
        }
        any
    }
}

fn cost(bufs: &[IoBuf]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

impl IoQueue for ThrottledQueue {
    fn submit(&mut self, op: &Op<'_>, tag: u64) -> Result<(), Full> {
        if self.in_flight() >= self.depth() {
            return Err(Full);
        }
        let bytes = match op {
            Op::Read { bufs, .. } | Op::Write { bufs, .. } => cost(bufs),
            _ => 0,
        };
        if !self.held.is_empty() {
            // Behind those that came before; the alarm is set.
            self.hold(op, tag);
            return Ok(());
        }
        match self.throttle.take(bytes, false) {
            Ok(()) => self.inner.submit(op, tag),
            Err(wait) => {
                self.hold(op, tag);
                sys::set_alarm(&self.alarm, wait);
                Ok(())
            }
        }
    }

    fn kick(&mut self) -> io::Result<()> {
        self.inner.kick()
    }

    fn completions(&mut self, done: &mut OnCompletion<'_>) -> usize {
        let count = self.inner.completions(done);
        if !self.held.is_empty() {
            // Fails when it has not gone off.
            let _ = (&*self.alarm).read(&mut [0; 8]);
            if self.release(false)
                && let Err(error) = self.inner.kick()
            {
                tracing::debug!(%error, "operations that waited are not taken now, trying again");
            }
        }
        count
    }

    fn ready(&mut self) -> bool {
        self.inner.ready() || !self.held.is_empty() && sys::is_readable(self.alarm.as_fd())
    }

    fn drain(&mut self, done: &mut OnCompletion<'_>) -> io::Result<()> {
        // Whoever stops a queue does not wait for its limits. What it takes too much is credit.
        self.release(true);
        self.inner.kick()?;
        self.inner.drain(done)
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.inner.completion_fd()
    }

    fn alarm_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.alarm.as_fd())
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn backend(&self) -> &'static str {
        self.inner.backend()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Does as many operations of `bytes` as it may until `end`, and returns how many.
    fn run(buckets: &mut Buckets, bytes: u64, mut now: u64, end: u64) -> u64 {
        let mut count = 0;
        while now < end {
            match buckets.take(bytes, now, false) {
                Ok(()) => count += 1,
                Err(wait) => {
                    assert!(wait > 0);
                    // As an alarm does it: not before, and a little late.
                    now += wait + 150;
                }
            }
        }
        count
    }

    fn buckets(operations: Option<Rate>, bytes: Option<Rate>) -> Buckets {
        let mut buckets = Buckets::default();
        buckets.set(&Limits { operations, bytes }, 0);
        buckets
    }

    #[test]
    fn a_limit_is_kept_to_the_operation() {
        for (per_second, burst) in [(1, 1), (7, 1), (1000, 1), (1000, 250), (123_457, 10), (1_000_000, 1)] {
            let mut limited = buckets(Some(Rate { per_second, burst }), None);
            let count = run(&mut limited, 4096, 0, 10 * SECOND);
            let exact = burst + 10 * per_second;
            assert!(count <= exact, "{count} of {exact}");
            // Alarms that go off late lose nothing, unless the burst is too short to make up for it.
            let lost = if burst > 1 {
                1
            } else {
                1 + exact * per_second / 5_000_000
            };
            assert!(count + lost >= exact, "{count} of {exact}");
        }
    }

    #[test]
    fn bytes_are_counted_whatever_they_come_in() {
        let rate = Rate {
            per_second: 100 << 20,
            burst: 1 << 20,
        };
        for size in [512, 4096, 65_536, 1 << 20, 3 << 20] {
            let moved = run(&mut buckets(None, Some(rate)), size, 0, 10 * SECOND) * size;
            let exact = rate.burst + 10 * rate.per_second;
            assert!(
                moved <= exact + size && moved + size + (64 << 10) >= exact,
                "{moved} of {exact} by {size}"
            );
        }
    }

    #[test]
    fn a_burst_is_saved_up_and_no_more() {
        let mut limited = buckets(
            Some(Rate {
                per_second: 100,
                burst: 30,
            }),
            None,
        );
        assert_eq!(run(&mut limited, 0, 0, 1), 30);
        // An hour of rest, and a moment of work.
        assert_eq!(run(&mut limited, 0, 3600 * SECOND, 3600 * SECOND + 1), 30);
    }

    #[test]
    fn a_change_counts_at_once() {
        let slow = |per_second| Limits {
            operations: Some(Rate { per_second, burst: 1 }),
            bytes: None,
        };
        let mut limited = Buckets::default();
        limited.set(&slow(1), 0);
        assert_eq!(limited.take(0, 0, false), Ok(()));
        assert_eq!(limited.take(0, 0, false), Err(SECOND));
        limited.set(&slow(1000), 0);
        assert_eq!(limited.take(0, 0, false), Err(1_000_000));
        limited.set(&Limits::default(), 0);
        assert_eq!(limited.take(0, 0, false), Ok(()));
    }

    #[test]
    fn credit_is_paid_back() {
        let mut limited = buckets(
            Some(Rate {
                per_second: 10,
                burst: 1,
            }),
            None,
        );
        for _ in 0..11 {
            assert_eq!(limited.take(0, 0, true), Ok(()));
        }
        assert_eq!(limited.take(0, 0, false), Err(11 * SECOND / 10));
    }
}
