//! What daemons know of a device beside its rings, for snapshots and migration (protocol feature DEVICE_STATE; vhost-user, "Migrating
//! back-end state"): virtiofsd's open files, for instance.
//!
//! ```text
//!  VhostUser::save_state ──► SET_DEVICE_STATE_FD (save) ──► daemon
//!        bytes ◄──────────────────── channel ◄───────────────┘
//!        end of the bytes ──► CHECK_DEVICE_STATE ──► did it work?
//! ```
//!
//! Loading is the same, with the bytes going the other way. Messages go through the device's thread as all others do; the bytes are moved by
//! whoever calls, who waits for them. The daemon may say or do anything meanwhile: size and time are bounded, nothing waits in a read or a
//! write, and nobody maps what a daemon could cut short.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, OFlags};
use rustix::io::{Errno, IoSlice, IoSliceMut, ReadWriteFlags};
use rustix::net::{RecvFlags, SendFlags};
use thiserror::Error;
use triarch_vhost_protocol::StateTransfer;

use crate::engine::{Command, End, StateOrder};
use crate::{LinkError, VhostUser};

/// Bytes that are moved at once.
const CHUNK: usize = 64 << 10;
/// How long a daemon may think about whether its state was transferred. One that loaded it may have to open many files first.
const VERDICT: Duration = Duration::from_secs(30);
/// How long it may when nobody needs to know any more.
const PARTING: Duration = Duration::from_secs(2);
/// "Where the file is now", for calls that want a place.
const HERE: u64 = u64::MAX;

/// What a daemon's state may cost.
#[derive(Debug, Clone, Copy)]
pub struct StateLimits {
    /// Bytes of it.
    pub bytes: u64,
    /// How long the daemon may not go on.
    pub stall: Duration,
    /// How long the whole of it may take.
    pub total: Duration,
}

impl Default for StateLimits {
    /// 1 GiB, which is a few million files of virtiofsd's; 10 seconds, and 2 minutes.
    fn default() -> Self {
        Self {
            bytes: 1 << 30,
            stall: Duration::from_secs(10),
            total: Duration::from_secs(120),
        }
    }
}

/// Why a daemon's state was not saved or loaded. Each text is whole: causes are told in it, as in [`LinkError`].
#[derive(Debug, Error)]
pub enum StateError {
    /// It cannot.
    #[error("the daemon cannot hand over its state (protocol feature DEVICE_STATE)")]
    Unable,
    /// There is none now.
    #[error("no daemon serves the device now")]
    NoDaemon,
    /// Not now.
    #[error("a queue of the device still runs; its daemon's state can be transferred when all have stopped")]
    Running,
    /// It said no before anything was transferred.
    #[error("the daemon refused to transfer its state")]
    Refused,
    /// It said no when all was transferred.
    #[error("the daemon failed to transfer its state")]
    Failed,
    /// The state is too large.
    #[error("the daemon's state has more than {0} bytes")]
    TooLarge(u64),
    /// The daemon stopped in the middle.
    #[error("the daemon has not gone on with its state for {} ms", .0.as_millis())]
    Stalled(Duration),
    /// It takes too long.
    #[error("the daemon's state took longer than {} ms", .0.as_millis())]
    Late(Duration),
    /// The daemon died or was given up in the middle.
    #[error("the daemon was lost while its state was transferred")]
    Lost,
    /// The channel broke.
    #[error("the daemon's state cannot be transferred: {0}")]
    Channel(io::Error),
    /// What is to take a state, or has one, failed: the caller's own.
    #[error("cannot {what} the daemon's state: {cause}")]
    Local {
        /// Store or fetch.
        what: &'static str,
        /// Cause.
        cause: io::Error,
    },
    /// The connection.
    #[error("{0}")]
    Link(LinkError),
}

impl From<LinkError> for StateError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl VhostUser {
    /// Heads of the requests of queue `index`, which has stopped and has `size` entries, that no daemon has answered, in the order in which
    /// they came. Whoever saves the device saves them with it: as many as the queue's indexes are apart.
    ///
    /// # Errors
    /// What the daemon noted of them contradicts itself.
    pub fn unanswered(&self, index: u16, size: u16) -> Result<Vec<u16>, LinkError> {
        // A guest that is being saved waits for it, and the thread may just be asking a daemon that hangs.
        self.urgent(|reply| Command::State(StateOrder::Unanswered(index, size, reply)))
            .unwrap_or(Ok(Vec::new()))
    }

    /// Queue `index` starts with these requests open, which a daemon then gets first. Only while the driver is there and before the queue
    /// starts. Those that are none of the queue's cost the driver a reset.
    pub fn reopen(&self, index: u16, heads: Vec<u16>) {
        self.order(Command::State(StateOrder::Reopen(index, heads)));
    }
}

impl VhostUser {
    /// Writes the daemon's state to `to`, and returns how many bytes it has. All queues must have stopped, and start only after this;
    /// the device goes on as before then. `to` should take what it is given soon: the daemon waits meanwhile.
    ///
    /// The state is whole only if this succeeds; `to` may have a part of it otherwise.
    ///
    /// # Errors
    /// [`StateError`]. The device goes on with its daemon, unless the daemon does not keep to the protocol, or to the time it has: then
    /// the connection is given up and made again.
    pub fn save_state(&mut self, to: &mut dyn Write, limits: &StateLimits) -> Result<u64, StateError> {
        let (ours, theirs) = io::pipe().map_err(StateError::Channel)?;
        let channel = self.begin(StateTransfer::SAVE, ours.into(), theirs.into())?;
        let saved = channel.and_then(|channel| channel.save(to, limits));
        // The channel is closed: a daemon that goes on writing hears of it.
        match saved {
            Ok(bytes) => self.end(End::Check(VERDICT)).map(|()| bytes),
            Err(error @ (StateError::TooLarge(_) | StateError::Local { .. })) => {
                // It did nothing wrong. What it thinks of it does not matter.
                let _ = self.end(End::Check(PARTING));
                Err(error)
            }
            Err(error) => self.abandon(error),
        }
    }

    /// Gives the daemon the state that `from` has, up to its end, and returns how many bytes it has. Queues start only after this. `from`
    /// should have it at hand: the daemon waits meanwhile.
    ///
    /// # Errors
    /// [`StateError`]. A daemon that may have got a part of a state is given up, and the connection made again; with
    /// [`StateError::Failed`] it is for the caller to give the device up.
    pub fn load_state(&mut self, from: &mut dyn Read, limits: &StateLimits) -> Result<u64, StateError> {
        let (theirs, ours) = io::pipe().map_err(StateError::Channel)?;
        let channel = self.begin(StateTransfer::LOAD, ours.into(), theirs.into())?;
        match channel.and_then(|channel| channel.load(from, limits)) {
            Ok(bytes) => self.end(End::Check(VERDICT)).map(|()| bytes),
            Err(error) => self.abandon(error),
        }
    }

    /// Agrees on a channel: the outer error says that there is none, the inner one that it is of no use.
    fn begin(&self, direction: u32, ours: OwnedFd, theirs: OwnedFd) -> Result<Result<Channel, StateError>, StateError> {
        let transfer = StateTransfer {
            direction,
            phase: StateTransfer::STOPPED,
        };
        let (reply, answer) = sync_channel(1);
        self.order(Command::State(StateOrder::Begin(transfer, theirs, reply)));
        let other = answer.recv().unwrap_or(Err(StateError::Lost))?;
        Ok(other.map_or_else(|| Channel::ours(ours), Channel::theirs))
    }

    fn end(&self, end: End) -> Result<(), StateError> {
        let (reply, answer) = sync_channel(1);
        self.order(Command::State(StateOrder::End(end, reply)));
        answer.recv().unwrap_or(Err(StateError::Lost))
    }

    fn abandon(&self, error: StateError) -> Result<u64, StateError> {
        // It is lost already if this fails.
        let _ = self.end(End::Abandon(error.to_string()));
        Err(error)
    }
}

/// What the bytes go through. Its reads and writes return at once, whatever the daemon does with its end.
struct Channel {
    file: OwnedFd,
    kind: ChannelKind,
}

enum ChannelKind {
    /// A pipe whose end here nobody else has. It was told not to wait.
    Ours,
    /// A pipe of the daemon's. It has this end, too: it could make it wait, or read what is there. Each call says that it must not wait.
    Pipe,
    /// A socket of the daemon's; likewise.
    Socket,
}

impl Channel {
    fn ours(file: OwnedFd) -> Result<Self, StateError> {
        let flags = rustix::fs::fcntl_getfl(&file);
        let done = flags.and_then(|flags| rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK));
        done.map_err(broken)?;
        let kind = ChannelKind::Ours;
        Ok(Self { file, kind })
    }

    fn theirs(file: OwnedFd) -> Result<Self, StateError> {
        let stat = rustix::fs::fstat(&file).map_err(broken)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => ChannelKind::Pipe,
            FileType::Socket => ChannelKind::Socket,
            // A read of what else it might be could take for ever.
            _ => {
                let text = "the channel that the daemon made for it is neither a pipe nor a socket";
                return Err(StateError::Channel(io::Error::other(text)));
            }
        };
        Ok(Self { file, kind })
    }

    fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self.kind {
            ChannelKind::Ours => rustix::io::read(&self.file, buffer),
            ChannelKind::Pipe => {
                let parts = &mut [IoSliceMut::new(buffer)];
                rustix::io::preadv2(&self.file, parts, HERE, ReadWriteFlags::NOWAIT)
            }
            ChannelKind::Socket => rustix::net::recv(&self.file, buffer, RecvFlags::DONTWAIT).map(|(bytes, _)| bytes),
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.kind {
            ChannelKind::Ours => rustix::io::write(&self.file, bytes),
            ChannelKind::Pipe => rustix::io::pwritev2(&self.file, &[IoSlice::new(bytes)], HERE, ReadWriteFlags::NOWAIT),
            ChannelKind::Socket => rustix::net::send(&self.file, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        }
    }

    /// Moves all that comes to `to`.
    fn save(&self, to: &mut dyn Write, limits: &StateLimits) -> Result<u64, StateError> {
        let clock = Clock::new(limits);
        let (mut buffer, mut bytes) = (vec![0; CHUNK], 0);
        loop {
            let n = clock.retry(self, PollFlags::IN, || self.read(&mut buffer))?;
            if n == 0 {
                return Ok(bytes);
            }
            bytes = counted(bytes, n, limits)?;
            let stored = to.write_all(&buffer[..n]);
            stored.map_err(|cause| StateError::Local { what: "store", cause })?;
        }
    }

    /// Moves all of `from`.
    fn load(self, from: &mut dyn Read, limits: &StateLimits) -> Result<u64, StateError> {
        let clock = Clock::new(limits);
        let (mut buffer, mut bytes) = (vec![0; CHUNK], 0);
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(cause) => return Err(StateError::Local { what: "fetch", cause }),
            };
            bytes = counted(bytes, n, limits)?;
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                let n = clock.retry(&self, PollFlags::OUT, || self.write(rest))?;
                rest = &rest[n..];
            }
        }
        if matches!(self.kind, ChannelKind::Socket) {
            // To close it would not show: the daemon has this end, too.
            rustix::net::shutdown(&self.file, rustix::net::Shutdown::Write).map_err(broken)?;
        }
        Ok(bytes)
    }
}

/// When a transfer must be over.
struct Clock<'a> {
    limits: &'a StateLimits,
    end: Instant,
}

impl<'a> Clock<'a> {
    fn new(limits: &'a StateLimits) -> Self {
        Self {
            limits,
            end: Instant::now() + limits.total,
        }
    }

    /// Does `work` when `channel` is ready for it.
    fn retry(
        &self,
        channel: &Channel,
        events: PollFlags,
        mut work: impl FnMut() -> Result<usize, Errno>,
    ) -> Result<usize, StateError> {
        let stalled = Instant::now() + self.limits.stall;
        loop {
            let now = Instant::now();
            if now >= self.end {
                return Err(StateError::Late(self.limits.total));
            }
            match work() {
                Ok(n) => return Ok(n),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(broken(error)),
            }
            if now >= stalled {
                return Err(StateError::Stalled(self.limits.stall));
            }
            let left = stalled.min(self.end).saturating_duration_since(now);
            let mut fds = [PollFd::from_borrowed_fd(channel.file.as_fd(), events)];
            match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(broken(error)),
            }
        }
    }
}

/// `bytes` and `more`, if that is not too much.
fn counted(bytes: u64, more: usize, limits: &StateLimits) -> Result<u64, StateError> {
    let bytes = bytes.saturating_add(more as u64);
    if bytes > limits.bytes {
        return Err(StateError::TooLarge(limits.bytes));
    }
    Ok(bytes)
}

fn broken(error: Errno) -> StateError {
    StateError::Channel(error.into())
}
