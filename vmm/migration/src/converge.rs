//! When the guest is switched over, and what is done if that moment does not come by itself.

use std::time::Duration;

/// What a migration must keep to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How long the guest may be paused.
    pub downtime: Duration,
    /// What of that goes to saving, sending and restoring its state, beside memory.
    pub state_time: Duration,
    /// By how many percent its vCPUs may be slowed down; 0: not at all.
    pub max_throttle: u8,
    /// How long the copying may take; `None`: as long as it does.
    pub time: Option<Duration>,
    /// What happens after that.
    pub on_time_out: OnTimeOut,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            state_time: Duration::from_millis(20),
            max_throttle: 0,
            time: Some(Duration::from_secs(3600)),
            on_time_out: OnTimeOut::Fail,
        }
    }
}

/// What happens when the time for copying is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnTimeOut {
    /// The migration ends, and the guest stays.
    Fail,
    /// The guest is switched over, however long it is paused.
    Switch,
    /// It is switched over with what is there; the rest of its memory follows.
    PostCopy,
}

/// What was measured when a round was over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    /// Since when memory is copied.
    pub(crate) elapsed: Duration,
    /// Bytes that were written meanwhile: the next round.
    pub(crate) remaining: u64,
    /// Bytes that devices have beside that, about.
    pub(crate) devices: u64,
    /// As `remaining`, of the round before; `None` after the first.
    pub(crate) before: Option<u64>,
    /// Bytes that go a second; 0: nothing was sent yet.
    pub(crate) rate: f64,
    /// By how many percent vCPUs are slowed down.
    pub(crate) throttle: u8,
    /// What of a pause goes to anything but that, as was seen in one that came to nothing.
    pub(crate) pause: Duration,
    /// The guest was paused when the time was over, and runs on since the promise would not have been kept.
    pub(crate) retreated: bool,
}

impl Measured {
    /// Bytes that are sent while the guest is paused.
    pub(crate) fn paused(&self) -> u64 {
        self.remaining.saturating_add(self.devices)
    }

    /// Whether the promise could be kept if the guest wrote no memory at all.
    pub(crate) fn may_keep(&self, limits: &Limits) -> bool {
        let expected = expected_downtime(self.devices, self.rate, limits.state_time + self.pause);
        expected.is_some_and(|expected| expected <= limits.downtime)
    }
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Pause the guest.
    Switch,
    /// Pause it, whatever that means for the promise.
    SwitchAnyway,
    /// Copy what was written.
    Again,
    /// The same, with vCPUs slowed down by so many percent.
    Throttle(u8),
    /// Pause it, and let it run before all of its memory is there.
    PostCopy,
    /// It takes too long.
    TimedOut,
}

/// What takes no longer to be sent is not worth another round.
const SHORT: Duration = Duration::from_millis(2);

/// By how many percent vCPUs are slowed down the first time, and further each time that did not help.
const FIRST_THROTTLE: u8 = 20;
const NEXT_THROTTLE: u8 = 10;

/// How long the guest is paused with `remaining` bytes to be sent. Unknown while nothing was measured, unless there is nothing.
pub(crate) fn expected_downtime(remaining: u64, rate: f64, state_time: Duration) -> Option<Duration> {
    if remaining == 0 {
        return Some(state_time);
    }
    let seconds = remaining as f64 / rate;
    // More than a year is as good as never.
    (rate > 0.0).then(|| state_time + Duration::from_secs_f64(seconds.min(3e7)))
}

pub(crate) fn decide(measured: &Measured, limits: &Limits) -> Decision {
    let expected = expected_downtime(measured.paused(), measured.rate, limits.state_time + measured.pause);
    let late = limits.time.is_some_and(|time| measured.elapsed >= time);
    let nothing = measured.paused() == 0 && measured.pause.is_zero();
    let kept = expected.is_some_and(|expected| expected <= limits.downtime) || nothing;
    // What turned out to be wrong when the time was over is not tried again.
    let kept = kept && !(late && measured.retreated);
    if kept && (late || !is_worth_another(measured)) {
        return Decision::Switch;
    }
    if late {
        return match limits.on_time_out {
            OnTimeOut::Fail => Decision::TimedOut,
            OnTimeOut::Switch => Decision::SwitchAnyway,
            OnTimeOut::PostCopy => Decision::PostCopy,
        };
    }
    // Every round should leave clearly less than the one before; what stays the same does not end.
    let shrinks = measured
        .before
        .is_none_or(|before| measured.remaining <= before / 4 * 3);
    let more = match measured.throttle {
        0 => FIRST_THROTTLE,
        percent => percent.saturating_add(NEXT_THROTTLE),
    };
    let more = more.min(limits.max_throttle).min(99);
    // Slower vCPUs do not make what else a pause takes any shorter.
    let helps = measured.pause.is_zero() && measured.devices == 0 || measured.may_keep(limits);
    match !shrinks && helps && more > measured.throttle {
        true => Decision::Throttle(more),
        false => Decision::Again,
    }
}

/// Whether the guest would be paused for clearly less after one more round, which costs it nothing. As each must halve what is left, there
/// is an end to that.
fn is_worth_another(measured: &Measured) -> bool {
    let long = measured.remaining as f64 / measured.rate > SHORT.as_secs_f64();
    long && measured.before.is_none_or(|before| measured.remaining <= before / 2)
}

/// Bytes a second, of the last rounds: each counts half of the one after it.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    bytes: f64,
    seconds: f64,
    /// How many bytes a second might be sent in the last round.
    cap: Option<u64>,
}

impl Rate {
    pub(crate) fn add(&mut self, bytes: u64, time: Duration, cap: Option<u64>) {
        self.bytes = self.bytes / 2.0 + bytes as f64;
        self.seconds = self.seconds / 2.0 + time.as_secs_f64();
        self.cap = cap;
    }

    /// What becomes of `rate` when no more than `cap` may be sent from now on. What goes as a few bytes of its own goes so then, too.
    pub(crate) fn under(&self, rate: f64, cap: Option<u64>) -> f64 {
        match (self.cap, cap) {
            (Some(before), Some(now)) if now < before => rate * (now as f64 / before as f64),
            (None, Some(now)) => rate.min(now as f64),
            _ => rate,
        }
    }

    pub(crate) fn get(&self) -> f64 {
        match self.seconds > 0.0 {
            true => self.bytes / self.seconds,
            false => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn after(remaining: u64, before: Option<u64>, throttle: u8) -> Measured {
        Measured {
            elapsed: Duration::from_secs(10),
            remaining: remaining * MIB,
            devices: 0,
            before: before.map(|bytes| bytes * MIB),
            rate: (1000 * MIB) as f64,
            throttle,
            pause: Duration::ZERO,
            retreated: false,
        }
    }

    fn limits() -> Limits {
        Limits {
            downtime: Duration::from_millis(120),
            state_time: Duration::from_millis(20),
            max_throttle: 45,
            time: Some(Duration::from_secs(60)),
            on_time_out: OnTimeOut::Fail,
        }
    }

    #[test]
    fn it_switches_when_the_promise_can_be_kept() {
        assert_eq!(decide(&after(100, Some(150), 0), &limits()), Decision::Switch);
        assert_eq!(decide(&after(101, Some(150), 0), &limits()), Decision::Again);
        assert_eq!(decide(&after(0, Some(0), 0), &limits()), Decision::Switch);
        let unmeasured = Measured {
            rate: 0.0,
            ..after(1, None, 0)
        };
        assert_eq!(decide(&unmeasured, &limits()), Decision::Again);
        let nothing = Measured {
            rate: 0.0,
            ..after(0, None, 0)
        };
        assert_eq!(decide(&nothing, &limits()), Decision::Switch);
    }

    #[test]
    fn it_copies_on_while_that_halves_what_is_left() {
        assert_eq!(decide(&after(100, None, 0), &limits()), Decision::Again);
        assert_eq!(decide(&after(50, Some(100), 0), &limits()), Decision::Again);
        assert_eq!(decide(&after(51, Some(100), 0), &limits()), Decision::Switch);
        assert_eq!(decide(&after(1, Some(100), 0), &limits()), Decision::Switch);
        // It is not slowed down for that, and there is an end to it.
        assert_eq!(decide(&after(90, Some(100), 0), &limits()), Decision::Switch);
        let late = Measured {
            elapsed: Duration::from_secs(60),
            ..after(50, Some(100), 0)
        };
        assert_eq!(decide(&late, &limits()), Decision::Switch);
    }

    #[test]
    fn it_throttles_what_does_not_shrink_and_never_more_than_told() {
        assert_eq!(decide(&after(500, Some(1000), 0), &limits()), Decision::Again);
        let mut throttle = 0;
        let mut seen = Vec::new();
        while let Decision::Throttle(percent) = decide(&after(900, Some(1000), throttle), &limits()) {
            throttle = percent;
            seen.push(percent);
        }
        assert_eq!(seen, [20, 30, 40, 45]);
        assert_eq!(decide(&after(900, Some(1000), 45), &limits()), Decision::Again);
        let never = Limits {
            max_throttle: 0,
            ..limits()
        };
        assert_eq!(decide(&after(900, Some(1000), 0), &never), Decision::Again);
    }

    #[test]
    fn time_ends_it_as_told() {
        let late = Measured {
            elapsed: Duration::from_secs(60),
            ..after(900, Some(1000), 0)
        };
        assert_eq!(decide(&late, &limits()), Decision::TimedOut);
        let switch = Limits {
            on_time_out: OnTimeOut::Switch,
            ..limits()
        };
        assert_eq!(decide(&late, &switch), Decision::SwitchAnyway);
        let forever = Limits { time: None, ..limits() };
        assert_eq!(decide(&late, &forever), Decision::Throttle(20));
        // Who could switch at that moment does.
        let late = Measured { remaining: MIB, ..late };
        assert_eq!(decide(&late, &limits()), Decision::Switch);
    }

    #[test]
    fn a_pause_that_is_too_long_by_itself_is_not_tried_for_ever() {
        let slow = Measured {
            pause: Duration::from_millis(110),
            ..after(0, Some(0), 0)
        };
        assert_eq!(decide(&slow, &limits()), Decision::Again);
        let writes = Measured {
            remaining: MIB,
            before: Some(MIB),
            ..slow
        };
        assert_eq!(
            decide(&writes, &limits()),
            Decision::Again,
            "it is not slowed down for that"
        );
        let fast = Measured {
            pause: Duration::from_millis(90),
            ..slow
        };
        assert_eq!(decide(&fast, &limits()), Decision::Switch);
        let switch = Limits {
            on_time_out: OnTimeOut::Switch,
            ..limits()
        };
        for measured in [
            slow,
            Measured {
                retreated: true,
                ..fast
            },
        ] {
            let late = Measured {
                elapsed: Duration::from_secs(60),
                ..measured
            };
            assert_eq!(decide(&late, &limits()), Decision::TimedOut);
            assert_eq!(decide(&late, &switch), Decision::SwitchAnyway);
        }
    }

    #[test]
    fn what_devices_are_counts_as_memory_and_nobody_is_slowed_down_for_it() {
        let with = |devices: u64, remaining| Measured {
            devices: devices * MIB,
            ..after(remaining, Some(remaining), 0)
        };
        assert_eq!(decide(&with(60, 40), &limits()), Decision::Switch);
        assert_eq!(decide(&with(60, 41), &limits()), Decision::Throttle(20));
        assert_eq!(decide(&with(101, 0), &limits()), Decision::Again);
        assert_eq!(decide(&with(101, 900), &limits()), Decision::Again, "it would not help");
        let (fits, large) = (with(100, 0), with(101, 0));
        assert!(fits.may_keep(&limits()) && !large.may_keep(&limits()));
        let late = Measured {
            elapsed: Duration::from_secs(60),
            ..large
        };
        assert_eq!(decide(&late, &limits()), Decision::TimedOut);
    }

    #[test]
    fn the_last_rounds_count_most() {
        let mut rate = Rate::default();
        assert_eq!(rate.get(), 0.0);
        rate.add(1000, Duration::from_secs(1), None);
        assert_eq!(rate.get(), 1000.0);
        for _ in 0..10 {
            rate.add(100, Duration::from_secs(1), None);
        }
        assert!((100.0..103.0).contains(&rate.get()), "{}", rate.get());
        // Rounds without anything change nothing.
        rate.add(0, Duration::ZERO, None);
        assert!((100.0..103.0).contains(&rate.get()), "{}", rate.get());
    }

    #[test]
    fn a_bandwidth_that_was_lowered_counts_at_once() {
        let mut rate = Rate::default();
        rate.add(4000, Duration::from_secs(1), None);
        assert_eq!(
            [None, Some(9000), Some(100)].map(|cap| rate.under(rate.get(), cap)),
            [4000.0, 4000.0, 100.0]
        );
        // Pages are packed to a quarter.
        let mut rate = Rate::default();
        rate.add(4000, Duration::from_secs(1), Some(1000));
        assert_eq!(
            [None, Some(2000), Some(1000), Some(10)].map(|cap| rate.under(rate.get(), cap)),
            [4000.0, 4000.0, 4000.0, 40.0]
        );
    }
}
