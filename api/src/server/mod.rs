//! The HTTP server: one thread, one unix socket, many clients.
//!
//! [`Server::run`] is the loop of the thread `http-server`. It never waits for a client nor for the VM: a [`Service`] either answers at
//! once ([`Served::Now`]) or takes a [`Later`] to the thread that does the work. So a client that sends or reads slowly, or waits for a
//! boot, delays only itself. [`Router`] is the service that speaks the API; it leaves changing calls to a
//! [`Handler`](crate::Handler) and answers questions from what the handler publishes.
//!
//! ```text
//! accept ─► Idle ─► Request ─► whole request ─► service ─► Reader ─► Idle     (response sent, keep-alive)
//!             │        │                          │  ▲        └────► Linger   (Connection: close, or a request that was no request)
//!             ▼        ▼                          ▼  │ Later::respond
//!           closed    408 ─► Linger ─► closed    Answer
//! ```

mod body;
mod connection;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod http;
mod input;
mod later;
mod listener;
mod progress;
mod route;
mod router;
#[allow(unsafe_code)] // peer credentials, inherited descriptors
mod sys;

use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use thiserror::Error;

use connection::{Connection, Next};
use later::Mailbox;

pub(crate) use http::ascii;
pub use http::{Method, Response};
pub use later::{Later, Stopper, StreamWaker};
pub use listener::{ListenError, Listener, Passage};
pub use route::{Action, ROUTES, Route};
pub use router::{Identity, Router};
pub use sys::inherited;

/// Who is at the other end of a connection, when it was made (SO_PEERCRED).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process; 0 if this process cannot see it.
    pub pid: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A whole request.
#[derive(Debug)]
pub struct Call<'a> {
    /// What to do.
    pub method: Method,
    /// With what: the path, without a query.
    pub path: &'a str,
    /// What stands behind the question mark, if anything.
    pub query: &'a str,
    /// The body.
    pub body: &'a [u8],
    /// Descriptors that came with it, in order.
    pub fds: Vec<OwnedFd>,
    /// Who calls.
    pub peer: Peer,
}

/// How a call was served.
pub enum Served {
    /// With this response.
    Now(Response),
    /// With a response that has no end.
    Stream(Box<dyn Stream>),
    /// The response comes through the [`Later`] that was taken.
    Later,
}

/// The lines of a response that has no end. The client closes the connection when it has enough, the server when it ends itself.
pub trait Stream: Send {
    /// Appends whole lines to `output`, `space` bytes or a little more; none if there are none now.
    fn fill(&mut self, space: usize, output: &mut Vec<u8>);

    /// When there will be more, if that is known. Otherwise a [`StreamWaker`] tells.
    fn due(&self) -> Option<Instant>;
}

/// Answers calls.
pub trait Service: Send {
    /// The server is made. Streams of this service tell through `waker` that they have more.
    fn attach(&mut self, _waker: StreamWaker) {}

    /// Answers `call`, or takes a [`Later`] for it; one that is dropped responds with 500. It must not wait for anything.
    fn serve(&mut self, call: Call<'_>, later: &dyn Fn() -> Later) -> Served;
}

/// What clients must not exceed.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a request's head.
    pub head: usize,
    /// Bytes of a request's body.
    pub body: usize,
    /// Clients at once. One more takes the place of the one that was idle for longest.
    pub connections: usize,
    /// Clients with a stream at once, which count as connections too. One more takes the place of one that left what it was sent unread
    /// for longer than `unread`, or is refused.
    pub streams: usize,
    /// How long a connection may stay without a request.
    pub idle: Duration,
    /// How long a request may take to arrive.
    pub request: Duration,
    /// How long a client may leave a response unread.
    pub unread: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: 8 << 10,
            body: 512 << 10,
            connections: 64,
            streams: 16,
            idle: Duration::from_secs(600),
            request: Duration::from_secs(10),
            unread: Duration::from_secs(10),
        }
    }
}

/// Why the server cannot go on.
#[derive(Debug, Error)]
#[error("the API server cannot {what}")]
pub struct ServerError {
    what: &'static str,
    source: std::io::Error,
}

fn failed(what: &'static str) -> impl Fn(Errno) -> ServerError {
    move |error| ServerError {
        what,
        source: error.into(),
    }
}

const LISTENER: u64 = 0;
const MAILBOX: u64 = 1;
const FIRST_CONNECTION: u64 = 2;
/// Events taken from the kernel in one go.
const EVENTS: usize = 32;
/// Connections accepted before the others have a turn.
const ACCEPT_TURN: usize = 16;
/// How long nobody is accepted when there is no descriptor left for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long responses may take to be sent when the server ends.
const FAREWELL: Duration = Duration::from_millis(200);

/// The server.
pub struct Server {
    limits: Limits,
    listener: Listener,
    service: Box<dyn Service>,
    epoll: OwnedFd,
    mailbox: Mailbox,
    connections: BTreeMap<u64, Connection>,
    next_id: u64,
    /// Connections that have more to serve.
    ready: VecDeque<u64>,
    /// When to accept again.
    accept_at: Option<Instant>,
}

impl Server {
    /// A server of `service` on `listener`.
    pub fn new(listener: Listener, mut service: Box<dyn Service>, limits: Limits) -> Result<Self, ServerError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed("make an epoll descriptor"))?;
        let mailbox = Mailbox::new().map_err(failed("make an event descriptor"))?;
        service.attach(StreamWaker(mailbox.clone()));
        let watch = failed("watch its descriptors");
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN).map_err(&watch)?;
        epoll::add(&epoll, &mailbox, EventData::new_u64(MAILBOX), EventFlags::IN).map_err(&watch)?;
        Ok(Self {
            limits,
            listener,
            service,
            epoll,
            mailbox,
            connections: BTreeMap::new(),
            next_id: FIRST_CONNECTION,
            ready: VecDeque::new(),
            accept_at: None,
        })
    }

    /// What ends [`run`](Self::run).
    pub fn stopper(&self) -> Stopper {
        Stopper(self.mailbox.clone())
    }

    /// Serves until it is stopped.
    pub fn run(&mut self) -> Result<(), ServerError> {
        loop {
            if self.turn(self.timeout(Instant::now()))? {
                break;
            }
        }
        let end = Instant::now() + FAREWELL;
        // A stream that has more than fits into one turn is ready for another.
        while !self.ready.is_empty() || self.connections.values().any(Connection::has_output) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let timeout = if self.ready.is_empty() { left } else { Duration::ZERO };
            self.turn(Some(timeout))?;
        }
        Ok(())
    }

    /// How long nothing is to be done unless something happens.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let deadlines = self.connections.values().filter_map(|c| c.deadline(&self.limits));
        let items = self.connections.values().filter_map(Connection::item_due);
        let first = deadlines.chain(items).chain(self.accept_at).min()?;
        // The kernel counts whole milliseconds: what is rounded down would wake us too early, again and again.
        Some(first.saturating_duration_since(now) + Duration::from_millis(1))
    }

    /// Waits for events and handles them. True: stop.
    fn turn(&mut self, timeout: Option<Duration>) -> Result<bool, ServerError> {
        let mut buffer = [const { MaybeUninit::<Event>::uninit() }; EVENTS];
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => &mut [],
            Err(error) => return Err(failed("wait for events")(error)),
        };
        let mut stop = false;
        for event in events {
            let (id, flags) = (event.data.u64(), event.flags);
            match id {
                LISTENER => self.accept(),
                MAILBOX => stop |= self.read_mail(),
                _ => self.serve(id, |c, service, mailbox| c.on_event(flags, service, mailbox, id)),
            }
        }
        for _ in 0..self.ready.len() {
            if let Some(id) = self.ready.pop_front() {
                self.serve(id, |c, service, mailbox| c.advance(service, mailbox, id));
            }
        }
        self.expire(Instant::now());
        Ok(stop)
    }

    fn read_mail(&mut self) -> bool {
        let mail = self.mailbox.empty();
        for (id, response) in mail.responses {
            self.serve(id, |c, service, mailbox| c.on_response(&response, service, mailbox, id));
        }
        if mail.streams {
            self.pump_streams(|c| c.wants_item());
        }
        mail.stop
    }

    /// Sends what streams have, those that `which` chooses.
    fn pump_streams(&mut self, which: impl Fn(&Connection) -> bool) {
        let streams = self.connections.iter().filter(|(_, c)| which(c));
        let ids: Vec<u64> = streams.map(|(id, _)| *id).collect();
        for id in ids {
            self.serve(id, |c, _, _| c.pump());
        }
    }

    /// Lets a connection have the stream it asks for, if there are not too many.
    fn admit_stream(&mut self, id: u64) {
        let streams = self.connections.values().filter(|c| c.is_stream()).count();
        let allowed = streams <= self.limits.streams || self.close_stuck();
        self.mailbox.set_streaming(true);
        let refusal = Response::error(429, "too many clients follow a stream; close one of them");
        self.serve(id, |c, _, _| {
            c.begin_stream(if allowed { Ok(()) } else { Err(&refusal) })
        });
    }

    /// Closes the stream that was left unread for longest, if that is long enough; whether there was one.
    fn close_stuck(&mut self) -> bool {
        let stuck = self
            .connections
            .iter()
            .filter_map(|(id, c)| Some((c.stuck_since()?, *id)));
        match stuck.min() {
            Some((since, id)) if since.elapsed() > self.limits.unread => {
                self.close(id);
                true
            }
            _ => false,
        }
    }

    /// Lets a connection do something and does what it wants next. A connection that is gone is none of our business.
    fn serve(&mut self, id: u64, action: impl FnOnce(&mut Connection, &mut dyn Service, &Mailbox) -> Next) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let next = action(connection, self.service.as_mut(), &self.mailbox);
        let interest = connection.interest();
        if next != Next::Close && interest != connection.watched {
            connection.watched = interest;
            if epoll::modify(&self.epoll, &*connection, EventData::new_u64(id), interest).is_err() {
                self.close(id);
                return;
            }
        }
        match next {
            Next::Close => self.close(id),
            Next::Stream => self.admit_stream(id),
            Next::Again if !self.ready.contains(&id) => self.ready.push_back(id),
            Next::Again | Next::Wait => {}
        }
    }

    /// Closing a descriptor nobody else has takes it off the epoll descriptor.
    fn close(&mut self, id: u64) {
        let removed = self.connections.remove(&id);
        self.ready.retain(|other| *other != id);
        if removed.is_some_and(|c| c.is_stream()) {
            self.mailbox
                .set_streaming(self.connections.values().any(Connection::is_stream));
        }
    }

    fn expire(&mut self, now: Instant) {
        let late = |c: &Connection| c.deadline(&self.limits).is_some_and(|deadline| deadline <= now);
        let ids: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, c)| late(c))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.serve(id, |c, _, _| c.expire());
        }
        self.pump_streams(|c| c.item_due().is_some_and(|due| due <= now));
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
            self.watch_listener(EventFlags::IN);
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_TURN {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => self.welcome(socket),
                Err(Errno::AGAIN) => return,
                // The client went away; the next one may still be there.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!("cannot accept an API client: {error}");
                    // The cause is a want of descriptors or memory, and the client still waits: without a pause this would spin.
                    self.close_idle();
                    self.accept_at = Some(Instant::now() + ACCEPT_PAUSE);
                    self.watch_listener(EventFlags::empty());
                    return;
                }
            }
        }
    }

    fn watch_listener(&self, interest: EventFlags) {
        if let Err(error) = epoll::modify(&self.epoll, &self.listener, EventData::new_u64(LISTENER), interest) {
            tracing::error!("cannot wait for API clients: {error}");
        }
    }

    fn welcome(&mut self, socket: OwnedFd) {
        if self.connections.len() >= self.limits.connections && !self.close_idle() {
            let mut text = Vec::new();
            Response::error(503, "too many API clients are connected").write(&mut text, false);
            // It fits into an empty socket, or the client is gone.
            let _ = rustix::net::send(&socket, &text, rustix::net::SendFlags::NOSIGNAL);
            return;
        }
        let Ok(peer) = sys::peer(&socket) else { return };
        let id = self.next_id;
        let mut connection = Connection::new(socket, peer, &self.limits);
        connection.watched = EventFlags::IN;
        if let Err(error) = epoll::add(&self.epoll, &connection, EventData::new_u64(id), EventFlags::IN) {
            tracing::warn!("cannot watch an API client: {error}");
            return;
        }
        self.next_id += 1;
        self.connections.insert(id, connection);
    }

    /// Closes the connection that was idle for longest; false if none is idle.
    fn close_idle(&mut self) -> bool {
        let idle = self
            .connections
            .iter()
            .filter_map(|(id, c)| Some((c.idle_since()?, *id)));
        match idle.min() {
            Some((_, id)) => {
                self.close(id);
                true
            }
            None => false,
        }
    }
}
