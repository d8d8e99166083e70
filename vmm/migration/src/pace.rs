//! How fast memory is sent.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long whoever is too fast sleeps at most before it looks again.
const SLICE: Duration = Duration::from_millis(50);
/// How many seconds of bandwidth may be saved up by sending nothing.
const BURST: f64 = 0.05;

/// Keeps several threads to one number of bytes a second, which may change at any time.
#[derive(Debug)]
pub(crate) struct Pacer {
    /// Bytes a second; 0: as many as go.
    cap: AtomicU64,
    account: Mutex<Account>,
}

#[derive(Debug)]
struct Account {
    /// Bytes that may be sent; less than nothing after a message that was longer.
    balance: f64,
    counted: Instant,
}

impl Pacer {
    pub(crate) fn new(cap: Option<u64>) -> Self {
        Self {
            cap: AtomicU64::new(cap.unwrap_or(0)),
            account: Mutex::new(Account {
                balance: 0.0,
                counted: Instant::now(),
            }),
        }
    }

    pub(crate) fn set(&self, cap: Option<u64>) {
        self.cap.store(cap.unwrap_or(0), Ordering::Relaxed);
    }

    pub(crate) fn cap(&self) -> Option<u64> {
        Some(self.cap.load(Ordering::Relaxed)).filter(|cap| *cap > 0)
    }

    /// Waits until `bytes` may be sent. `meanwhile` is called now and then, and ends the waiting by an error.
    pub(crate) fn wait<E>(&self, bytes: u64, mut meanwhile: impl FnMut() -> Result<(), E>) -> Result<(), E> {
        loop {
            let Some(cap) = self.cap() else { return Ok(()) };
            match self.take(bytes, cap as f64, Instant::now()) {
                None => return Ok(()),
                Some(longer) => thread::sleep(longer.min(SLICE)),
            }
            meanwhile()?;
        }
    }

    /// Takes `bytes` from the account, or tells how long to wait.
    fn take(&self, bytes: u64, cap: f64, now: Instant) -> Option<Duration> {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(account.counted);
        account.counted = account.counted.max(now);
        account.balance = (account.balance + cap * passed.as_secs_f64()).min(cap * BURST);
        if account.balance >= 0.0 {
            account.balance -= bytes as f64;
            return None;
        }
        Some(Duration::from_secs_f64((-account.balance / cap).clamp(0.001, 1.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that go in `seconds` in messages of `size`, told by a clock of our own.
    fn sent(pacer: &Pacer, start: Instant, cap: u64, size: u64, seconds: u64) -> u64 {
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(seconds) {
            match pacer.take(size, cap as f64, now) {
                None => sent += size,
                Some(longer) => now += longer.min(SLICE),
            }
        }
        sent
    }

    #[test]
    fn as_many_bytes_go_as_the_cap_says() {
        for (cap, size) in [
            (1 << 20, 4096),
            (100 << 20, 1 << 20),
            (1 << 30, 4 << 20),
            (64 << 10, 1 << 20),
        ] {
            let start = Instant::now();
            let sent = sent(&Pacer::new(Some(cap)), start, cap, size, 100);
            let wanted = cap * 100;
            let slack = wanted / 50 + 2 * size;
            assert!(
                sent.abs_diff(wanted) < slack,
                "{sent} of {wanted} in messages of {size}"
            );
        }
    }

    #[test]
    fn a_cap_that_is_raised_counts_at_once() {
        let start = Instant::now();
        let pacer = Pacer::new(Some(1000));
        assert_eq!(pacer.take(1 << 20, 1000.0, start), None);
        // A thousand seconds of debt, at the old cap.
        assert!(pacer.take(1, 1000.0, start).is_some());
        let later = start + Duration::from_secs(1);
        assert_eq!(pacer.take(1, f64::from(2 << 20), later), None);
    }

    #[test]
    fn waiting_ends_by_an_error() {
        let pacer = Pacer::new(Some(1));
        assert_eq!(pacer.wait(1 << 20, || Err(())), Ok(()));
        assert_eq!(pacer.wait(1, || Err(())), Err(()));
        pacer.set(None);
        assert_eq!(pacer.wait(u64::MAX, || Err(())), Ok(()));
    }
}
