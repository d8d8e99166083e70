//! What happened to the VMM and its VM, numbered and in order, for whoever asks now or later.
//!
//! [`EventLog`] keeps the newest events as the lines that clients get: one JSON object each, in the form of Cloud Hypervisor's event
//! monitor with an `id` added. Readers hold a [`Cursor`] and nothing else: a reader that is slow costs nothing, and is told what it missed.

pub mod kind;
mod limit;
mod line;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

pub use kind::Kind;
pub use line::{MAX_LINE, Value};

use limit::{Held, Limits};

/// Events of the VMM and its clients that are kept.
const HOST_EVENTS: usize = 1024;
/// Bytes of their lines that are kept.
const HOST_BYTES: usize = 256 << 10;
/// Events that a guest can cause, and that are kept. They never take the place of others.
const GUEST_EVENTS: usize = 256;
/// Bytes of their lines that are kept.
const GUEST_BYTES: usize = 64 << 10;

/// Where a reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The first event it does not have.
    next: u64,
}

/// A client asks for what follows an event that has not happened: it speaks of another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "event {since} has not happened, the last one is {last}; this may be another VMM than before, begin with since=0"
)]
pub struct Ahead {
    /// What the client asked for.
    pub since: u64,
    /// The newest event.
    pub last: u64,
}

struct Entry {
    id: u64,
    line: Box<[u8]>,
}

/// Events of one kind of origin, oldest first.
struct Lane {
    entries: VecDeque<Entry>,
    bytes: usize,
    max_entries: usize,
    max_bytes: usize,
}

impl Lane {
    fn new(max_entries: usize, max_bytes: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            bytes: 0,
            max_entries,
            max_bytes,
        }
    }

    /// Keeps `entry`, and of the others as many as there is room for.
    fn push(&mut self, entry: Entry) {
        self.bytes += entry.line.len();
        self.entries.push_back(entry);
        while self.entries.len() > 1 && (self.entries.len() > self.max_entries || self.bytes > self.max_bytes) {
            self.bytes -= self.entries.pop_front().map_or(0, |old| old.line.len());
        }
    }

    /// The first event from `id` on.
    fn from(&self, id: u64) -> Option<&Entry> {
        let at = self.entries.partition_point(|entry| entry.id < id);
        self.entries.get(at)
    }
}

struct State {
    next: u64,
    host: Lane,
    guest: Lane,
    limits: Limits,
}

impl State {
    fn append(&mut self, by_guest: bool, at: Duration, kind: &Kind, properties: &[(&str, Value<'_>)]) {
        let id = self.next;
        self.next += 1;
        let line = line::format(id, at, kind, properties).into_bytes().into();
        let lane = if by_guest { &mut self.guest } else { &mut self.host };
        lane.push(Entry { id, line });
    }

    fn first_from(&self, id: u64) -> Option<&Entry> {
        match (self.host.from(id), self.guest.from(id)) {
            (Some(a), Some(b)) => Some(if a.id < b.id { a } else { b }),
            (a, b) => a.or(b),
        }
    }

    /// Appends the events whose time to be held back is over.
    fn release(&mut self, now: Instant, at: Duration) {
        while let Some(held) = self.limits.release(now) {
            self.append_held(at, held);
        }
    }

    /// Appends all events that are held back.
    fn release_all(&mut self, at: Duration) {
        while let Some(held) = self.limits.give_up() {
            self.append_held(at, held);
        }
    }

    fn append_held(&mut self, at: Duration, held: Held) {
        let properties = held.properties.iter().map(|(name, value)| (*name, value.as_value()));
        let suppressed = (held.left_out > 0).then_some(("suppressed", Value::Number(held.left_out)));
        let properties: Vec<_> = properties.chain(suppressed).collect();
        self.append(true, at, held.kind, &properties);
    }
}

type Waker = Box<dyn Fn() + Send + Sync>;

/// The newest events. Appending takes a lock for as long as it takes to copy a line, and never waits for a reader.
pub struct EventLog {
    started: Instant,
    state: Mutex<State>,
    wakers: Mutex<Vec<Waker>>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            state: Mutex::new(State {
                next: 1,
                host: Lane::new(HOST_EVENTS, HOST_BYTES),
                guest: Lane::new(GUEST_EVENTS, GUEST_BYTES),
                limits: Limits::default(),
            }),
            wakers: Mutex::default(),
        }
    }
}

impl EventLog {
    /// An empty log, whose clock starts now.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What its clock shows: time since the VMM's start.
    pub fn clock(&self) -> Duration {
        self.started.elapsed()
    }

    /// Calls `wake` after each event, from the thread that had it. It must neither block nor append events.
    pub fn subscribe(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.wakers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Box::new(wake));
    }

    /// Appends an event that the VMM or one of its clients caused. What a guest did before is told before it, also what is held back.
    pub fn post(&self, kind: &'static Kind, properties: &[(&'static str, Value<'_>)]) {
        {
            let mut state = self.state();
            // The clock is read under the lock: times rise as numbers do.
            let now = Instant::now();
            let at = self.at(now);
            state.release_all(at);
            state.append(false, at, kind, properties);
        }
        self.wake();
    }

    /// Appends an event that the guest caused on its part called `subject`. A guest that causes too many is not heard for some seconds;
    /// then the last one of `subject` is reported, and how many were left out before it.
    pub fn post_guest(&self, subject: &str, kind: &'static Kind, properties: &[(&'static str, Value<'_>)]) {
        {
            let mut state = self.state();
            let now = Instant::now();
            let at = self.at(now);
            state.release(now, at);
            if state.limits.admit(now, subject, kind, properties) {
                state.append(true, at, kind, properties);
            }
        }
        // Also for one that is held back: who waits has to know until when.
        self.wake();
    }

    /// A cursor behind event number `since`; 0 is before the first.
    pub fn after(&self, since: u64) -> Result<Cursor, Ahead> {
        let last = self.state().next - 1;
        if since > last {
            return Err(Ahead { since, last });
        }
        Ok(Cursor { next: since + 1 })
    }

    /// A cursor behind the newest event.
    pub fn now(&self) -> Cursor {
        Cursor {
            next: self.state().next,
        }
    }

    /// Appends the lines of the next events to `output`, each with a newline, until there are `space` bytes or more; whether any was
    /// there. In the place of events that are not kept any more there is a line that counts them.
    pub fn read(&self, cursor: &mut Cursor, space: usize, output: &mut Vec<u8>) -> bool {
        let mut state = self.state();
        let now = Instant::now();
        let at = self.at(now);
        state.release(now, at);
        let (start, first) = (output.len(), cursor.next);
        while output.len() - start < space && cursor.next < state.next {
            let entry = state.first_from(cursor.next);
            let id = entry.map_or(state.next, |entry| entry.id);
            if id > cursor.next {
                let count = [("count", Value::Number(id - cursor.next))];
                output.extend_from_slice(line::format(id - 1, at, &kind::VMM_LOST, &count).as_bytes());
                output.push(b'\n');
                cursor.next = id;
            } else if let Some(entry) = entry {
                output.extend_from_slice(&entry.line);
                output.push(b'\n');
                cursor.next += 1;
            }
        }
        cursor.next > first
    }

    /// When there will be an event that is held back now.
    pub fn due(&self) -> Option<Instant> {
        self.state().limits.due()
    }

    fn at(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        for wake in self.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            wake();
        }
    }
}

#[cfg(test)]
mod tests;
