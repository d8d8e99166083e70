//! Time from the processor's counter.

use crate::arch::clock::khz;
pub use crate::arch::clock::ticks;

/// Nanoseconds in `ticks` of the counter.
pub fn nanoseconds(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(khz())) as u64
}

/// Ticks in so many milliseconds.
pub fn ticks_of_ms(ms: u64) -> u64 {
    ms * khz()
}

/// A moment to give up at.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    /// So many milliseconds from now.
    pub fn after_ms(ms: u64) -> Self {
        Self(ticks() + ticks_of_ms(ms))
    }

    /// So many microseconds from now.
    pub fn after_us(us: u64) -> Self {
        Self(ticks() + us * khz() / 1000)
    }

    /// Nanoseconds left for one sleep, at most 4 seconds; `None` when the moment has passed.
    pub fn left(self) -> Option<u32> {
        let now = ticks();
        (now < self.0).then(|| nanoseconds(self.0 - now).clamp(1000, 4_000_000_000) as u32)
    }
}
