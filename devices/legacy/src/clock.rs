//! Time as the devices here see it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tells the time. Devices take it from here, so that tests decide what time it is.
pub trait Clock: Send + Sync {
    /// Time of day: since 1970-01-01 00:00 UTC.
    fn time_of_day(&self) -> Duration;
    /// Time that never jumps, since some moment in the past.
    fn monotonic(&self) -> Duration;
}

/// The host's clocks.
pub struct HostClock(Instant);

impl HostClock {
    /// Monotonic time counts from now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn time_of_day(&self) -> Duration {
        // A host clock before 1970 shows the guest 1970.
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock that stands still until told otherwise.
#[cfg(test)]
#[derive(Default)]
pub(crate) struct ManualClock(std::sync::atomic::AtomicU64);

#[cfg(test)]
impl ManualClock {
    pub(crate) fn at(nanoseconds: u64) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self(nanoseconds.into()))
    }
    pub(crate) fn set(&self, nanoseconds: u64) {
        self.0.store(nanoseconds, std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(test)]
impl Clock for ManualClock {
    fn time_of_day(&self) -> Duration {
        Duration::from_nanos(self.0.load(std::sync::atomic::Ordering::SeqCst))
    }
    fn monotonic(&self) -> Duration {
        self.time_of_day()
    }
}
