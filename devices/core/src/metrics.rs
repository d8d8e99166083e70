//! What the parts of the VMM count, and how: a counter hangs on the object it counts, is written where things happen and read from
//! any other thread without a lock. Each value is exact by itself; several together are not one instant's picture.
//!
//! Counters that different threads write belong into different [`Padded`] values, or the threads slow each other down.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A number that only grows, from zero when the object was made.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that rises and falls.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// One more.
    pub fn up(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// One less.
    pub fn down(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    /// How many now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Buckets of a [`Histogram`] beside the last one, which has no bound.
pub const BUCKETS: usize = 19;

/// Upper bounds of a [`Histogram`]'s buckets in nanoseconds: 10 µs to 10 s, three a decade. A duration that equals a bound belongs to
/// its bucket.
pub const BUCKET_BOUNDS: [u64; BUCKETS] = {
    let mut bounds = [0; BUCKETS];
    let (mut decade, mut i) = (10_000, 0);
    while i < BUCKETS {
        bounds[i] = match i % 3 {
            0 => decade,
            1 => decade * 5 / 2,
            _ => decade * 5,
        };
        if i % 3 == 2 {
            decade *= 10;
        }
        i += 1;
    }
    bounds
};

/// How long things took: how many fell between which bounds, and the shortest, the longest and the sum.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS + 1],
    sum: AtomicU64,
    min: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: Default::default(),
            sum: AtomicU64::new(0),
            min: AtomicU64::new(u64::MAX),
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts one that took `time`.
    pub fn observe(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BUCKET_BOUNDS.partition_point(|bound| *bound < nanos);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(nanos, Relaxed);
        self.min.fetch_min(nanos, Relaxed);
        self.max.fetch_max(nanos, Relaxed);
    }

    /// What was counted so far.
    pub fn read(&self) -> Latencies {
        let mut latencies = Latencies {
            sum: self.sum.load(Relaxed),
            min: self.min.load(Relaxed),
            max: self.max.load(Relaxed),
            ..Latencies::default()
        };
        for (to, from) in latencies.buckets.iter_mut().zip(&self.buckets) {
            *to = from.load(Relaxed);
        }
        latencies
    }
}

/// What a [`Histogram`] counted, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latencies {
    /// How many fell into each bucket of [`BUCKET_BOUNDS`] and not into the ones before; the last counts those above all bounds.
    pub buckets: [u64; BUCKETS + 1],
    /// All of them together.
    pub sum: u64,
    /// The shortest; meaningless while [`count`](Self::count) is 0.
    pub min: u64,
    /// The longest.
    pub max: u64,
}

impl Default for Latencies {
    /// None at all.
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS + 1],
            sum: 0,
            min: u64::MAX,
            max: 0,
        }
    }
}

impl Latencies {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Adds those of `other`.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in self.buckets.iter_mut().zip(&other.buckets) {
            *to += from;
        }
        self.sum = self.sum.wrapping_add(other.sum);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }
}

/// A value whose cache lines belong to nothing else (two lines: processors fetch them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Padded<T>(T);

impl<T> Padded<T> {
    /// `value`, padded.
    pub const fn new(value: T) -> Self {
        Self(value)
    }
}

impl<T> Deref for Padded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_rise_from_ten_microseconds_to_ten_seconds() {
        assert_eq!(BUCKET_BOUNDS[..4], [10_000, 25_000, 50_000, 100_000]);
        assert_eq!(BUCKET_BOUNDS[BUCKETS - 1], 10_000_000_000);
        assert!(BUCKET_BOUNDS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_duration_falls_into_the_first_bucket_it_does_not_exceed() {
        let histogram = Histogram::default();
        for nanos in [0, 10_000, 10_001, 25_000, 10_000_000_000, 10_000_000_001] {
            histogram.observe(Duration::from_nanos(nanos));
        }
        let seen = histogram.read();
        assert_eq!(seen.buckets[..3], [2, 2, 0]);
        assert_eq!(seen.buckets[BUCKETS - 1..], [1, 1]);
        assert_eq!((seen.count(), seen.min, seen.max), (6, 0, 10_000_000_001));
        assert_eq!(seen.sum, 20_000_045_002);
    }

    #[test]
    fn an_endless_duration_overflows_nothing() {
        let histogram = Histogram::default();
        histogram.observe(Duration::MAX);
        assert_eq!(histogram.read().buckets[BUCKETS], 1);
        assert_eq!(histogram.read().max, u64::MAX);
    }

    #[test]
    fn sums_keep_the_extremes() {
        let (first, second) = (Histogram::default(), Histogram::default());
        first.observe(Duration::from_micros(3));
        second.observe(Duration::from_millis(1));
        let mut sum = Latencies::default();
        for histogram in [&first, &second, &Histogram::default()] {
            sum.add(&histogram.read());
        }
        assert_eq!(
            (sum.count(), sum.sum, sum.min, sum.max),
            (2, 1_003_000, 3000, 1_000_000)
        );
    }

    #[test]
    fn padded_values_share_no_line() {
        let values = [Padded::new(Counter::default()), Padded::default()];
        let at = |i: usize| (&raw const values[i]).addr();
        assert_eq!((at(0) % 128, at(1) - at(0)), (0, 128));
    }
}
