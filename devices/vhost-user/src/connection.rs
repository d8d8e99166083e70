//! Messages over the socket, each with a deadline.
//!
//! The rust-vmm `vhost` crate is not used for this: its reads begin again whenever a receive timeout ends one, so that a daemon which
//! stays silent keeps the caller for ever, and nothing can end the wait.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use triarch_device_core::Event;
use triarch_vhost_protocol::{
    BACKEND_CONFIG_CHANGE_MSG, HEADER, Header, MAX_ANSWER, MAX_FDS, Payload, REPLY, Request, message,
};

use crate::LinkError;

/// How long a daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the daemon has for an answer while something urgent waits: most need less, and keep their connection.
const HASTE: Duration = Duration::from_millis(100);

/// Wakes a device's thread, and tells it whether what it is wanted for can wait.
pub(crate) struct Wake {
    event: Event,
    urgent: AtomicU32,
    heard: AtomicBool,
}

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            event: Event::new()?,
            urgent: AtomicU32::new(0),
            heard: AtomicBool::new(false),
        })
    }

    /// Wakes the thread.
    pub(crate) fn ring(&self) {
        self.event.ring();
    }

    /// The thread must not wait long for its daemon until [`Wake::taken`] was called as often.
    pub(crate) fn hurry(&self) {
        self.urgent.fetch_add(1, Ordering::AcqRel);
    }

    /// What was urgent is being done.
    pub(crate) fn taken(&self) {
        self.urgent.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether something waits that is urgent.
    pub(crate) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Acquire) > 0
    }

    /// Back to sleep until the next ring.
    pub(crate) fn clear(&self) {
        self.event.clear();
    }

    /// Notes a ring while the thread waits for its daemon, which rings no more: [`Wake::was_heard`].
    fn hear(&self) {
        self.event.clear();
        self.heard.store(true, Ordering::Release);
    }

    /// Whether there was such a ring since this was asked.
    pub(crate) fn was_heard(&self) -> bool {
        self.heard.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }
}

/// A connected socket, with what the daemon may ask on a second one.
pub(crate) struct Connection {
    socket: OwnedFd,
    back: Option<BackChannel>,
}

impl Connection {
    /// Connects to the socket at `path`, without waiting: who does not take connections at once is not there.
    pub(crate) fn open(path: &Path) -> Result<Self, LinkError> {
        let failed = |error: Errno| LinkError::Connect {
            path: path.to_owned(),
            cause: error.into(),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        Ok(Self { socket, back: None })
    }

    /// Takes the connection of a daemon that waits at `door`, which is at `path`.
    pub(crate) fn accept(door: BorrowedFd<'_>, path: &Path) -> Result<Self, LinkError> {
        match rustix::net::accept_with(door, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Self { socket, back: None }),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Err(LinkError::Nobody(path.to_owned())),
            Err(error) => Err(broken(error)),
        }
    }

    /// Sends a request; `fds` go with it.
    pub(crate) fn send(
        &self,
        request: Request,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        wake: &Wake,
    ) -> Result<(), LinkError> {
        let deadline = Instant::now() + PATIENCE;
        let bytes = message(request as u32, flags, payload);
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(LinkError::nonsense("too many descriptors for one message"));
            }
            let parts = [IoSlice::new(&bytes[sent..])];
            match rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(n) => sent += n,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline, request.name(), wake)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    /// The answer to `request`: its payload. It brings no descriptors.
    pub(crate) fn receive(&self, request: Request, wake: &Wake) -> Result<Vec<u8>, LinkError> {
        self.answer(request, None, PATIENCE, wake)
    }

    /// The same, for one that may take as long as `patience`.
    pub(crate) fn receive_within(
        &self,
        request: Request,
        patience: Duration,
        wake: &Wake,
    ) -> Result<Vec<u8>, LinkError> {
        self.answer(request, None, patience, wake)
    }

    /// The answer to `request`, which may bring a descriptor.
    pub(crate) fn receive_with(&self, request: Request, wake: &Wake) -> Result<(Vec<u8>, Option<OwnedFd>), LinkError> {
        let mut fds = Vec::new();
        let payload = self.answer(request, Some(&mut fds), PATIENCE, wake)?;
        if fds.len() > 1 {
            let text = format!("its answer to {} has {} descriptors", request.name(), fds.len());
            return Err(LinkError::Nonsense(text));
        }
        Ok((payload, fds.pop()))
    }

    fn answer(
        &self,
        request: Request,
        fds: Option<&mut Vec<OwnedFd>>,
        patience: Duration,
        wake: &Wake,
    ) -> Result<Vec<u8>, LinkError> {
        let deadline = Instant::now() + patience;
        let mut header = [0; HEADER];
        self.fill(&mut header, fds, deadline, request, wake)?;
        let header = Header::decode(&header);
        if !header.is_known_version() || !header.is_reply() {
            let text = format!("its answer to {} has the flags {:#x}", request.name(), header.flags);
            return Err(LinkError::Nonsense(text));
        }
        if header.request != request as u32 {
            let text = format!("asked for {} it answered message {}", request.name(), header.request);
            return Err(LinkError::Nonsense(text));
        }
        let size = header.size as usize;
        if size > MAX_ANSWER {
            let text = format!("its answer to {} has {size} bytes", request.name());
            return Err(LinkError::Nonsense(text));
        }
        let mut payload = vec![0; size];
        self.fill(&mut payload, None, deadline, request, wake)?;
        Ok(payload)
    }

    /// Reads exactly `buffer`, and descriptors where they are expected.
    fn fill(
        &self,
        buffer: &mut [u8],
        mut fds: Option<&mut Vec<OwnedFd>>,
        deadline: Instant,
        request: Request,
        wake: &Wake,
    ) -> Result<(), LinkError> {
        let mut have = 0;
        while have < buffer.len() {
            match take(self.socket.as_fd(), &mut buffer[have..], fds.as_deref_mut())? {
                Some(n) => have += n,
                None => self.wait(PollFlags::IN, deadline, request.name(), wake)?,
            }
        }
        Ok(())
    }

    /// Waits for the socket, and answers meanwhile what the daemon asks: it may wait for that before it goes on.
    fn wait(&self, events: PollFlags, deadline: Instant, what: &'static str, wake: &Wake) -> Result<(), LinkError> {
        let began = Instant::now();
        loop {
            let urgent = wake.is_urgent();
            let deadline = if urgent { deadline.min(began + HASTE) } else { deadline };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(if urgent {
                    LinkError::Interrupted
                } else {
                    LinkError::Silent(what)
                });
            }
            let timeout = Timespec::try_from(left).ok();
            let mut fds = vec![
                PollFd::new(&self.socket, events),
                PollFd::new(wake.event(), PollFlags::IN),
            ];
            if let Some(back) = &self.back {
                fds.push(PollFd::new(&back.socket, PollFlags::IN));
            }
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(broken(error)),
            }
            let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (socket, ring, back) = (ready(0), ready(1), ready(2));
            if ring {
                // Whoever rang left something behind that is looked for after this.
                wake.hear();
            }
            if back && let Some(channel) = &self.back {
                channel.serve()?;
            }
            if socket {
                return Ok(());
            }
        }
    }

    /// Gives the daemon a channel for its own requests; returns the end that goes to it.
    pub(crate) fn open_back_channel(&mut self) -> Result<OwnedFd, LinkError> {
        let (socket, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|error| LinkError::host("a socket for the daemon's requests")(error.into()))?;
        // The daemon's end waits, as daemons expect.
        rustix::fs::fcntl_setfl(&theirs, rustix::fs::OFlags::empty())
            .map_err(|error| LinkError::host("a socket for the daemon's requests")(error.into()))?;
        self.back = Some(BackChannel {
            socket,
            changed: AtomicU32::new(0),
        });
        Ok(theirs)
    }

    /// Looks at what the daemon sent without being asked: on the main socket only its end can come.
    pub(crate) fn look(&self) -> Result<(), LinkError> {
        match take(self.socket.as_fd(), &mut [0; HEADER], None)? {
            Some(_) => Err(LinkError::nonsense("it sent what nobody asked for")),
            None => match &self.back {
                Some(back) => back.serve(),
                None => Ok(()),
            },
        }
    }

    /// Whether the daemon said since the last call that its configuration space changed.
    pub(crate) fn config_changed(&self) -> bool {
        let back = self.back.as_ref();
        back.is_some_and(|back| back.changed.swap(0, Ordering::Relaxed) != 0)
    }

    /// What to wait on.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let back = self.back.iter().map(|back| back.socket.as_fd());
        std::iter::once(self.socket.as_fd()).chain(back)
    }
}

/// Where the daemon asks.
struct BackChannel {
    socket: OwnedFd,
    changed: AtomicU32,
}

impl BackChannel {
    /// Serves a few requests. Each one has no payload, so a part of one is nonsense.
    fn serve(&self) -> Result<(), LinkError> {
        for _ in 0..8 {
            let mut header = [0; HEADER];
            match take(self.socket.as_fd(), &mut header, None)? {
                None => return Ok(()),
                Some(HEADER) => {}
                Some(n) => return Err(LinkError::Nonsense(format!("it sent {n} bytes of a request"))),
            }
            let header = Header::decode(&header);
            let Header { request, flags, size } = header;
            if !header.is_known_version() || header.is_reply() || size != 0 {
                let text = format!("its request {request} has the flags {flags:#x} and {size} bytes");
                return Err(LinkError::Nonsense(text));
            }
            let known = request == BACKEND_CONFIG_CHANGE_MSG;
            if known {
                self.changed.store(1, Ordering::Relaxed);
            }
            if header.needs_reply() {
                let answer = message(request, REPLY, &u64::from(!known).encode());
                // A daemon that asks and does not read its answers is not waited for.
                rustix::net::send(&self.socket, &answer, SendFlags::NOSIGNAL).map_err(broken)?;
            }
        }
        Ok(())
    }
}

/// Waits until something can be read from one of `sockets`, or `time` has passed.
pub(crate) fn wait_any(sockets: &[BorrowedFd<'_>], time: Duration) -> Result<(), LinkError> {
    let mut fds: Vec<_> = sockets.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    match rustix::event::poll(&mut fds, Timespec::try_from(time).ok().as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(broken(error)),
    }
}

/// What is there now, at most `buffer` bytes; `None` if nothing is. Descriptors go to `wanted`; without that there must be none.
fn take(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    wanted: Option<&mut Vec<OwnedFd>>,
) -> Result<Option<usize>, LinkError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(message) => message,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(error) => return Err(broken(error)),
    };
    // Descriptors nobody asked for are closed with the buffer, those past its end by the kernel.
    let expected = wanted.is_some();
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let unwanted = !expected && !fds.is_empty();
    if let Some(wanted) = wanted {
        wanted.append(&mut fds);
    }
    if unwanted || message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(LinkError::nonsense("it sent descriptors that nobody asked for"));
    }
    match message.bytes {
        0 => Err(LinkError::Closed),
        n => Ok(Some(n)),
    }
}

fn broken(error: Errno) -> LinkError {
    match error {
        Errno::PIPE | Errno::CONNRESET => LinkError::Closed,
        error => LinkError::Broken(error.into()),
    }
}
