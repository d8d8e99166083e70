//! The arithmetic of time stamp counters: what a guest's counts when the host's counts something.
//!
//! A guest's counter is the host's, scaled, and something more: `scaled(host) + offset`. KVM tells the offset since Linux 5.16, and
//! never the scale, which is therefore taken from the counters themselves. One that runs as fast as the host's is known exactly.

use std::time::Duration;

use super::{ClockV1, TscV1};
use crate::common::state::ticks;

/// A guest's counter and the host's at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counter {
    /// The host's.
    host: u64,
    /// The guest's.
    guest: u64,
    /// What the guest's is more than the scaled one of the host.
    offset: Option<u64>,
}

impl Counter {
    /// The counter that was `guest` at a moment between those when the host's was `before` and `after`.
    pub(super) fn read(guest: u64, [before, after]: [u64; 2], offset: Option<u64>) -> Self {
        let unscaled = offset.map(|offset| guest.wrapping_sub(offset));
        let exact = unscaled.filter(|host| (before..=after).contains(host));
        Self {
            host: exact.unwrap_or_else(|| middle([before, after])),
            guest,
            offset,
        }
    }

    /// The one that was saved.
    pub(super) fn saved(tsc: &TscV1) -> Self {
        Self {
            host: tsc.host,
            guest: tsc.value,
            offset: tsc.offset,
        }
    }

    /// The host's when it was read.
    pub(super) fn host(&self) -> u64 {
        self.host
    }

    /// What it counts when the host's counts `host`. Without an offset it runs as fast as that.
    pub(super) fn at(&self, host: u64) -> u64 {
        match self.offset {
            Some(offset) => self.scale(host, offset).wrapping_add(offset),
            None => self.guest.wrapping_add(host.wrapping_sub(self.host)),
        }
    }

    /// By how much it has to be more than the scaled one of the host, so that it counts `guest` when the host's counts `host`. `None` where
    /// that cannot be set.
    pub(super) fn offset_for(&self, guest: u64, host: u64) -> Option<u64> {
        let offset = self.offset?;
        Some(guest.wrapping_sub(self.scale(host, offset)))
    }

    fn scale(&self, host: u64, offset: u64) -> u64 {
        let scaled = self.guest.wrapping_sub(offset);
        if scaled == self.host || self.host == 0 {
            return host;
        }
        (u128::from(host) * u128::from(scaled) / u128::from(self.host)) as u64
    }
}

/// The moment between two.
pub(super) fn middle([before, after]: [u64; 2]) -> u64 {
    before.wrapping_add(after.wrapping_sub(before) / 2)
}

/// What the counters `saved` with `clock` are to count when the guest's clock is `passed` later than it was.
///
/// Those of a guest with several vCPUs are of one instant, that of the clock, and differ from one another as they did.
pub(super) fn later(saved: &[&TscV1], clock: &ClockV1, passed: Duration) -> Vec<u64> {
    let Some(first) = saved.first() else {
        return Vec::new();
    };
    let when = |tsc: &TscV1| Counter::saved(tsc).at(clock.host_tsc);
    let base = when(first);
    let one = |tsc: &&TscV1| {
        let then = match (tsc.offset, first.offset) {
            (Some(offset), Some(first)) => base.wrapping_add(offset.wrapping_sub(first)),
            _ => when(tsc),
        };
        then.wrapping_add(ticks(passed, u64::from(tsc.khz.unwrap_or(0)) * 1000))
    };
    saved.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KHZ: u32 = 2_000_000;

    /// What KVM makes of a counter: a ratio with 32 bits behind the point, as on AMD, and an offset.
    fn kvm(host: u64, ratio: u64, offset: u64) -> u64 {
        ((u128::from(host) * u128::from(ratio)) >> 32) as u64 + offset
    }

    fn saved(host: u64, ratio: u64, offset: u64) -> TscV1 {
        let value = kvm(host, ratio, offset);
        let read = Counter::read(value, [host - 300, host + 500], Some(offset));
        TscV1 {
            value,
            host: read.host(),
            offset: Some(offset),
            khz: Some(KHZ),
            deadline: None,
        }
    }

    #[test]
    fn a_counter_that_runs_as_the_hosts_is_known_exactly() {
        let tsc = saved(1 << 50, 1 << 32, 12_345);
        assert_eq!(tsc.host, 1 << 50, "not the middle");
        let counter = Counter::saved(&tsc);
        assert_eq!(counter.at((1 << 50) + 1_000_000_007), (1 << 50) + 1_000_012_352);
        assert_eq!(counter.offset_for(77, 1 << 40), Some(77_u64.wrapping_sub(1 << 40)));
    }

    #[test]
    fn without_an_offset_it_goes_on_as_fast_as_the_hosts() {
        let counter = Counter::read(500, [1000, 1010], None);
        assert_eq!(counter.host(), 1005);
        assert_eq!((counter.at(1105), counter.at(1000)), (600, 495));
        assert_eq!(counter.offset_for(1, 2), None);
    }

    #[test]
    fn vcpus_are_of_the_instant_of_the_clock() {
        // The second one was read a second after the first, the clock another one later.
        let second = u64::from(KHZ) * 1000;
        let start = 1_u64 << 45;
        let all = [saved(start, 1 << 32, 100), saved(start + second, 1 << 32, 107)];
        let clock = ClockV1 {
            guest_ns: 5,
            host_ns: 9,
            host_tsc: start + 2 * second,
        };
        let all: Vec<&TscV1> = all.iter().collect();
        let then = start + 2 * second + 100;
        assert_eq!(later(&all, &clock, Duration::ZERO), [then, then + 7]);
        let passed = later(&all, &clock, Duration::from_millis(1500));
        assert_eq!(passed, [then + 3 * second / 2, then + 3 * second / 2 + 7]);
        assert!(later(&[], &clock, Duration::ZERO).is_empty());
    }

    #[test]
    fn counters_of_old_kernels_are_brought_to_one_instant_too() {
        let at = |value, host| TscV1 {
            value,
            host,
            offset: None,
            khz: None,
            deadline: None,
        };
        let clock = ClockV1 {
            host_tsc: 10_000,
            ..ClockV1::default()
        };
        let (first, second) = (at(100, 9000), at(150, 9050));
        assert_eq!(later(&[&first, &second], &clock, Duration::from_secs(1)), [1100, 1100]);
    }

    proptest! {
        /// A guest goes from a host to another, whose counters run at other frequencies: its own goes on within a microsecond of where it was.
        #[test]
        fn it_goes_on_where_it_was_whatever_the_scales(
            host in 1_u64 << 40..1 << 58,
            there in 1_u64 << 40..1 << 58,
            gap in 0_u64..1 << 35,
            waited in 0_u64..1 << 35,
            ratio in 1_u64 << 31..1 << 33,
            other in 1_u64 << 31..1 << 33,
            offset in 0_u64..1 << 60,
        ) {
            let tsc = saved(host, ratio, offset);
            let clock = ClockV1 { host_tsc: host + gap, ..ClockV1::default() };
            let [wanted] = later(&[&tsc], &clock, Duration::ZERO)[..] else { panic!("one") };
            let exact = kvm(host + gap, ratio, offset);
            prop_assert!(wanted.abs_diff(exact) < 2000, "{wanted} {exact}");
            let here = Counter::read(kvm(there, other, 0), [there - 300, there + 500], Some(0));
            let set = here.offset_for(wanted, there + waited).unwrap();
            let counts = ((u128::from(there + waited) * u128::from(other)) >> 32) as u64;
            let counts = counts.wrapping_add(set);
            prop_assert!(counts.abs_diff(wanted) < 2000, "{counts} {wanted}");
        }

        #[test]
        fn no_state_is_too_strange(
            numbers: [u64; 6],
            offset: Option<u64>,
            khz: Option<u32>,
            ns: u64,
        ) {
            let [value, host, host_tsc, guest, before, after] = numbers;
            let tsc = TscV1 { value, host, offset, khz, deadline: None };
            let clock = ClockV1 { host_tsc, ..ClockV1::default() };
            let first = TscV1::default();
            prop_assert_eq!(later(&[&first, &tsc], &clock, Duration::from_nanos(ns)).len(), 2);
            let read = Counter::read(guest, [before, after], offset);
            prop_assert_eq!(read.offset_for(value, host).is_some(), offset.is_some());
        }
    }
}
