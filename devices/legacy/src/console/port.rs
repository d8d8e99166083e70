//! The host's end of a console, between two calls into the kernel.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::channel::Channel;
use super::terminal::RawMode;
use super::{BACKLOG, sys};

/// Where bytes come from and go to.
pub(super) enum Peer {
    /// Nothing at all.
    Null,
    /// stdin and stdout, or a file. Each ends by itself.
    Stream {
        input: Option<Channel>,
        output: Option<Channel>,
        terminal: bool,
        /// Held for its drop.
        _raw: Option<RawMode>,
    },
    /// The master of a pseudo-terminal.
    Pty(Channel),
    /// A listening socket and its client.
    Socket {
        listener: UnixListener,
        client: Option<Client>,
        path: PathBuf,
    },
}

/// A client of a socket.
pub(super) struct Client {
    channel: Channel,
    /// It will send no more, but may still read.
    ended: bool,
    /// It does not read any more, but may have sent something.
    deaf: bool,
}

/// The peer and the output it has not taken yet.
pub(super) struct Port {
    peer: Peer,
    kept: VecDeque<u8>,
    /// Whether the kernel tells us when the output has room.
    watched: bool,
}

/// All sources are edge-triggered: a hung-up terminal would otherwise be reported for ever.
pub(super) const INPUT: EventSet = EventSet::IN
    .union(EventSet::READ_HANG_UP)
    .union(EventSet::EDGE_TRIGGERED);
const OUTPUT: EventSet = EventSet::OUT.union(EventSet::EDGE_TRIGGERED);

enum Sent {
    All,
    /// The rest has to wait.
    Part(usize),
    /// There is nobody who could take it, now or ever.
    Lost,
}

impl Port {
    pub(super) fn new(peer: Peer) -> Self {
        Self {
            peer,
            kept: VecDeque::new(),
            watched: false,
        }
    }

    pub(super) fn terminal_size(&self) -> Option<(u16, u16)> {
        match &self.peer {
            Peer::Stream { terminal: true, .. } => {
                sys::window_size(sys::STDIN).or_else(|| sys::window_size(sys::STDOUT))
            }
            _ => None,
        }
    }

    /// Writes `bytes` after what is kept. Returns how many bytes were lost.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        if !self.kept.is_empty() {
            return self.keep(bytes);
        }
        match self.send(bytes) {
            Sent::All => 0,
            Sent::Part(n) => self.keep(&bytes[n..]),
            Sent::Lost => bytes.len(),
        }
    }

    /// Writes what is kept, as far as it goes. Returns how many bytes were lost.
    pub(super) fn flush(&mut self) -> usize {
        while !self.kept.is_empty() {
            let kept = std::mem::take(&mut self.kept);
            let sent = self.send(kept.as_slices().0);
            let whole = kept.as_slices().0.len();
            self.kept = kept;
            match sent {
                Sent::All => drop(self.kept.drain(..whole)),
                Sent::Part(n) => {
                    self.kept.drain(..n);
                    return 0;
                }
                Sent::Lost => {
                    let lost = self.kept.len();
                    self.kept = VecDeque::new();
                    return lost;
                }
            }
        }
        0
    }

    pub(super) fn has_kept(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Whether someone is there to take output.
    pub(super) fn connected(&self) -> bool {
        self.output().is_some()
    }

    /// Whether output waits for room without the kernel having been asked to tell us of it.
    pub(super) fn wants_watch(&self) -> bool {
        !self.watched && self.has_kept() && self.connected()
    }

    pub(super) fn wait_for_room(&self, timeout: Duration) {
        if let Some(output) = self.output() {
            sys::poll(output, libc::POLLOUT, timeout);
        }
    }

    /// Asks the kernel to tell us of room for output exactly while some waits.
    pub(super) fn watch(&mut self, epoll: &Epoll) -> io::Result<()> {
        let want = self.has_kept() && self.connected();
        if want == self.watched {
            return Ok(());
        }
        let Some(output) = self.output() else {
            self.watched = false;
            return Ok(());
        };
        let both_ways = !matches!(self.peer, Peer::Stream { .. });
        let (operation, events) = match (both_ways, want) {
            (true, true) => (ControlOperation::Modify, INPUT | OUTPUT),
            (true, false) => (ControlOperation::Modify, INPUT),
            (false, true) => (ControlOperation::Add, OUTPUT),
            (false, false) => (ControlOperation::Delete, OUTPUT),
        };
        epoll.ctl(operation, output.as_raw_fd(), EpollEvent::new(events, 0))?;
        self.watched = want;
        Ok(())
    }

    /// Reads what input there is into `buf`.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut read = 0;
        while read < buf.len() {
            let Some(channel) = self.input() else { break };
            match channel.read(&mut buf[read..]) {
                Ok(0) => self.end_input(),
                Ok(n) => read += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Nobody has the pseudo-terminal open, or the terminal belongs to another job now.
                Err(e) if e.raw_os_error() == Some(libc::EIO) && !matches!(self.peer, Peer::Socket { .. }) => break,
                Err(_) => self.end_input(),
            }
        }
        read
    }

    /// Lets a client go that is gone and takes in the next one. Returns the bytes of output lost.
    pub(super) fn change_client(&mut self, epoll: &Epoll) -> usize {
        let Peer::Socket { listener, client, .. } = &mut self.peer else {
            return 0;
        };
        if client
            .as_ref()
            .is_some_and(|c| c.ended && (c.deaf || c.channel.hung_up()))
        {
            *client = None;
            self.watched = false;
        }
        let mut came = false;
        // One that is gone but left input behind is served to its end; the next one waits in the kernel meanwhile.
        while client.as_ref().is_none_or(|c| !c.channel.hung_up()) {
            let Ok((stream, _)) = listener.accept() else { break };
            if client.is_some() {
                // One at a time: the second is told so by the end of its connection.
                continue;
            }
            let event = EpollEvent::new(INPUT, 0);
            let ready = stream
                .set_nonblocking(true)
                .and_then(|()| epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event));
            if ready.is_ok() {
                let channel = Channel::Direct(OwnedFd::from(stream).into());
                *client = Some(Client {
                    channel,
                    ended: false,
                    deaf: false,
                });
                came = true;
            }
        }
        if came { self.flush() } else { 0 }
    }

    fn input(&self) -> Option<&Channel> {
        match &self.peer {
            Peer::Null => None,
            Peer::Stream { input, .. } => input.as_ref(),
            Peer::Pty(master) => Some(master),
            Peer::Socket { client, .. } => client.as_ref().filter(|c| !c.ended).map(|c| &c.channel),
        }
    }

    fn end_input(&mut self) {
        match &mut self.peer {
            Peer::Stream { input, .. } => *input = None,
            Peer::Socket { client, .. } => {
                if let Some(client) = client {
                    client.ended = true;
                }
            }
            Peer::Null | Peer::Pty(_) => {}
        }
    }

    /// What to ask about room for output.
    fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.peer {
            Peer::Null => None,
            Peer::Stream { output, .. } => output.as_ref().map(AsFd::as_fd),
            Peer::Pty(master) => Some(master.as_fd()),
            Peer::Socket { client, .. } => client.as_ref().filter(|c| !c.deaf).map(|c| c.channel.as_fd()),
        }
    }

    fn keep(&mut self, bytes: &[u8]) -> usize {
        let fits = &bytes[bytes.len().saturating_sub(BACKLOG)..];
        let excess = (self.kept.len() + fits.len()).saturating_sub(BACKLOG);
        self.kept.drain(..excess);
        self.kept.extend(fits);
        bytes.len() - fits.len() + excess
    }

    fn send(&mut self, bytes: &[u8]) -> Sent {
        match &mut self.peer {
            Peer::Null => Sent::All,
            Peer::Stream { output, .. } => {
                let Some(channel) = output else { return Sent::Lost };
                let (sent, broken) = send(channel, bytes);
                if broken {
                    *output = None;
                    // Closing it took it out of the epoll set.
                    self.watched = false;
                }
                sent
            }
            // The kernel would keep it for the next one who opens it: that one wants what comes then.
            Peer::Pty(master) if master.hung_up() => Sent::Lost,
            Peer::Pty(master) => send(master, bytes).0,
            Peer::Socket { client, .. } => {
                let Some(client) = client.as_mut().filter(|c| !c.deaf) else {
                    return Sent::Part(0);
                };
                match send(&client.channel, bytes) {
                    (Sent::Lost, _) => {
                        client.deaf = true;
                        Sent::Part(0)
                    }
                    (sent, _) => sent,
                }
            }
        }
    }
}

/// Writes as much as goes without waiting; the second value says that it will never go again.
fn send(channel: &Channel, bytes: &[u8]) -> (Sent, bool) {
    let mut done = 0;
    while done < bytes.len() {
        match channel.write(&bytes[done..]) {
            Ok(0) => return (Sent::Part(done), false),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return (Sent::Part(done), false),
            // A full disk may have room again later.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => return (Sent::Lost, false),
            Err(_) => return (Sent::Lost, true),
        }
    }
    (Sent::All, false)
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Peer::Socket { path, .. } = &self.peer {
            // It may have been removed already, and nobody is left to tell.
            let _ = sys::remove(path);
        }
    }
}
