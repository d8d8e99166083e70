//! The thread of a device: it connects, hands the queues over, relays where it must, and connects again.

mod lanes;
mod memory;
mod moves;
mod state;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use triarch_device_core::RateLimit;
use triarch_virtio::{DeviceContext, VirtQueue};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use self::lanes::{Lane, Pause};
pub use self::memory::Remap;
pub(crate) use self::moves::Move;
pub(crate) use self::state::{End, StateOrder};
use crate::connection::Connection;
use crate::device::Shared;
use crate::inflight::Inflight;
use crate::session::{Session, own_memory};
use crate::shadow::Shadow;
use crate::{LinkError, LinkState, OnDisconnect, PageLog};

/// How long until the next try: none at first, for a daemon that hands over to another; then this, doubled each time, up to that.
const FIRST_DELAY: Duration = Duration::from_millis(50);
const LAST_DELAY: Duration = Duration::from_secs(2);
/// A connection that lasted this long was a good one.
const PROVEN: Duration = Duration::from_secs(2);
/// How long a queue that stops waits for its daemon. After that the daemon is given up, and the next one gets what is open.
const DRAIN: Duration = Duration::from_secs(3);

/// What the device asks of its thread.
pub(crate) enum Command {
    /// The driver is there.
    Activate(Box<DeviceContext>),
    /// A queue runs.
    Start(Box<VirtQueue>),
    /// It stops. Urgent.
    Stop(u16, SyncSender<Option<VirtQueue>>),
    /// The driver chose other interrupts.
    Interrupts,
    /// Pages that the daemon writes are logged there from now on, or no longer.
    Log(Option<Arc<PageLog>>, SyncSender<Result<(), LinkError>>),
    /// The guest moves to another process, or comes from one.
    Move(Move, SyncSender<Result<(), LinkError>>),
    /// Guest memory came or went.
    Memory(SyncSender<Result<(), LinkError>>),
    /// Something about the daemon's state.
    State(StateOrder),
    /// The driver is gone; all its queues have stopped. Urgent.
    Reset(SyncSender<()>),
    /// The driver reads the configuration space, as far as its first so many bytes.
    Read(usize, SyncSender<Vec<u8>>),
    /// It writes at this place of it.
    Write(u32, Vec<u8>, SyncSender<()>),
}

/// What an event is about, in the upper half of its number; the lower one has a queue's index.
const WAKE: u64 = 1 << 32;
const STOP: u64 = 2 << 32;
const SOCKET: u64 = 3 << 32;
const KICK: u64 = 4 << 32;
const CALL: u64 = 5 << 32;
const DOOR: u64 = 6 << 32;

/// The way to the daemon.
enum Link {
    Up {
        session: Box<Session>,
        since: Instant,
        /// It has answered a request.
        useful: bool,
        /// How requests get there, once the daemon knows the guest's memory.
        way: Option<Way>,
    },
    Down {
        since: Instant,
        next: Instant,
    },
}

/// How requests get to the daemon.
enum Way {
    /// It works on the guest's rings.
    Direct,
    /// It works on these.
    Relay(Shadow),
}

/// The state of the thread.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    epoll: Epoll,
    link: Link,
    /// A daemon that connected and was not asked yet.
    waiting: Option<Connection>,
    /// Tries in vain since the last good connection.
    tries: u32,
    /// Why the last try failed, as it was told.
    told: Option<String>,
    connected_before: bool,
    context: Option<Box<DeviceContext>>,
    /// The daemon does not know yet that the driver is there.
    announce: bool,
    lanes: Vec<Option<Lane>>,
    paused: Vec<Option<Pause>>,
    /// What daemons note of the requests they have, as long as there is this driver.
    record: Option<Inflight>,
    /// Where daemons log the pages they write.
    pages: Option<Arc<PageLog>>,
    failing: bool,
    log: RateLimit,
}

impl Engine {
    pub(crate) fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let queues = shared.peer.kind.queue_sizes().len();
        let now = Instant::now();
        Ok(Self {
            shared,
            epoll: Epoll::new()?,
            link: Link::Down { since: now, next: now },
            waiting: None,
            tries: 0,
            told: None,
            connected_before: false,
            context: None,
            announce: false,
            lanes: (0..queues).map(|_| None).collect(),
            paused: (0..queues).map(|_| None).collect(),
            record: None,
            pages: None,
            failing: false,
            log: RateLimit::default(),
        })
    }

    /// Works until `stop` becomes readable.
    pub(crate) fn run(&mut self, commands: &Receiver<Command>, stop: &EventFd) {
        let shared = self.shared.clone();
        let watched = self.watch(shared.wake.event().as_raw_fd(), WAKE);
        if let Err(error) = watched.and_then(|()| self.watch(stop.as_raw_fd(), STOP)) {
            return tracing::error!(device = %shared.id, %error, "cannot wait for work, the device stands still");
        }
        if let Some(door) = shared.peer.options.endpoint.door()
            && let Err(error) = self.watch(door.as_raw_fd(), DOOR)
        {
            return tracing::error!(device = %shared.id, %error, "cannot wait for daemons, the device stands still");
        }
        let mut events = [EpollEvent::default(); 32];
        loop {
            let timeout = self.work(commands);
            let count = match self.epoll.wait(timeout, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Ok(count) => count,
                Err(error) => {
                    return tracing::error!(device = %shared.id, %error, "cannot wait for work, the device stands still");
                }
            };
            for event in events.iter().take(count) {
                let (what, index) = (event.data() >> 32 << 32, event.data() as u32 as usize);
                match what {
                    STOP => return,
                    WAKE => shared.wake.clear(),
                    SOCKET => self.listen(),
                    DOOR => self.opened(),
                    KICK => self.kicked(index),
                    _ => self.called(index),
                }
            }
        }
    }

    /// Does what there is to do; returns how long nothing will be, in milliseconds, as `epoll_wait` takes it.
    fn work(&mut self, commands: &Receiver<Command>) -> i32 {
        loop {
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            self.catch_up();
            let timeout = self.tend();
            // Whoever waits for a daemon takes note of rings. So there may be an order by now, or something to catch up with, that rings no more.
            if !self.shared.wake.was_heard() {
                return timeout;
            }
        }
    }

    fn watch(&self, fd: RawFd, what: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, what);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// It is an event descriptor the daemon has too, so closing it is not enough.
    fn unwatch(&self, fd: RawFd) {
        // One that is not watched needs nothing.
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Activate(context) => {
                self.context = Some(context);
                self.announce = true;
                let done = self.introduce();
                self.check(done);
            }
            Command::Start(queue) => self.start(*queue),
            Command::Read(length, reply) => {
                let read = |session: &Session| session.read_config(length, &self.shared.wake);
                let (bytes, done) = match self.session().map_or(Ok(Vec::new()), read) {
                    Ok(bytes) => (bytes, Ok(())),
                    Err(error) => (Vec::new(), Err(error)),
                };
                // Whoever asked may have gone on without it.
                let _ = reply.send(bytes);
                self.check(done);
            }
            Command::Write(at, data, reply) => {
                let write = |session: &Session| session.set_config(at, &data, &self.shared.wake);
                let done = self.session().map_or(Ok(()), write);
                let _ = reply.send(());
                self.check(done);
            }
            Command::Stop(index, reply) => {
                self.shared.wake.taken();
                let queue = self.stop(usize::from(index));
                // Whoever asked waits for it.
                let _ = reply.send(queue);
            }
            Command::Interrupts => {
                let done = self.redirect();
                self.check(done);
            }
            Command::Log(log, reply) => {
                let done = self.log_pages(log);
                // Who wants no log waits for nothing.
                let _ = reply.send(done);
            }
            Command::Move(step, reply) => {
                let done = self.step(&step);
                let _ = reply.send(done);
            }
            Command::Memory(reply) => self.remap(&reply),
            Command::State(order) => self.transfer(order),
            Command::Reset(reply) => {
                self.shared.wake.taken();
                self.context = None;
                self.announce = false;
                self.paused.iter_mut().for_each(|pause| *pause = None);
                self.record = None;
                if let Link::Up { session, .. } = &self.link {
                    let done = session.set_status(false, &self.shared.wake);
                    self.check(done);
                }
                let _ = reply.send(());
            }
        }
    }

    /// The connection, if there is one.
    fn session(&self) -> Option<&Session> {
        match &self.link {
            Link::Up { session, .. } => Some(session),
            Link::Down { .. } => None,
        }
    }

    /// Gives the connection up if something on it failed.
    fn check(&mut self, done: Result<(), LinkError>) {
        if let Err(error) = done {
            self.lost(&error);
        }
    }

    /// Tells the daemon of driver and memory, if it does not know them yet.
    fn introduce(&mut self) -> Result<(), LinkError> {
        let (Some(context), Link::Up { session, way, .. }) = (&self.context, &mut self.link) else {
            return Ok(());
        };
        let (kind, wake) = (&self.shared.peer.kind, &self.shared.wake);
        session.set_log(self.pages.as_deref(), wake)?;
        session.set_features(context.features, wake)?;
        session.set(kind.settings(context.features), wake)?;
        if way.is_none() {
            let memory = self.shared.whole(&context.memory.memory());
            *way = Some(if session.direct {
                session.share(&[&memory], wake)?;
                Way::Direct
            } else {
                let rings = Shadow::new(own_memory(&memory), kind.queue_sizes())?;
                session.share(&[&memory, rings.memory()], wake)?;
                Way::Relay(rings)
            });
            session.announce(kind.queue_sizes().len() as u16, wake)?;
        }
        if session.direct && kind.needs_record() {
            let record = match &mut self.record {
                Some(record) => record,
                none => none.insert(session.new_record(kind.queue_sizes(), wake)?),
            };
            session.set_record(record, wake)?;
        }
        Ok(())
    }

    /// What follows from orders and from writes of the driver to the configuration space.
    fn catch_up(&mut self) {
        let Link::Up { session, .. } = &mut self.link else {
            return;
        };
        let wake = &self.shared.wake;
        let written = self.shared.written().clone();
        let mut done = written
            .into_iter()
            .try_for_each(|(at, byte)| session.write_config(at, byte, wake));
        let kind = &self.shared.peer.kind;
        let running = (0u16..).zip(&self.lanes).filter(|(_, lane)| lane.is_some());
        for (index, _) in running {
            done = done.and_then(|()| session.enable(index, kind.enabled(index), wake));
        }
        if self.announce && !self.shared.peer.is_away() {
            self.announce = false;
            done = done.and_then(|()| session.set_status(true, wake));
        }
        let changed = session.config_changed();
        self.check(done);
        if changed {
            self.changed();
        }
    }

    /// Connects when it is time, and fails requests when it is time for that. Returns how long there is nothing to do, in ms.
    fn tend(&mut self) -> i32 {
        let Link::Down { next, .. } = self.link else {
            return -1;
        };
        if self.has_somebody() && Instant::now() >= next && !self.shared.wake.is_urgent() {
            let done = self.connect();
            self.check(done);
        }
        let Link::Down { since, next } = self.link else {
            return 0;
        };
        let now = Instant::now();
        let mut until = self.has_somebody().then_some(next);
        if let OnDisconnect::ErrorAfter(time) = self.shared.peer.options.on_disconnect
            && !self.failing
        {
            if now >= since + time {
                self.give_up(time);
            } else {
                until = Some(until.map_or(since + time, |until| until.min(since + time)));
            }
        }
        let Some(until) = until else {
            return -1;
        };
        let left = until.saturating_duration_since(now).as_millis();
        // Rounded up, not to look in vain.
        i32::try_from(left).map_or(i32::MAX, |ms| ms + 1)
    }

    /// Whether there may be a daemon to ask.
    fn has_somebody(&self) -> bool {
        self.waiting.is_some() || self.shared.peer.options.endpoint.door().is_none() || self.shared.peer.has_first()
    }

    /// A daemon connected. It is asked when it is time; while there is one already, it is sent away.
    fn opened(&mut self) {
        // The one before may just have ended.
        self.listen();
        match self.shared.peer.options.endpoint.connect() {
            Ok(connection) if self.waiting.is_none() && matches!(self.link, Link::Down { .. }) => {
                self.waiting = Some(connection);
            }
            Ok(_) => self.warn(&"another daemon connected and was sent away: the device has one"),
            Err(LinkError::Nobody(_)) => {}
            Err(error) => self.warn(&error),
        }
    }

    fn connect(&mut self) -> Result<(), LinkError> {
        let shared = self.shared.clone();
        let peer = &shared.peer;
        let session = match (peer.take_first(), self.waiting.take()) {
            (Some(session), waiting) => {
                self.waiting = waiting;
                session
            }
            (None, Some(connection)) => Session::open(connection, &peer.terms(), &shared.wake)?,
            (None, None) => Session::open(peer.options.endpoint.connect()?, &peer.terms(), &shared.wake)?,
        };
        peer.continues(&session.offer)?;
        let down = std::mem::replace(
            &mut self.link,
            Link::Up {
                session: Box::new(session),
                since: Instant::now(),
                useful: false,
                way: None,
            },
        );
        if let Err(error) = self.settle() {
            // It never was up: the time without a daemon goes on.
            self.leave();
            self.link = down;
            return Err(error);
        }
        self.failing = false;
        self.told = None;
        let again = std::mem::replace(&mut self.connected_before, true);
        if again {
            tracing::info!(device = %shared.id, "the daemon is back");
            if self.context.is_some()
                && let Some(session) = self.session()
            {
                session.set(peer.kind.returned(), &shared.wake)?;
            }
        }
        self.publish(LinkState::Connected, None, again);
        self.changed();
        Ok(())
    }

    /// Tells a new daemon all that the driver told before.
    fn settle(&mut self) -> Result<(), LinkError> {
        if let Link::Up { session, .. } = &self.link {
            for socket in session.sockets() {
                let watched = self.watch(socket.as_raw_fd(), SOCKET);
                watched.map_err(LinkError::host("a watch on the connection"))?;
            }
        }
        self.announce = self.context.is_some();
        self.introduce()?;
        (0..self.lanes.len()).try_for_each(|index| self.hand_over(index))
    }

    /// The daemon's configuration space may be another one. The guest hears of it when it is.
    fn changed(&mut self) {
        let Link::Up { session, .. } = &mut self.link else {
            return;
        };
        let peer = self.shared.peer.clone();
        let done = session
            .refresh(&self.shared.wake)
            .and_then(|()| peer.continues(&session.offer));
        if done.is_err() {
            return self.check(done);
        }
        let known = peer.known().clone();
        let differs = peer.kind.asks() || self.shared.config(&session.offer) != self.shared.config(&known);
        peer.learn(&session.offer.config);
        if differs && let Some(context) = &self.context {
            tracing::info!(device = %self.shared.id, "the daemon changed the {}", peer.kind.noun());
            if let Err(error) = context.interrupt.config() {
                self.warn(&format_args!("cannot tell the guest of a changed device: {error}"));
            }
        }
    }

    /// Something came from the daemon.
    fn listen(&mut self) {
        let Link::Up { session, .. } = &self.link else {
            return;
        };
        match session.look() {
            Ok(()) if session.config_changed() => self.changed(),
            Ok(()) => {}
            Err(error) => self.lost(&error),
        }
    }

    /// The connection ended, or could not be made.
    fn lost(&mut self, error: &LinkError) {
        self.leave();
        let now = Instant::now();
        let interrupted = matches!(error, LinkError::Interrupted);
        let (since, was_up) = match self.link {
            Link::Up { since, useful, .. } => {
                // One that dies again and again before it does anything is not tried all the time.
                if useful || since.elapsed() >= PROVEN {
                    self.tries = 0;
                }
                (now, true)
            }
            Link::Down { since, .. } => (since, false),
        };
        self.link = Link::Down {
            since,
            next: now + delay(self.tries),
        };
        if !interrupted {
            self.tries = self.tries.saturating_add(1);
        }
        let reason = error.to_string();
        let news = was_up || self.told.as_ref() != Some(&reason);
        if news && !interrupted {
            let waits = if self.failing { "fail" } else { "wait" };
            self.warn(&format_args!("{reason}; its requests {waits} until a daemon is back"));
            self.told = Some(reason.clone());
        }
        if news || was_up {
            let state = if self.failing {
                LinkState::Failing
            } else {
                LinkState::Disconnected
            };
            self.publish(state, Some(reason), false);
        }
    }

    /// No daemon came back in time.
    fn give_up(&mut self, time: Duration) {
        self.failing = true;
        let seconds = time.as_secs();
        self.warn(&format_args!(
            "no daemon came back in {seconds} s, its requests fail until one does"
        ));
        self.publish(LinkState::Failing, self.told.clone(), false);
        self.fail();
    }

    fn publish(&self, state: LinkState, reason: Option<String>, again: bool) {
        let now = {
            let mut status = self.shared.status.lock().unwrap_or_else(PoisonError::into_inner);
            if status.state != state {
                status.since = SystemTime::now();
            }
            status.state = state;
            if reason.is_some() {
                status.reason = reason;
            }
            if let Link::Up { session, .. } = &self.link {
                status.direct = session.direct;
                status.logs = session.check_log().is_ok();
                status.hands_over = session.hands_over();
            }
            status.reconnects += u64::from(again);
            status.clone()
        };
        self.shared.peer.kind.link(state);
        (self.shared.notify)(&now);
    }

    fn warn(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(device = %self.shared.id, held_back, "{message}");
        }
    }
}

/// How long until the next try after `tries` in vain.
fn delay(tries: u32) -> Duration {
    match tries {
        0 => Duration::ZERO,
        tries => FIRST_DELAY.saturating_mul(1 << (tries - 1).min(16)).min(LAST_DELAY),
    }
}
