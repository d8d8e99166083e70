//! How long a worker looks for work before it sleeps.
//!
//! Being woken costs a few microseconds at both ends: the driver's notification leaves the guest, and the scheduler runs the worker. A
//! worker that still looks is spared both. But looking takes a processor, so it is done only for as long as work has lately come within
//! the time that is allowed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The shortest look: less is over before a driver has handled a completion.
const FIRST: Duration = Duration::from_micros(8);

/// How long to look, between nothing at all and the longest time allowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    longest: Duration,
    now: Duration,
}

impl Window {
    /// Nothing yet, `longest` at most.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            longest,
            now: Duration::ZERO,
        }
    }

    /// Whether looking is allowed at all.
    pub(super) fn is_allowed(&self) -> bool {
        !self.longest.is_zero()
    }

    /// How long to look the next time.
    pub(super) fn now(&self) -> Duration {
        self.now
    }

    /// Work came after `waited`, of which the worker looked for as long as it was to and slept for the rest.
    pub(super) fn adapt(&mut self, waited: Duration) {
        if waited <= self.now {
            // The look found it.
        } else if waited <= self.longest {
            // A longer one would have.
            self.now = (self.now * 2).max(FIRST).min(self.longest);
        } else {
            // None would have.
            self.now /= 2;
            if self.now < FIRST {
                self.now = Duration::ZERO;
            }
        }
    }
}

/// What came of looking, over all queues of a disk.
#[derive(Debug, Default)]
pub(super) struct Looks {
    found: AtomicU64,
    vain: AtomicU64,
}

/// What came of looking for work before sleeping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LookCounters {
    /// How often there was some, and nobody had to be woken.
    pub found: u64,
    /// How often there was none.
    pub vain: u64,
}

impl Looks {
    /// One more look that found something, or did not.
    pub(super) fn count(&self, found: bool) {
        let counter = if found { &self.found } else { &self.vain };
        counter.fetch_add(1, Relaxed);
    }

    pub(super) fn read(&self) -> LookCounters {
        LookCounters {
            found: self.found.load(Relaxed),
            vain: self.vain.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    #[test]
    fn the_window_grows_while_a_longer_look_would_have_found_work() {
        let mut window = Window::new(us(100));
        assert!(window.is_allowed());
        assert_eq!(window.now(), us(0));
        for expected in [8, 16, 32, 64, 100, 100] {
            window.adapt(us(100));
            assert_eq!(window.now(), us(expected));
        }
    }

    #[test]
    fn what_a_look_found_changes_nothing() {
        let mut window = Window::new(us(100));
        window.adapt(us(50));
        window.adapt(us(50));
        for waited in [0, 1, 15, 16] {
            window.adapt(us(waited));
            assert_eq!(window.now(), us(16));
        }
        window.adapt(us(17));
        assert_eq!(window.now(), us(32));
    }

    #[test]
    fn the_window_shrinks_to_nothing_when_no_look_would_have_found_work() {
        let mut window = Window::new(us(100));
        (0..8).for_each(|_| window.adapt(us(100)));
        for expected in [50, 25, 12, 0, 0] {
            window.adapt(us(101));
            assert_eq!(window.now(), if expected == 12 { us(25) / 2 } else { us(expected) });
        }
        // And it comes back.
        window.adapt(us(3));
        assert_eq!(window.now(), us(8));
    }

    #[test]
    fn without_time_there_is_no_look() {
        let mut window = Window::new(Duration::ZERO);
        assert!(!window.is_allowed());
        for waited in [us(0), us(1), us(1000), Duration::MAX] {
            window.adapt(waited);
            assert_eq!(window.now(), Duration::ZERO);
        }
        // Less than the shortest look is all there is.
        let mut window = Window::new(us(3));
        window.adapt(us(2));
        assert_eq!(window.now(), us(3));
        window.adapt(us(4));
        assert_eq!(window.now(), us(0));
    }
}
