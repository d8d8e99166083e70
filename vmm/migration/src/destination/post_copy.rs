//! The guest runs here, and memory of it is at the source.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use triarch_device_core::{Sandbox, ThreadClass, Worker};

use super::session::Session;
use super::worker::Writer;
use super::{Destination, DestinationError, Sink, same, tell};
use crate::connect::Deadlines;
use crate::handle::{Handle, Phase};
use crate::memory::{Lacking, Layout, Target};
use crate::post_copy::{SILENCE, Turn, messages};
use crate::sentence;
use crate::stream::{Interrupt, Stream, unexpected};
use crate::wire::{MAX_WANTED, Message, Role, Runs};

/// How soon it is noticed that nothing is missing any more.
const TICK: Duration = Duration::from_millis(20);

/// Memory that takes only what it lacks.
struct Provides(Arc<dyn Lacking>);

impl Target for Provides {
    fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.provide(gpa, bytes)
    }

    fn zero(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.0.provide_zeroes(gpa, len)
    }
}

/// What becomes of the guest, as long as it lacks memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is not ours yet.
    Open,
    /// It will not be: its memory cannot be fetched.
    Abandoned,
    /// It is ours, whatever happens.
    Committed,
}

/// What all connections of a session have.
#[derive(Clone)]
pub(super) struct Common {
    pub(super) lacking: Arc<dyn Lacking>,
    layout: Layout,
    fate: Arc<Mutex<Fate>>,
    deadlines: Deadlines,
    sandbox: Arc<dyn Sandbox>,
}

impl Common {
    pub(super) fn new(
        lacking: Arc<dyn Lacking>,
        layout: &Layout,
        deadlines: Deadlines,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Self {
        Self {
            lacking,
            layout: layout.clone(),
            fate: Arc::new(Mutex::new(Fate::Open)),
            deadlines,
            sandbox: sandbox.clone(),
        }
    }

    fn fate(&self, turn: Fate) -> Fate {
        let mut fate = self.fate.lock().unwrap_or_else(PoisonError::into_inner);
        if *fate == Fate::Open {
            *fate = turn;
        }
        *fate
    }

    /// From here on a lost connection does not end the guest. `false`: one did.
    pub(super) fn commit(&self) -> bool {
        self.fate(Fate::Committed) == Fate::Committed
    }

    /// The guest will not be ours, unless it is: nobody waits for its memory any more.
    pub(super) fn abandon(&self) {
        if self.fate(Fate::Abandoned) == Fate::Abandoned {
            self.lacking.abandon();
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        *self.fate.lock().unwrap_or_else(PoisonError::into_inner) == Fate::Abandoned
    }

    /// Whether nothing is missing, or nobody misses it any more.
    fn is_over(&self) -> bool {
        self.lacking.remaining().is_none_or(|bytes| bytes == 0)
    }
}

/// The two streams of a connection, with a thread each.
pub(super) struct Line {
    workers: Vec<Worker<()>>,
    /// Whether the source knows that it has served; or why it cannot.
    ends: Receiver<Result<(), String>>,
    interrupt: Interrupt,
}

impl Line {
    /// Begins to fetch what is missing: by `demand` what somebody waits for, by `push` the rest.
    pub(super) fn start(demand: Stream, push: Stream, common: &Common) -> io::Result<Self> {
        let (report, ends) = channel();
        let mut line = Self {
            workers: Vec::new(),
            ends,
            interrupt: Interrupt::default(),
        };
        type Body = fn(&mut Stream, &Common) -> Result<Option<()>, DestinationError>;
        let all: [(&str, Stream, Body); 2] = [("migrate-demand", demand, demands), ("migrate-push", push, takes)];
        for (name, mut stream, body) in all {
            stream.set_interrupt(&line.interrupt);
            let (common, report): (_, Sender<_>) = (common.clone(), report.clone());
            let sandbox = common.sandbox.clone();
            let run = move |(): &mut (), _: &_| {
                let end = match body(&mut stream, &common) {
                    Ok(None) => return,
                    Ok(Some(())) => Ok(()),
                    Err(error) => Err(sentence(&error)),
                };
                let failed = end.is_err();
                let _ = report.send(end);
                if failed && !common.is_over() {
                    common.abandon();
                }
            };
            let worker = Worker::spawn(name, ThreadClass::Migration, &sandbox, (), run)?;
            line.workers.push(worker);
        }
        Ok(line)
    }

    /// How it ended, if it did: the source knows that nothing is missing, or why there is no connection.
    pub(super) fn end(&self) -> Option<Result<(), String>> {
        match self.ends.try_recv() {
            Ok(end) => Some(end),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err("the connection ended".to_owned())),
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

/// Says what is missing, and asks for what somebody waits for.
fn demands(stream: &mut Stream, common: &Common) -> Result<Option<()>, DestinationError> {
    let lacking = &common.lacking;
    let silence = SILENCE.min(common.deadlines.silence);
    let alive = silence / 3;
    let mut writer = Writer::new(Arc::new(Provides(lacking.clone())), common.layout.clone());
    let missing = match lacking.remaining() {
        Some(bytes) if bytes > 0 => lacking.missing().map_err(DestinationError::Memory)?,
        _ => Vec::new(),
    };
    for runs in messages(missing) {
        stream.send(&Message::Lacks(runs))?;
    }
    stream.send(&Message::Serve)?;
    let mut said = Instant::now();
    loop {
        if common.is_over() {
            stream.send(&Message::End)?;
            return match stream.receive(silence, "confirm the end")? {
                Message::End => Ok(Some(())),
                other => Err(unexpected(&other, "the end").into()),
            };
        }
        let wanted = lacking.wanted(MAX_WANTED, TICK.max(alive / 50));
        let mut runs = Runs::default();
        for gpa in wanted {
            runs.push(gpa, crate::PAGE, false);
        }
        if runs.is_empty() {
            if said.elapsed() >= alive {
                stream.send(&Message::Alive)?;
                said = Instant::now();
            }
            continue;
        }
        stream.send(&Message::Want(runs))?;
        said = Instant::now();
        loop {
            match stream.receive(silence, "send the pages that are waited for")? {
                Message::Served => break,
                message => match writer.take(&message) {
                    Err(_) if common.is_over() => {}
                    taken => taken?,
                },
            }
        }
    }
}

/// Takes what nobody waits for.
fn takes(stream: &mut Stream, common: &Common) -> Result<Option<()>, DestinationError> {
    let silence = SILENCE.min(common.deadlines.silence);
    let mut writer = Writer::new(Arc::new(Provides(common.lacking.clone())), common.layout.clone());
    loop {
        let message = match stream.receive(silence, "send memory") {
            Ok(Message::Alive) => continue,
            Ok(message) => message,
            // It ends with the other one.
            Err(_) if common.is_over() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match writer.take(&message) {
            Err(_) if common.is_over() => return Ok(None),
            taken => taken?,
        }
    }
}

impl Destination {
    /// Stays until all of the memory of the guest that runs is there, or there is no guest any more. Whether the source confirmed that
    /// it knows.
    ///
    /// # Errors
    /// The VMM ends, and the guest with it.
    pub(super) fn follow(
        &self,
        session: &mut Session,
        sink: &mut dyn Sink,
        handle: &Handle,
    ) -> Result<bool, DestinationError> {
        let Some((common, mut line)) = session.take_line() else {
            return Ok(true);
        };
        handle.enter(Phase::PostCopy);
        sink.post_copy(Turn::Begun);
        let (mut demand, mut push) = (None, None);
        let mut over: Option<Instant> = None;
        loop {
            let remaining = common.lacking.remaining();
            handle
                .counters()
                .remaining
                .store(remaining.unwrap_or(0), Ordering::Relaxed);
            if common.is_over() && over.is_none() {
                over = Some(Instant::now() + self.listener.deadlines.outcome);
                // The guest lacks nothing: whether the source knows is no matter of its.
                handle.enter(Phase::PostCopy);
            }
            match line.as_ref().and_then(Line::end) {
                None => {}
                Some(Ok(())) => return Ok(true),
                Some(Err(why)) => {
                    line = None;
                    tracing::warn!("the connection was lost while the guest lacks memory: {why}");
                    if over.is_none() {
                        handle.stand(paused(&why));
                        sink.post_copy(Turn::Lost(&why));
                    }
                }
            }
            if over.is_some_and(|end| Instant::now() >= end) {
                return Ok(false);
            }
            if handle.is_abandoned() {
                return Err(DestinationError::Lacking);
            }
            let Some((stream, role)) = self.returns(session, TICK) else {
                continue;
            };
            match role {
                Role::Demand => demand = Some(stream),
                Role::Push => push = Some(stream),
                _ => {
                    let mut stream = stream;
                    tell(&mut stream, Ok(()));
                }
            }
            if demand.is_none() || push.is_none() {
                continue;
            }
            if let (Some(demand), Some(push)) = (demand.take(), push.take()) {
                // The one before, which may not know yet that it is lost.
                drop(line.take());
                match Line::start(demand, push, &common) {
                    Ok(new) => line = Some(new),
                    Err(error) => tracing::warn!("cannot take the source's connection: {error}"),
                }
                if line.is_some() && over.is_none() {
                    handle.enter(Phase::PostCopy);
                    sink.post_copy(Turn::Recovered);
                }
            }
        }
    }

    /// A connection of this session's source, if there is one within `wait`.
    fn returns(&self, session: &Session, wait: Duration) -> Option<(Stream, Role)> {
        let end = Some(Instant::now() + wait);
        let accepted = self.listener.accept(&Interrupt::default(), end);
        let (mut stream, hello) = self.greeted(accepted.ok()??)?;
        let known = same(&hello.token, &session.token());
        if !known || !matches!(hello.role, Role::Ask | Role::Demand | Role::Push) {
            tracing::warn!("a stream came that is not of this migration");
            return None;
        }
        if hello.role != Role::Ask {
            self.welcome(&mut stream).ok()?;
        }
        Some((stream, hello.role))
    }
}

/// What an operator is told while the connection is lost.
fn paused(why: &str) -> String {
    format!(
        "the guest runs here and lacks memory that is at the source, and the connection is lost ({why}): it goes on when the source connects \
         again. If the source's VMM has ended, the guest is lost: end this VMM"
    )
}
