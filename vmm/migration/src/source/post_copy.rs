//! The guest runs at the destination, and its memory is here.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use triarch_device_core::{Sandbox, ThreadClass, Worker};

use super::round::BATCH;
use super::worker::{Common, Failed, SendsMemory};
use super::{Guest, NotMoved, Session, Source, SourceError, Whereabouts};
use crate::handle::Phase;
use crate::memory::{Layout, PAGE};
use crate::pages::Lacks;
use crate::post_copy::{SILENCE, Turn};
use crate::sentence;
use crate::stream::{Interrupt, Stream, StreamError, unexpected};
use crate::wire::{Message, Role};

/// How often it is looked whether somebody wants something.
const TICK: Duration = Duration::from_millis(100);
/// How often a destination that cannot be reached is tried.
const RETRY: Duration = Duration::from_millis(500);

/// What is to be sent.
struct Todo {
    lacks: Lacks,
    /// The destination has told it.
    told: bool,
    /// It lacks nothing any more.
    complete: bool,
}

struct Shared {
    todo: Mutex<Todo>,
    changed: Condvar,
    layout: Layout,
}

/// The two streams of a connection, with a thread each.
pub(super) struct Line {
    workers: Vec<Worker<()>>,
    ends: Receiver<Result<(), Failed>>,
    interrupt: Interrupt,
    /// What came of it, once.
    end: Option<Result<(), Failed>>,
}

impl Line {
    /// Begins to send what the destination says that it lacks.
    fn start(
        streams: (Stream, Stream),
        common: &Common,
        layout: &Layout,
        sandbox: &Arc<dyn Sandbox>,
    ) -> std::io::Result<Self> {
        let (report, ends) = channel();
        let shared = Arc::new(Shared {
            todo: Mutex::new(Todo {
                lacks: Lacks::none(layout),
                told: false,
                complete: false,
            }),
            changed: Condvar::new(),
            layout: layout.clone(),
        });
        let mut line = Self {
            workers: Vec::new(),
            ends,
            interrupt: common.handle.interrupt().child(),
            end: None,
        };
        let (demand, push) = streams;
        type Body = fn(SendsMemory, &Shared, &Interrupt, &Common) -> Result<Ended, Failed>;
        let all: [(&str, Stream, Body); 2] = [("migrate-demand", demand, demanded), ("migrate-push", push, pushed)];
        for (name, stream, body) in all {
            let sender = SendsMemory::new(stream, common, &line.interrupt);
            let (shared, interrupt, common) = (shared.clone(), line.interrupt.clone(), common.clone());
            let report: Sender<_> = report.clone();
            let run = move |(): &mut (), _: &_| {
                let complete = || shared.todo.lock().unwrap_or_else(PoisonError::into_inner).complete;
                match body(sender, &shared, &interrupt, &common) {
                    // Only one of the two knows the end.
                    Ok(Ended::Interrupted) => {}
                    Err(_) if complete() => {}
                    Ok(Ended::Complete) => drop(report.send(Ok(()))),
                    Err(error) => drop(report.send(Err(error))),
                }
            };
            let worker = Worker::spawn(name, ThreadClass::Migration, sandbox, (), run)?;
            line.workers.push(worker);
        }
        Ok(line)
    }

    /// Waits for the end of it for a moment. `Some(Ok(()))`: the destination has all.
    fn ended(&mut self, wait: Duration) -> Option<&Result<(), Failed>> {
        if self.end.is_none() {
            self.end = match self.ends.recv_timeout(wait) {
                Ok(end) => Some(end),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Err(StreamError::Closed.into())),
            };
        }
        self.end.as_ref()
    }

    /// Why it is of no use any more, if it is.
    pub(super) fn lost(&mut self) -> Option<String> {
        match self.ended(Duration::ZERO) {
            Some(Err(error)) => Some(said(error)),
            _ => None,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.interrupt.raise();
        for worker in self.workers.drain(..) {
            let _ = worker.stop();
        }
    }
}

/// How a thread of it ended.
enum Ended {
    /// Nothing is lacking any more.
    Complete,
    Interrupted,
}

fn said(failed: &Failed) -> String {
    match failed {
        Failed::Stream(error) => sentence(error),
        Failed::Memory(error) => format!("cannot read the guest's memory: {error}"),
    }
}

fn outside(gpa: u64) -> Failed {
    tracing::warn!("the destination wants memory at {gpa:#x}, where this guest has none");
    StreamError::Unexpected {
        found: "a page that there is not".to_owned(),
        expected: "a page of the guest's memory",
    }
    .into()
}

/// Takes what the destination says, and sends the pages that somebody waits for.
fn demanded(mut sender: SendsMemory, shared: &Shared, _: &Interrupt, common: &Common) -> Result<Ended, Failed> {
    let silence = SILENCE.min(common.silence);
    let mut told = false;
    loop {
        let wanted = match sender.stream.receive(silence, "say what it lacks")? {
            Message::Alive => continue,
            Message::Lacks(runs) if !told => {
                let mut todo = shared.todo.lock().unwrap_or_else(PoisonError::into_inner);
                for (gpa, len) in runs.iter() {
                    if !shared.layout.holds(gpa, len) || !todo.lacks.insert(gpa, len) {
                        return Err(outside(gpa));
                    }
                }
                continue;
            }
            Message::Serve if !told => {
                told = true;
                let mut todo = shared.todo.lock().unwrap_or_else(PoisonError::into_inner);
                todo.told = true;
                count(common, &todo);
                shared.changed.notify_all();
                continue;
            }
            Message::Want(runs) if told => runs,
            Message::End if told => {
                shared.todo.lock().unwrap_or_else(PoisonError::into_inner).complete = true;
                // Whether it hears that or not, it has everything.
                let _ = sender.send(&Message::End);
                return Ok(Ended::Complete);
            }
            other => return Err(unexpected(&other, "what it lacks").into()),
        };
        let mut pieces = Vec::new();
        {
            let mut todo = shared.todo.lock().unwrap_or_else(PoisonError::into_inner);
            for (gpa, len) in wanted.iter() {
                // Also what is on its way already: it may be behind much else.
                if !shared.layout.holds(gpa, len) || !todo.lacks.remove(gpa, len) {
                    return Err(outside(gpa));
                }
                pieces.push(gpa..gpa + len);
            }
            count(common, &todo);
        }
        sender.send_pages(&pieces, true)?;
        sender.send(&Message::Served)?;
    }
}

/// Tells others how much is to be sent.
fn count(common: &Common, todo: &Todo) {
    let remaining = &common.handle.counters().remaining;
    remaining.store(todo.lacks.bytes(), Ordering::Relaxed);
}

/// Sends the pages that nobody waits for.
fn pushed(mut sender: SendsMemory, shared: &Shared, interrupt: &Interrupt, common: &Common) -> Result<Ended, Failed> {
    let mut said = Instant::now();
    loop {
        if interrupt.is_raised() {
            return Ok(Ended::Interrupted);
        }
        let pieces = {
            let todo = shared.todo.lock().unwrap_or_else(PoisonError::into_inner);
            let waits = |todo: &mut Todo| !todo.told || todo.lacks.bytes() == 0;
            let waited = shared.changed.wait_timeout_while(todo, TICK, waits);
            let (mut todo, _) = waited.unwrap_or_else(PoisonError::into_inner);
            match todo.told {
                true => {
                    let pieces = todo.lacks.take(BATCH);
                    count(common, &todo);
                    pieces
                }
                false => Vec::new(),
            }
        };
        if !pieces.is_empty() {
            sender.send_pages(&pieces, false)?;
            said = Instant::now();
        } else if said.elapsed() >= sender.alive().min(SILENCE / 3) {
            sender.send(&Message::Alive)?;
            said = Instant::now();
        }
    }
}

impl Source {
    pub(super) fn common(&self) -> Common {
        Common {
            memory: self.memory.clone(),
            handle: self.handle.clone(),
            compress: self.options.compress,
            silence: self.options.deadlines.silence,
        }
    }

    /// Whether the guest is to be switched before all of its memory is there.
    pub(super) fn is_post_copy_due(&self, began: Instant) -> bool {
        let limits = &self.options.limits;
        let late = limits.time.is_some_and(|time| began.elapsed() >= time);
        let by_itself = limits.on_time_out == crate::OnTimeOut::PostCopy && late;
        self.options.post_copy.is_some() && (by_itself || self.handle.wants_switch())
    }

    /// Serves the destination's wishes from now on, by the streams that the session has for that.
    pub(super) fn serve(&self, session: &mut Session) -> Result<(), SourceError> {
        let streams = session.aside.take();
        let streams = streams.ok_or(SourceError::Options("this session has no streams for post-copy"))?;
        let line = Line::start(streams, &self.common(), &session.layout, &self.sandbox);
        session.line = Some(line.map_err(SourceError::Thread)?);
        Ok(())
    }

    /// Stays until the destination, which runs the guest, has all of its memory.
    ///
    /// # Errors
    /// Somebody gave it up.
    pub(super) fn follow(&self, session: &mut Session, guest: &mut dyn Guest, mut line: Line) -> Result<(), NotMoved> {
        self.handle.enter(Phase::PostCopy);
        guest.post_copy(Turn::Begun);
        loop {
            let why = match line.ended(TICK) {
                None if self.handle.is_abandoned() => return Err(lost()),
                None => continue,
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => said(error),
            };
            drop(line);
            tracing::warn!("the connection was lost while the guest lacks memory: {why}");
            self.handle.stand(paused(&why));
            guest.post_copy(Turn::Lost(&why));
            line = self.again(session)?;
            self.handle.enter(Phase::PostCopy);
            guest.post_copy(Turn::Recovered);
        }
    }

    /// Connects again, for as long as it may, or when asked.
    fn again(&self, session: &Session) -> Result<Line, NotMoved> {
        let recover = self.options.post_copy.and_then(|post_copy| post_copy.recover);
        let (began, mut tried) = (Instant::now(), None::<Instant>);
        loop {
            if self.handle.is_abandoned() {
                return Err(lost());
            }
            let by_itself = recover.is_none_or(|time| began.elapsed() < time);
            let due = tried.is_none_or(|tried| tried.elapsed() >= RETRY);
            if self.handle.take_recover() || (by_itself && due) {
                match self.reconnect(session) {
                    Ok(line) => return Ok(line),
                    Err(error) => {
                        self.handle.stand(paused(&sentence(&error)));
                        tried = Some(Instant::now());
                    }
                }
            }
            thread::sleep(TICK);
        }
    }

    fn reconnect(&self, session: &Session) -> Result<Line, SourceError> {
        let demand = self.connect(session.token, Role::Demand)?;
        let push = self.connect(session.token, Role::Push)?;
        Line::start((demand, push), &self.common(), &session.layout, &self.sandbox).map_err(SourceError::Thread)
    }

    /// What of `left`, which a first round did not come to, may hold anything.
    pub(super) fn touched(&self, left: Vec<std::ops::Range<u64>>) -> Result<Vec<std::ops::Range<u64>>, SourceError> {
        let mut touched = Vec::new();
        for mut run in left {
            while let Some(found) = self.memory.data(run.clone()).map_err(SourceError::Memory)? {
                let start = (found.start - found.start % PAGE).max(run.start);
                let end = found.end.checked_next_multiple_of(PAGE).unwrap_or(run.end).min(run.end);
                if start >= end {
                    break;
                }
                touched.push(start..end);
                run.start = end;
                if run.is_empty() {
                    break;
                }
            }
        }
        Ok(touched)
    }
}

fn lost() -> NotMoved {
    NotMoved {
        why: SourceError::Lost,
        guest: Whereabouts::Lost,
    }
}

/// What an operator is told while the connection is lost.
fn paused(why: &str) -> String {
    format!(
        "the guest runs at the destination and lacks memory that is here, and the connection is lost ({why}). If the destination's VMM has \
         ended, the guest is lost: it cannot go on here. Else make the network work, and it goes on"
    )
}
