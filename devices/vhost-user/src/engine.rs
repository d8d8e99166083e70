//! The thread of a device: it connects, relays, and connects again.

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

use crate::device::Shared;
use crate::relay::{Parked, Relay};
use crate::session::{Session, beyond};
use crate::shadow::Shadow;
use crate::{LinkError, LinkState, OnDisconnect};

/// How long until the next try: from this, doubled each time, to that.
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
    /// The driver is gone; all its queues have stopped. Urgent.
    Reset(SyncSender<()>),
}

/// What an event is about, in the upper half of its number; the lower one has a queue's index.
const WAKE: u64 = 1 << 32;
const STOP: u64 = 2 << 32;
const SOCKET: u64 = 3 << 32;
const KICK: u64 = 4 << 32;
const CALL: u64 = 5 << 32;

/// The way to the daemon.
enum Link {
    Up {
        session: Box<Session>,
        since: Instant,
        /// It has answered a request.
        useful: bool,
        /// Rings for the daemon, once it knows the guest's memory.
        shadow: Option<Shadow>,
    },
    Down {
        since: Instant,
        next: Instant,
    },
}

/// The state of the thread.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    epoll: Epoll,
    link: Link,
    delay: Duration,
    /// Why the last try failed, as it was told.
    told: Option<String>,
    connected_before: bool,
    context: Option<Box<DeviceContext>>,
    /// The daemon does not know yet that the driver is there.
    announce: bool,
    relays: Vec<Option<Relay>>,
    parked: Vec<Option<Parked>>,
    failing: bool,
    log: RateLimit,
}

impl Engine {
    pub(crate) fn new(shared: Arc<Shared>, commands: Receiver<Command>) -> io::Result<Self> {
        let queues = shared.peer.kind.queue_sizes().len();
        let now = Instant::now();
        Ok(Self {
            shared,
            commands,
            epoll: Epoll::new()?,
            link: Link::Down { since: now, next: now },
            delay: FIRST_DELAY,
            told: None,
            connected_before: false,
            context: None,
            announce: false,
            relays: (0..queues).map(|_| None).collect(),
            parked: (0..queues).map(|_| None).collect(),
            failing: false,
            log: RateLimit::default(),
        })
    }

    /// Works until `stop` becomes readable.
    pub(crate) fn run(&mut self, stop: &EventFd) {
        let shared = self.shared.clone();
        let watched = self.watch(shared.wake.event().as_raw_fd(), WAKE);
        if let Err(error) = watched.and_then(|()| self.watch(stop.as_raw_fd(), STOP)) {
            return tracing::error!(device = %shared.id, %error, "cannot wait for work, the device stands still");
        }
        let mut events = [EpollEvent::default(); 32];
        loop {
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            self.catch_up();
            let timeout = self.tend();
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
                    KICK => self.kicked(index),
                    _ => self.called(index),
                }
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
            Command::Stop(index, reply) => {
                self.shared.wake.taken();
                let queue = self.stop(usize::from(index));
                // Whoever asked waits for it.
                let _ = reply.send(queue);
            }
            Command::Reset(reply) => {
                self.shared.wake.taken();
                self.context = None;
                self.announce = false;
                self.parked.iter_mut().for_each(|parked| *parked = None);
                if let Link::Up { session, .. } = &self.link {
                    let done = session.set_status(false, &self.shared.wake);
                    self.check(done);
                }
                let _ = reply.send(());
            }
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
        let (Some(context), Link::Up { session, shadow, .. }) = (&self.context, &mut self.link) else {
            return Ok(());
        };
        let wake = &self.shared.wake;
        session.set_features(context.features, wake)?;
        if shadow.is_none() {
            let memory = context.memory.memory();
            let rings = Shadow::new(beyond(&memory), self.shared.peer.kind.queue_sizes())?;
            session.share(&[&*memory, rings.memory()], wake)?;
            *shadow = Some(rings);
        }
        Ok(())
    }

    /// Hands queue `index` to the daemon, with what is open.
    fn hand_over(&mut self, index: usize) -> Result<(), LinkError> {
        let Link::Up {
            session,
            shadow: Some(shadow),
            ..
        } = &self.link
        else {
            return Ok(());
        };
        let Some(relay) = self.relays.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        relay.connect(shadow)?;
        if let Some(ring) = relay.ring() {
            session.start(&ring, &self.shared.wake)?;
            let event = EpollEvent::new(EventSet::IN, CALL | index as u64);
            let watched = self.epoll.ctl(ControlOperation::Add, ring.call.as_raw_fd(), event);
            watched.map_err(LinkError::host("a watch on a ring"))?;
        }
        if relay.open() > 0 {
            let open = u64::from(relay.open());
            self.shared
                .status
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .resubmitted += open;
        }
        relay.nudge();
        relay.forward()
    }

    fn start(&mut self, queue: VirtQueue) {
        let index = usize::from(queue.index());
        let Some(slot) = self.relays.get_mut(index) else {
            return;
        };
        let parked = self.parked.get_mut(index).and_then(Option::take);
        let relay = slot.insert(Relay::new(queue, parked));
        let kick = relay.queue().kick().as_raw_fd();
        if let Err(error) = self.watch(kick, KICK | index as u64) {
            tracing::error!(device = %self.shared.id, %error, "cannot wait for the driver, the queue stands still");
        }
        let done = self.hand_over(index);
        self.check(done);
        // The notification of what is there already may have been taken before.
        self.kicked(index);
    }

    /// Takes a queue back, if possible with nothing open.
    fn stop(&mut self, index: usize) -> Option<VirtQueue> {
        let done = self.drain(index);
        self.check(done);
        let mut relay = self.relays.get_mut(index)?.take()?;
        self.unwatch(relay.queue().kick().as_raw_fd());
        if let Some(call) = relay.call() {
            self.unwatch(call.as_raw_fd());
        }
        relay.disconnect();
        let (queue, parked) = relay.into_parts();
        self.parked[index] = Some(parked);
        Some(queue)
    }

    /// Waits until the daemon has answered all of a queue's requests, and takes the ring from it.
    fn drain(&mut self, index: usize) -> Result<(), LinkError> {
        let Link::Up { session, .. } = &self.link else {
            return Ok(());
        };
        let relay = self.relays.get_mut(index).and_then(Option::as_mut);
        let Some(relay) = relay.filter(|relay| relay.call().is_some()) else {
            return Ok(());
        };
        let deadline = Instant::now() + DRAIN;
        relay.collect()?;
        while relay.open() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Silent("the requests it had"));
            }
            let mut fds: Vec<_> = session.sockets().collect();
            fds.extend(relay.call().map(std::os::fd::AsFd::as_fd));
            crate::connection::wait_any(&fds, left)?;
            session.look()?;
            relay.collect()?;
        }
        session.stop(index as u16, &self.shared.wake)
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
        if std::mem::take(&mut self.announce) {
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
        if Instant::now() >= next && !self.shared.wake.is_urgent() {
            let done = self.connect();
            self.check(done);
        }
        let Link::Down { since, next } = self.link else {
            return 0;
        };
        let now = Instant::now();
        let mut until = next;
        if let OnDisconnect::ErrorAfter(time) = self.shared.peer.options.on_disconnect
            && !self.failing
        {
            if now >= since + time {
                self.give_up(time);
            } else {
                until = until.min(since + time);
            }
        }
        let left = until.saturating_duration_since(now).as_millis();
        // Rounded up, not to look in vain.
        i32::try_from(left).map_or(i32::MAX, |ms| ms + 1)
    }

    fn connect(&mut self) -> Result<(), LinkError> {
        let shared = self.shared.clone();
        let peer = &shared.peer;
        let session = match peer.take_first() {
            Some(session) => session,
            None => Session::open(&peer.options.socket, &*peer.kind, &shared.wake)?,
        };
        peer.continues(&session.offer)?;
        let down = std::mem::replace(
            &mut self.link,
            Link::Up {
                session: Box::new(session),
                since: Instant::now(),
                useful: false,
                shadow: None,
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
        (0..self.relays.len()).try_for_each(|index| self.hand_over(index))
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
        let differs = self.shared.config(&session.offer) != self.shared.config(&known);
        peer.known().config.clone_from(&session.offer.config);
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

    /// The driver notified.
    fn kicked(&mut self, index: usize) {
        let failing = self.failing;
        let Some(relay) = self.relays.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        let _ = relay.queue().kick().read();
        if failing {
            return relay.fail(&*self.shared.peer.kind);
        }
        let done = relay.forward();
        self.check(done);
    }

    /// The daemon completed something.
    fn called(&mut self, index: usize) {
        let Some(relay) = self.relays.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        match relay.collect() {
            Ok(count) => {
                if let Link::Up { useful, .. } = &mut self.link {
                    *useful |= count > 0;
                }
            }
            Err(error) => self.lost(&error),
        }
    }

    /// Takes everything back from the daemon.
    fn leave(&mut self) {
        for relay in self.relays.iter_mut().flatten() {
            let call = relay.call().map(AsRawFd::as_raw_fd);
            if let Some(fd) = call {
                // As `unwatch`.
                let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            }
            relay.disconnect();
        }
        if let Link::Up { session, .. } = &self.link {
            session.sockets().for_each(|socket| self.unwatch(socket.as_raw_fd()));
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
                    self.delay = FIRST_DELAY;
                }
                (now, true)
            }
            Link::Down { since, .. } => (since, false),
        };
        self.link = Link::Down {
            since,
            next: now + self.delay,
        };
        if !interrupted {
            self.delay = (self.delay * 2).min(LAST_DELAY);
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
        let kind = &*self.shared.peer.kind;
        self.relays.iter_mut().flatten().for_each(|relay| relay.fail(kind));
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
            status.reconnects += u64::from(again);
            status.clone()
        };
        (self.shared.notify)(&now);
    }

    fn warn(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(device = %self.shared.id, held_back, "{message}");
        }
    }
}
