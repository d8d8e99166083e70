//! Keeps what a guest can make us log from filling the host's disk.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Lets `burst` lines through per `interval`; the rest are counted.
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    start: Instant,
    window: AtomicU64,
    used: AtomicU32,
    dropped: AtomicU64,
}

impl RateLimit {
    /// A limit of `burst` lines per `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self {
            burst,
            interval,
            start: Instant::now(),
            window: AtomicU64::new(0),
            used: AtomicU32::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// `Some(n)` when a line may be written; `n` is how many were held back since the last one.
    pub fn admit(&self) -> Option<u64> {
        let interval = self.interval.as_millis().max(1);
        let now = (self.start.elapsed().as_millis() / interval) as u64;
        if self.window.swap(now, Ordering::Relaxed) != now {
            self.used.store(0, Ordering::Relaxed);
        }
        if self.used.fetch_add(1, Ordering::Relaxed) < self.burst {
            Some(self.dropped.swap(0, Ordering::Relaxed))
        } else {
            self.used.store(self.burst, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

impl Default for RateLimit {
    /// Ten lines per ten seconds: what the devices use.
    fn default() -> Self {
        Self::new(10, Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admits_a_burst_and_counts_the_rest() {
        let limit = RateLimit::new(2, Duration::from_millis(40));
        assert_eq!(limit.admit(), Some(0));
        assert_eq!(limit.admit(), Some(0));
        let held = (0..5).filter(|_| limit.admit().is_none()).count() as u64;
        std::thread::sleep(Duration::from_millis(90));
        assert_eq!(limit.admit(), Some(held));
    }
}
