//! Holds vCPUs for a share of the time, so that the guest does less than it could.
//!
//! All vCPUs run and stand still together, as in a pause, but devices go on: who waits for another vCPU does not wait longer than for
//! one that was not scheduled. A thread `throttle` does it. On a busy host it gets its processor late: what it holds too long, the vCPUs
//! run longer before it holds again, so that the share is never more than was asked for; and what they ran too long, it holds them
//! longer, so that it is not much less either.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use triarch_device_core::{Sandbox, ThreadClass};

/// A time in which vCPUs run and then stand still: short enough that nothing in the guest times out, and long enough that stopping them
/// is a small part of it.
const PERIOD: Duration = Duration::from_millis(20);
/// The longest that vCPUs stand still to make up for what they ran too long. At [`MOST`] percent that is 10 ms, as long as a thread may
/// have to wait for its processor; what a guest takes for the end of a disk or of another vCPU is many times as long.
const LONGEST: Duration = Duration::from_secs(1);
/// Most percent. A guest that does nothing at all would never come to an end.
pub(crate) const MOST: u8 = 99;

/// Holds whoever looks at [`holds`](Self::holds), a share of the time.
#[derive(Default)]
pub(crate) struct Throttle {
    holds: AtomicBool,
    percent: AtomicU8,
    ends: Mutex<bool>,
    changed: Condvar,
}

impl Throttle {
    /// Whether vCPUs should stand still now.
    pub(crate) fn holds(&self) -> bool {
        self.holds.load(Ordering::SeqCst)
    }

    /// Sets the share from the next period on.
    pub(crate) fn set(&self, percent: u8) {
        self.percent.store(percent.min(MOST), Ordering::SeqCst);
    }

    /// Holds and lets go until told to [`end`](Self::end). `hold` and `release` make vCPUs look.
    fn run(&self, hold: impl Fn(), release: impl Fn()) {
        let mut share = Share::default();
        let mut runs = PERIOD;
        loop {
            let began = Instant::now();
            if self.sleep(runs) {
                return;
            }
            share.percent = u32::from(self.percent.load(Ordering::SeqCst));
            let holds = share.after_run(began.elapsed());
            let began = Instant::now();
            if !holds.is_zero() {
                self.holds.store(true, Ordering::SeqCst);
                hold();
                let ends = self.sleep(holds);
                self.holds.store(false, Ordering::SeqCst);
                release();
                if ends {
                    return;
                }
            }
            runs = share.after_hold(began.elapsed());
        }
    }

    /// Sleeps so long; whether it is the end.
    fn sleep(&self, time: Duration) -> bool {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.changed.wait_timeout_while(ends, time, |ends| !*ends);
        *wait.unwrap_or_else(PoisonError::into_inner).0
    }

    fn end(&self) {
        *self.ends.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// Keeps count of how long vCPUs ran and were held.
#[derive(Default)]
struct Share {
    /// Of both, for which they are to be held.
    percent: u32,
    /// They may run so long for having been held (seconds); less than nothing if they ran longer.
    credit: f64,
}

impl Share {
    /// They ran for `ran`. How long to hold them now; nothing if they are to run on.
    fn after_run(&mut self, ran: Duration) -> Duration {
        if self.percent == 0 {
            self.credit = 0.0;
            return Duration::ZERO;
        }
        let longest = LONGEST.as_secs_f64();
        // What is not made up for at once must not add up.
        self.credit = (self.credit - ran.as_secs_f64()).max(-longest * self.runs_per_hold());
        Duration::from_secs_f64((-self.credit / self.runs_per_hold()).clamp(0.0, longest))
    }

    /// They were held for `held`. How long they run now, at least.
    fn after_hold(&mut self, held: Duration) -> Duration {
        if self.percent == 0 {
            return PERIOD;
        }
        self.credit += held.as_secs_f64() * self.runs_per_hold();
        PERIOD * (100 - self.percent) / 100 + Duration::from_secs_f64(self.credit.max(0.0))
    }

    /// How long they run for each second that they are held.
    fn runs_per_hold(&self) -> f64 {
        f64::from(100 - self.percent) / f64::from(self.percent)
    }
}

/// The thread that holds vCPUs, for as long as this lives.
pub(crate) struct Throttling {
    throttle: Arc<Throttle>,
    thread: Option<JoinHandle<()>>,
}

impl Throttling {
    /// Starts it.
    pub(crate) fn start(
        throttle: &Arc<Throttle>,
        hold: impl Fn() + Send + 'static,
        release: impl Fn() + Send + 'static,
        sandbox: &Arc<dyn Sandbox>,
    ) -> io::Result<Self> {
        *throttle.ends.lock().unwrap_or_else(PoisonError::into_inner) = false;
        let (theirs, confines) = (throttle.clone(), sandbox.clone());
        let body = move || {
            // It signals the threads of vCPUs, and may do what these may.
            if let Err(error) = confines.enter(ThreadClass::Vcpu) {
                tracing::error!("cannot confine the thread that slows vCPUs down: {error}");
                std::process::abort();
            }
            theirs.run(hold, release);
        };
        let thread = sandbox.spawn("throttle".to_owned(), Box::new(body))?;
        Ok(Self {
            throttle: throttle.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for Throttling {
    fn drop(&mut self) {
        self.throttle.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use triarch_device_core::NoSandbox;

    use super::*;

    fn share(percent: u32) -> Share {
        Share { percent, credit: 0.0 }
    }

    /// Milliseconds.
    fn ms(time: Duration) -> f64 {
        (time.as_secs_f64() * 1e6).round() / 1000.0
    }

    #[test]
    fn a_period_has_both() {
        for (percent, runs, holds) in [(20, 16.0, 4.0), (50, 10.0, 10.0), (99, 0.2, 19.8)] {
            let mut share = share(percent);
            for _ in 0..3 {
                let meant = share.after_run(Duration::from_secs_f64(runs / 1000.0));
                assert_eq!((ms(meant), ms(share.after_hold(meant))), (holds, runs), "{percent}");
            }
        }
        let mut none = share(0);
        assert_eq!(
            (none.after_run(PERIOD), none.after_hold(Duration::ZERO)),
            (Duration::ZERO, PERIOD)
        );
    }

    #[test]
    fn what_was_too_long_is_made_up_for() {
        let long = Duration::from_millis;
        // Held for ten times as long as was meant: they run for as much longer.
        let mut one = share(20);
        assert_eq!(ms(one.after_run(long(16))), 4.0);
        assert_eq!(ms(one.after_hold(long(40))), 16.0 + 144.0);
        // They ran for ten times as long.
        let mut other = share(90);
        assert_eq!(ms(other.after_run(long(20))), 180.0);
        // And for so long that it is too much for once; no more than one more hold comes of it.
        let mut much = share(99);
        assert_eq!(much.after_run(Duration::from_secs(5)), LONGEST);
        assert_eq!(ms(much.after_hold(LONGEST)), 0.2);
        assert_eq!(ms(much.after_run(Duration::from_micros(200))), 19.8);
    }

    proptest! {
        #[test]
        fn it_is_never_more_than_its_share(percent in 1..=u32::from(MOST), late in vec((0..300u64, 0..300u64), 1..50)) {
            let mut share = share(percent);
            let (mut ran, mut held, mut runs) = (Duration::ZERO, Duration::ZERO, PERIOD);
            for (run, hold) in late {
                runs += Duration::from_millis(run);
                ran += runs;
                let meant = share.after_run(runs);
                prop_assert!(meant <= LONGEST);
                let share_of = |held: Duration| held.as_secs_f64() / (held + ran).as_secs_f64();
                prop_assert!(share_of(held + meant) <= f64::from(percent) / 100.0 + 1e-6);
                let took = if meant.is_zero() { meant } else { meant + Duration::from_millis(hold) };
                held += took;
                runs = share.after_hold(took);
            }
        }
    }

    #[test]
    fn it_holds_no_more_than_its_share_and_lets_go_in_the_end() {
        let throttle = Arc::<Throttle>::default();
        throttle.set(60);
        let held = Arc::<Mutex<(Duration, Option<Instant>)>>::default();
        let (ours, theirs) = (held.clone(), held.clone());
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let began = Instant::now();
        let throttling = Throttling::start(
            &throttle,
            move || ours.lock().expect("no panic").1 = Some(Instant::now()),
            move || {
                let mut held = theirs.lock().expect("no panic");
                let since = held.1.take().expect("it was held");
                held.0 += since.elapsed();
            },
            &sandbox,
        );
        std::thread::sleep(Duration::from_millis(500));
        drop(throttling.expect("a thread"));
        let (all, time) = (began.elapsed(), *held.lock().expect("no panic"));
        assert!(!throttle.holds() && time.1.is_none());
        let share = time.0.as_secs_f64() / all.as_secs_f64();
        assert!(share > 0.0 && share <= 0.61, "{share}");
    }
}
