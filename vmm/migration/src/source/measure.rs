//! What is known when a round is over.

use std::time::{Duration, Instant};

use super::worker::Done;
use super::{Session, Source, SourceError};
use crate::converge::{Measured, expected_downtime};

/// How much longer than a pause that came to nothing the guest runs until the next that may: it loses a twentieth of its time at most.
const RUNS: u32 = 20;

/// How long a round waits for what the guest writes meanwhile, where copying sooner would change nothing.
pub(super) const LULL: Duration = Duration::from_millis(50);

/// What the last pause showed that came to nothing.
#[derive(Default)]
pub(super) struct Tried {
    /// How long it took until the promise could be checked: to stop processors and disks, and to see what was written.
    pause: Duration,
    /// Until when it is taken to be as long again.
    until: Option<Instant>,
    times: u32,
    /// The time for copying was over then.
    late: bool,
}

impl Source {
    fn is_late(&self, elapsed: Duration) -> bool {
        self.options.limits.time.is_some_and(|time| elapsed >= time)
    }

    /// How it stands after a `round` that left `remaining` bytes of memory, and of `devices` as many.
    pub(super) fn measure(
        &self,
        session: &Session,
        remaining: u64,
        before: Option<u64>,
        round: Duration,
        devices: u64,
    ) -> Measured {
        let (elapsed, tried) = (session.began.elapsed(), &session.tried);
        let counts = self.is_late(elapsed) || tried.until.is_some_and(|until| Instant::now() < until);
        let pause = if counts { tried.pause } else { Duration::ZERO };
        let rate = session.rate(self.handle.cap());
        let paused = remaining.saturating_add(devices);
        let expected = expected_downtime(paused, rate, self.options.limits.state_time + pause);
        let dirty_rate = remaining as f64 / round.as_secs_f64().max(1e-6);
        self.handle.set_rates(rate as u64, dirty_rate as u64, expected);
        Measured {
            elapsed,
            remaining,
            devices,
            before,
            rate,
            throttle: session.throttle,
            pause,
            retreated: tried.late,
        }
    }

    pub(super) fn timed_out(&self, measured: &Measured) -> SourceError {
        let limits = &self.options.limits;
        let expected = expected_downtime(measured.paused(), measured.rate, limits.state_time + measured.pause);
        SourceError::TimedOut {
            elapsed: measured.elapsed,
            expected_ms: expected.unwrap_or(Duration::MAX).as_millis(),
            limit_ms: limits.downtime.as_millis(),
        }
    }

    /// The guest was paused for so long and runs on, since the promise would not have been kept.
    pub(super) fn learn_retreat(&self, session: &mut Session, pause: Duration) {
        let times = session.tried.times.saturating_add(1);
        session.tried = Tried {
            pause,
            until: Instant::now().checked_add(pause.saturating_mul(RUNS).saturating_mul(times)),
            times,
            late: self.is_late(session.began.elapsed()),
        };
    }
}

impl Session {
    pub(super) fn learn(&mut self, done: &Done, time: Duration, cap: Option<u64>) {
        self.rate.add(done.data, done.data_time, cap);
        if done.all > 0 {
            self.guess = done.all as f64 / time.as_secs_f64().max(1e-6);
        }
    }

    /// Bytes that go a second, of which no more than `cap` may be sent.
    pub(super) fn rate(&self, cap: Option<u64>) -> f64 {
        let rate = match self.rate.get() {
            measured if measured > 0.0 => measured,
            // Nothing but zeroes so far.
            _ => self.guess,
        };
        self.rate.under(rate, cap)
    }
}
