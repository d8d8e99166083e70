//! A vhost-user socket, and the thread that serves its front ends, one after the other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use triarch_api::chain;
use triarch_api::server::Listener;
use triarch_daemon::backend::{ChannelError, Session, SessionError};
use triarch_device_core::{Event, RateLimit, Sandbox, ThreadClass};

use crate::device::PortDevice;

/// How long is waited before the next try to connect, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long nobody is accepted when there is no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where front ends come from.
pub enum Door {
    /// They connect here.
    Server(Listener),
    /// They are connected to.
    Client(SocketAddrUnix),
}

impl Door {
    /// One that leads to a front end that listens at `path`.
    pub fn client(path: &Path) -> io::Result<Self> {
        Ok(Self::Client(SocketAddrUnix::new(path)?))
    }
}

/// What a port's thread counts.
#[derive(Debug, Default)]
pub struct ServerCounters {
    /// Front ends that were connected.
    pub connections: AtomicU64,
    /// Connections that ended for what the front end said or did not say.
    pub broken: AtomicU64,
}

/// The thread of a port. Dropped, it ends.
pub struct PortServer {
    stop: Event,
    thread: Option<JoinHandle<()>>,
    counters: Arc<ServerCounters>,
}

impl PortServer {
    /// Serves `device`, which port `name` has, to who comes through `door`.
    pub fn start(name: &str, door: Door, device: PortDevice, sandbox: &Arc<dyn Sandbox>) -> io::Result<Self> {
        let stop = Event::new()?;
        let counters = Arc::new(ServerCounters::default());
        let mut server = Server {
            name: name.to_owned(),
            door,
            device,
            stop: stop.clone(),
            sandbox: sandbox.clone(),
            counters: counters.clone(),
            log: RateLimit::default(),
        };
        let body = move || {
            if let Err(error) = server.sandbox.enter(ThreadClass::BackEnd) {
                tracing::error!("cannot confine a thread: {error}");
                std::process::abort();
            }
            server.run();
        };
        let thread = sandbox.spawn(format!("port-{name}"), Box::new(body))?;
        Ok(Self {
            stop,
            thread: Some(thread),
            counters,
        })
    }

    /// What it counted.
    pub fn counters(&self) -> &ServerCounters {
        &self.counters
    }
}

impl Drop for PortServer {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Server {
    name: String,
    door: Door,
    device: PortDevice,
    stop: Event,
    sandbox: Arc<dyn Sandbox>,
    counters: Arc<ServerCounters>,
    log: RateLimit,
}

impl Server {
    fn run(&mut self) {
        while let Some(socket) = self.next() {
            self.counters.connections.fetch_add(1, Relaxed);
            self.say(&"a front end is connected");
            let mut session = Session::new(socket, &mut self.device, self.sandbox.clone());
            let end = session.run(self.stop.as_fd());
            drop(session);
            match end {
                SessionError::Channel(ChannelError::Stopped) => return,
                SessionError::Channel(ChannelError::Closed) => self.say(&"the front end is gone"),
                error => {
                    self.counters.broken.fetch_add(1, Relaxed);
                    self.warn(&format_args!("the front end is disconnected: {}", chain(&error)));
                }
            }
        }
    }

    /// The next front end; `None`: the port ends.
    fn next(&self) -> Option<OwnedFd> {
        match &self.door {
            Door::Server(listener) => self.accept(listener),
            Door::Client(address) => self.connect(address),
        }
    }

    fn accept(&self, listener: &Listener) -> Option<OwnedFd> {
        loop {
            self.wait(Some(PollFd::new(listener, PollFlags::IN)), None)?;
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => return Some(socket),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    self.warn(&format_args!("no front end can be accepted: {error}"));
                    self.wait(None, Some(ACCEPT_PAUSE))?;
                }
            }
        }
    }

    fn connect(&self, address: &SocketAddrUnix) -> Option<OwnedFd> {
        let mut pause = FIRST_PAUSE;
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let connected = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                .and_then(|socket| rustix::net::connect(&socket, address).map(|()| socket));
            match connected {
                Ok(socket) => return Some(socket),
                Err(error) => self.debug(&format_args!("no front end can be connected to: {error}")),
            }
            self.wait(None, Some(pause))?;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits for `event`, or for `time`; `None`: the port ends.
    fn wait(&self, event: Option<PollFd<'_>>, time: Option<Duration>) -> Option<()> {
        let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
        fds.extend(event);
        let timeout = time.and_then(|time| Timespec::try_from(time).ok());
        // An interruption is as good as an event: whoever waits looks again.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        fds[0].revents().is_empty().then_some(())
    }

    fn say(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::info!(port = self.name, held_back, "{message}");
        }
    }

    fn warn(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(port = self.name, held_back, "{message}");
        }
    }

    fn debug(&self, message: &dyn std::fmt::Display) {
        tracing::debug!(port = self.name, "{message}");
    }
}
