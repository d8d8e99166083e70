//! A guest whose memory comes when it is touched, or by and by.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use triarch_state::Payloads;

use super::super::mock::{MockGuest, MockMemory, MockSink, P, blocker};
use crate::{Blocker, Cause, Guest, Handed, Lacking, Offer, PAGE, Sink, Target, Turn};

/// Memory of which some is missing, and threads that wait for it.
pub(super) struct MockLacking {
    pub(super) memory: Arc<MockMemory>,
    pub(super) state: Mutex<State>,
    changed: Condvar,
    /// Pages that came when they were not missing.
    pub(super) ignored: AtomicU64,
    abandoned: AtomicBool,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) missing: BTreeSet<u64>,
    waiting: BTreeSet<u64>,
    told: BTreeSet<u64>,
}

impl MockLacking {
    /// Somebody touches the page at `gpa`, and waits for it. `false`: he waits no more, and it is not there.
    pub(super) fn touch(&self, gpa: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        while state.missing.contains(&gpa) {
            if self.abandoned.load(Ordering::SeqCst) {
                return false;
            }
            state.waiting.insert(gpa);
            self.changed.notify_all();
            state = self.changed.wait_timeout(state, Duration::from_millis(50)).unwrap().0;
        }
        true
    }

    fn put(&self, gpa: u64, len: u64, page: impl Fn(u64) -> Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        for at in (gpa..gpa + len).step_by(P) {
            match state.missing.contains(&at) {
                true => {
                    self.memory.write(at, &page(at - gpa)).expect("memory");
                    state.missing.remove(&at);
                    state.waiting.remove(&at);
                }
                false => drop(self.ignored.fetch_add(1, Ordering::SeqCst)),
            }
        }
        self.changed.notify_all();
    }
}

impl Lacking for MockLacking {
    fn missing(&self) -> io::Result<Vec<Range<u64>>> {
        let mut state = self.state.lock().unwrap();
        state.told.clear();
        Ok(state.missing.iter().map(|gpa| *gpa..gpa + PAGE).collect())
    }

    fn remaining(&self) -> Option<u64> {
        Some(self.state.lock().unwrap().missing.len() as u64 * PAGE)
    }

    fn wanted(&self, most: usize, wait: Duration) -> Vec<u64> {
        let state = self.state.lock().unwrap();
        let none = |state: &mut State| !state.missing.is_empty() && state.waiting.is_subset(&state.told);
        let (mut state, _) = self.changed.wait_timeout_while(state, wait, none).unwrap();
        let new: Vec<_> = state.waiting.difference(&state.told).copied().take(most).collect();
        state.told.extend(&new);
        new
    }

    fn provide(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.put(gpa, bytes.len() as u64, |at| bytes[at as usize..][..P].to_vec());
        Ok(())
    }

    fn provide_zeroes(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.put(gpa, len, |_| vec![0; P]);
        Ok(())
    }

    fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }
}

/// What a test sees of the destination.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) lacking: Mutex<Option<Arc<MockLacking>>>,
    pub(super) turns: Mutex<Vec<String>>,
    /// Whether restoring it got the memory that it touched.
    pub(super) restored: AtomicBool,
}

pub(super) struct LazySink {
    pub(super) sink: MockSink,
    pub(super) seen: Arc<Seen>,
    pub(super) no_faults: bool,
}

impl Sink for LazySink {
    fn prepare(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause> {
        assert!(offer.post_copy);
        self.sink.prepare(offer, handed)
    }

    fn check(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Vec<Blocker> {
        match offer.post_copy && self.no_faults {
            true => vec![blocker(0)],
            false => self.sink.check(offer, handed),
        }
    }

    fn lack(&mut self, missing: &[Range<u64>]) -> Result<Arc<dyn Lacking>, Cause> {
        if self.no_faults {
            return Err("no faults here".into());
        }
        let memory = self.sink.memory.clone().expect("memory");
        let pages = missing.iter().flat_map(|run| run.clone().step_by(P));
        let missing: BTreeSet<_> = pages.collect();
        for gpa in &missing {
            // What was there is older.
            memory.write(*gpa, &[0xdd; P])?;
        }
        let lacking = Arc::new(MockLacking {
            memory,
            state: Mutex::new(State {
                missing,
                ..State::default()
            }),
            changed: Condvar::new(),
            ignored: AtomicU64::new(0),
            abandoned: AtomicBool::new(false),
        });
        *self.seen.lacking.lock().unwrap() = Some(lacking.clone());
        Ok(lacking)
    }

    fn restore(&mut self, state: Payloads) -> Result<(), Cause> {
        // Devices look at their queues.
        if let Some(lacking) = &*self.seen.lacking.lock().unwrap() {
            let first = lacking.state.lock().unwrap().missing.first().copied();
            let there = first.is_none_or(|gpa| lacking.touch(gpa));
            self.seen.restored.store(there, Ordering::SeqCst);
        }
        self.sink.restore(state)
    }

    fn take_locks_and_run(&mut self) -> Result<(), Cause> {
        self.sink.take_locks_and_run()
    }

    fn post_copy(&mut self, turn: Turn<'_>) {
        self.seen.turns.lock().unwrap().push(format!("{turn:?}"));
    }

    fn abort(&mut self, why: &str) {
        self.sink.abort(why);
    }
}

pub(super) struct LazyGuest {
    pub(super) guest: MockGuest,
    pub(super) turns: Arc<Mutex<Vec<String>>>,
}

impl Guest for LazyGuest {
    fn pause(&mut self) -> Result<(), Cause> {
        self.guest.pause()
    }
    fn save(&mut self) -> Result<Payloads, Cause> {
        self.guest.save()
    }
    fn release_locks(&mut self) -> Result<(), Cause> {
        self.guest.release_locks()
    }
    fn take_locks(&mut self) -> Result<(), Cause> {
        self.guest.take_locks()
    }
    fn resume(&mut self) -> Result<(), Cause> {
        self.guest.resume()
    }
    fn post_copy(&mut self, turn: Turn<'_>) {
        self.turns.lock().unwrap().push(format!("{turn:?}"));
    }
    fn throttle(&mut self, percent: u8) -> Result<(), Cause> {
        self.guest.throttle(percent)
    }
}
