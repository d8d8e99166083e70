//! Token buckets, on a clock that the caller reads.

use serde::{Deserialize, Serialize};

const SECOND: u64 = 1_000_000_000;

/// How much may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Units per second, at least 1.
    pub per_second: u64,
    /// Units that may pass at once after a pause.
    pub burst: u64,
}

/// A bucket that fills with time. One packet may take more than is left, and the next ones wait until that is paid back, so packets
/// larger than the burst pass too and the rate holds all the same.
#[derive(Debug, Clone)]
pub struct Bucket {
    rate: Rate,
    /// Units left; negative ones are owed.
    level: i64,
    /// Until when (ns) it was filled.
    filled: u64,
}

impl Bucket {
    /// A full one, at time `now` (ns).
    pub fn new(rate: Rate, now: u64) -> Self {
        let rate = Rate {
            per_second: rate.per_second.max(1),
            burst: rate.burst.clamp(1, i64::MAX as u64 / 2),
        };
        Self {
            rate,
            level: rate.burst as i64,
            filled: now,
        }
    }

    /// What it was made with.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    fn fill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.filled);
        let earned = u128::from(elapsed) * u128::from(self.rate.per_second) / u128::from(SECOND);
        let missing = (self.rate.burst as i64 - self.level) as u128;
        if earned >= missing {
            self.level = self.rate.burst as i64;
            self.filled = self.filled.max(now);
            return;
        }
        self.level += earned as i64;
        // Only as much time passes as whole units took, or a slow bucket would never fill.
        self.filled += (earned * u128::from(SECOND) / u128::from(self.rate.per_second)) as u64;
    }

    /// Whether something may pass at `now` (ns); if not, in how many nanoseconds it may.
    pub fn check(&mut self, now: u64) -> Result<(), u64> {
        self.fill(now);
        if self.level > 0 {
            return Ok(());
        }
        let owed = (1 - self.level) as u128;
        let wait = (owed * u128::from(SECOND)).div_ceil(u128::from(self.rate.per_second));
        let since = now.saturating_sub(self.filled);
        Err(u64::try_from(wait).unwrap_or(u64::MAX).saturating_sub(since).max(1))
    }

    /// Takes `units` for what passed.
    pub fn take(&mut self, units: u64) {
        let units = i64::try_from(units).unwrap_or(i64::MAX);
        // Debt is bounded, so that nothing overflows.
        self.level = self.level.saturating_sub(units).max(i64::MIN / 2);
    }
}

/// Limits of one direction of a port; each may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes of frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
    /// Packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<Rate>,
}

/// The buckets of a [`Limit`].
#[derive(Debug, Clone, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

impl Limiter {
    /// Full buckets.
    pub fn new(limit: &Limit, now: u64) -> Self {
        Self {
            bytes: limit.bytes.map(|rate| Bucket::new(rate, now)),
            packets: limit.packets.map(|rate| Bucket::new(rate, now)),
        }
    }

    /// Whether the next packet may pass; if not, in how many nanoseconds.
    pub fn check(&mut self, now: u64) -> Result<(), u64> {
        let wait = |bucket: &mut Option<Bucket>| bucket.as_mut().and_then(|b| b.check(now).err());
        match (wait(&mut self.bytes), wait(&mut self.packets)) {
            (None, None) => Ok(()),
            (a, b) => Err(a.unwrap_or(0).max(b.unwrap_or(0))),
        }
    }

    /// Counts a packet that passed.
    pub fn take(&mut self, packets: u64, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.packets {
            bucket.take(packets);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: Rate = Rate {
        per_second: 1000,
        burst: 10,
    };

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut bucket = Bucket::new(RATE, 5);
        for _ in 0..10 {
            bucket.check(5).expect("burst");
            bucket.take(1);
        }
        assert_eq!(bucket.check(5), Err(1_000_000));
        assert_eq!(bucket.check(400_005), Err(600_000));
        bucket.check(1_000_005).expect("one more");
        bucket.take(1);
        assert_eq!(bucket.check(1_000_005), Err(1_000_000));
        // A long pause earns a burst and no more.
        for _ in 0..10 {
            bucket.check(u64::MAX / 2).expect("burst");
            bucket.take(1);
        }
        bucket.check(u64::MAX / 2).expect_err("empty");
    }

    #[test]
    fn what_is_larger_than_the_burst_is_paid_back() {
        let mut bucket = Bucket::new(RATE, 0);
        bucket.take(1010);
        assert_eq!(bucket.check(0), Err(1_001_000_000));
        bucket.check(1_001_000_000).expect("paid back");
    }

    proptest! {
        #[test]
        fn no_schedule_beats_the_rate(
            per_second in 1u64..5_000_000_000, burst in 1u64..100_000,
            steps in prop::collection::vec((0u64..20_000_000, 1u64..70_000), 1..200),
        ) {
            let mut bucket = Bucket::new(Rate { per_second, burst }, 0);
            let (mut now, mut passed, mut largest) = (0, 0u128, 0);
            for (pause, size) in steps {
                now += pause;
                if bucket.check(now).is_ok() {
                    bucket.take(size);
                    passed += u128::from(size);
                    largest = largest.max(size);
                }
                let earned = u128::from(now) * u128::from(per_second) / 1_000_000_000;
                prop_assert!(passed <= u128::from(burst) + earned + u128::from(largest));
            }
        }

        #[test]
        fn who_waits_as_long_as_told_passes(
            per_second in 1u64..5_000_000_000, burst in 1u64..100_000, sizes in prop::collection::vec(1u64..70_000, 1..100),
        ) {
            let mut bucket = Bucket::new(Rate { per_second, burst }, 0);
            let mut now = 0;
            for size in sizes {
                if let Err(wait) = bucket.check(now) {
                    prop_assert!(wait == 1 || bucket.check(now + wait - 1).is_err());
                    now += wait;
                    prop_assert_eq!(bucket.check(now), Ok(()));
                }
                bucket.take(size);
            }
        }
    }
}
