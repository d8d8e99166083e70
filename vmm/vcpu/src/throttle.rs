//! Holds vCPUs for a share of the time, so that the guest does less than it could.
//!
//! All vCPUs run and stand still together, as in a pause, but devices go on: who waits for another vCPU does not wait longer than for
//! one that was not scheduled. A thread `throttle` does it. What it holds longer than it meant to, it makes up for before it holds
//! again, so that the share is never more than was asked for.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use triarch_device_core::{Sandbox, ThreadClass};

/// A time in which vCPUs run and then stand still: short enough that nothing in the guest times out, and long enough that stopping them
/// is a small part of it.
const PERIOD: Duration = Duration::from_millis(20);
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
        let mut runs = PERIOD;
        loop {
            if self.sleep(runs) {
                return;
            }
            let percent = u32::from(self.percent.load(Ordering::SeqCst));
            let began = Instant::now();
            self.holds.store(true, Ordering::SeqCst);
            hold();
            let ends = self.sleep(PERIOD * percent / 100);
            self.holds.store(false, Ordering::SeqCst);
            release();
            if ends {
                return;
            }
            runs = runs_after(began.elapsed(), percent);
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

/// How long vCPUs run that were held for `held`, so that this is no more than `percent` of both.
fn runs_after(held: Duration, percent: u32) -> Duration {
    match percent {
        0 => PERIOD,
        percent => held.mul_f64(f64::from(100 - percent) / f64::from(percent)),
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
    use triarch_device_core::NoSandbox;

    use super::*;

    #[test]
    fn what_was_held_too_long_is_made_up_for() {
        let ms = Duration::from_millis;
        assert_eq!(runs_after(ms(4), 20), ms(16));
        assert_eq!(runs_after(ms(40), 20), ms(160));
        assert_eq!(runs_after(ms(20), 50), ms(20));
        assert_eq!(runs_after(ms(1), 0), PERIOD);
        let most = runs_after(PERIOD * u32::from(MOST) / 100, u32::from(MOST));
        assert!(ms(0) < most && most < ms(1), "{most:?}");
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
