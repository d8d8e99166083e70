//! One connection, with deadlines on everything.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use thiserror::Error;

use crate::hand_over::CHUNK;
use crate::wire::{HEAD, Kind, Message, WireError, decode, encode};

/// Bytes of a message for which there is room before any of them came.
const STEP: usize = 64 << 10;

/// How soon a thread that waits for the other side notices that it shall not.
const TICK: Duration = Duration::from_millis(100);

/// Makes threads let go of their streams.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    own: Arc<AtomicBool>,
    parent: Option<Arc<AtomicBool>>,
}

impl Interrupt {
    /// One that is raised by itself, or when this one is.
    pub(crate) fn child(&self) -> Self {
        Self {
            own: Arc::default(),
            parent: Some(self.own.clone()),
        }
    }

    pub(crate) fn raise(&self) {
        self.own.store(true, Ordering::Release);
    }

    pub(crate) fn is_raised(&self) -> bool {
        let raised = |flag: &Arc<AtomicBool>| flag.load(Ordering::Acquire);
        raised(&self.own) || self.parent.as_ref().is_some_and(raised)
    }
}

/// Why a stream is of no use any more.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The host.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// It ended.
    #[error("the other side closed the connection")]
    Closed,
    /// A deadline.
    #[error("the other side did not {0} in time")]
    Late(&'static str),
    /// We were asked to stop.
    #[error("stopped")]
    Stopped,
    /// The other side sent nonsense.
    #[error("the other side sent what is no valid message")]
    Wire(#[from] WireError),
    /// More descriptors than one may have.
    #[error(
        "not all descriptors came: more were sent than was said, or this process may not have as many (RLIMIT_NOFILE)"
    )]
    Descriptors,
    /// The other side sent something else.
    #[error("the other side sent {found} where {expected} is due")]
    Unexpected {
        /// What came.
        found: String,
        /// What should have.
        expected: &'static str,
    },
}

/// Descriptors go from process to process of one host.
const NETWORK: &str = "memory can be handed over by a unix socket only";

/// A socket whose calls end at a deadline or when interrupted.
pub(crate) struct Socket {
    kind: Plain,
    deadline: Instant,
    interrupt: Interrupt,
}

pub(crate) enum Plain {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What the deadline of a [`Socket`] ends calls with.
const LATE: io::ErrorKind = io::ErrorKind::TimedOut;
/// What an interrupt ends them with; not `Interrupted`, which readers take for an invitation to try again.
const STOPPED: io::ErrorKind = io::ErrorKind::QuotaExceeded;

impl Socket {
    pub(crate) fn new(kind: Plain, interrupt: Interrupt) -> io::Result<Self> {
        match &kind {
            Plain::Unix(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_read_timeout(Some(TICK))?;
                socket.set_write_timeout(Some(TICK))?;
            }
            Plain::Tcp(socket) => {
                socket.set_nonblocking(false)?;
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(TICK))?;
                socket.set_write_timeout(Some(TICK))?;
            }
        }
        Ok(Self {
            kind,
            deadline: Instant::now(),
            interrupt,
        })
    }

    /// Until when its calls may take, from now on.
    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    fn call(&mut self, mut call: impl FnMut(&mut Plain) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            if self.interrupt.is_raised() {
                return Err(STOPPED.into());
            }
            if Instant::now() >= self.deadline {
                return Err(LATE.into());
            }
            match call(&mut self.kind) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                other => return other,
            }
        }
    }

    /// Sends a byte with these descriptors, [`CHUNK`] at most.
    fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.call(|kind| {
            let Plain::Unix(socket) = kind else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CHUNK))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(files)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            Ok(sendmsg(
                socket,
                &[IoSlice::new(&[0])],
                &mut control,
                SendFlags::NOSIGNAL,
            )?)
        })
        .map(drop)
    }

    /// Takes a byte and the descriptors that come with it; whether these are all of them.
    fn receive_files(&mut self, files: &mut Vec<OwnedFd>) -> io::Result<bool> {
        let mut all = true;
        let read = self.call(|kind| {
            let Plain::Unix(socket) = kind else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            // One more than is sent at once, so that too many are seen.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CHUNK + 1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let mut parts = [IoSliceMut::new(&mut byte)];
            let received = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            all = !received.flags.contains(ReturnFlags::CTRUNC);
            for item in control.drain() {
                if let RecvAncillaryMessage::ScmRights(some) = item {
                    files.extend(some);
                }
            }
            Ok(received.bytes)
        })?;
        match read {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(all),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.call(|kind| match kind {
            Plain::Unix(socket) => socket.read(buffer),
            Plain::Tcp(socket) => socket.read(buffer),
        })
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.call(|kind| match kind {
            Plain::Unix(socket) => socket.write(bytes),
            Plain::Tcp(socket) => socket.write(bytes),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket, with TLS or without.
pub(crate) enum Channel {
    Plain(Socket),
    Client(Box<StreamOwned<ClientConnection, Socket>>),
    Server(Box<StreamOwned<ServerConnection, Socket>>),
}

impl Channel {
    pub(crate) fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Client(tls) => &mut tls.sock,
            Self::Server(tls) => &mut tls.sock,
        }
    }
}

impl Read for Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Client(tls) => tls.read(buffer),
            Self::Server(tls) => tls.read(buffer),
        }
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Client(tls) => tls.write(bytes),
            Self::Server(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Client(tls) => tls.flush(),
            Self::Server(tls) => tls.flush(),
        }
    }
}

/// A connection that carries messages.
pub(crate) struct Stream {
    channel: Channel,
    /// How long a message may take from its first byte to its last.
    patience: Duration,
    head: Vec<u8>,
    body: Vec<u8>,
}

impl Stream {
    pub(crate) fn new(channel: Channel, message: Duration) -> Self {
        Self {
            channel,
            patience: message,
            head: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Waits as long as `interrupt` is not raised, instead of the one there was.
    pub(crate) fn set_interrupt(&mut self, interrupt: &Interrupt) {
        self.channel.socket().interrupt = interrupt.clone();
    }

    /// How long a message may take from now on.
    pub(crate) fn set_message_time(&mut self, time: Duration) {
        self.patience = time;
    }

    /// Sends a message and returns how many bytes it has.
    pub(crate) fn send(&mut self, message: &Message) -> Result<usize, StreamError> {
        self.send_within(message, self.patience)
    }

    pub(crate) fn send_within(&mut self, message: &Message, time: Duration) -> Result<usize, StreamError> {
        let tail = encode::message(message, &mut self.head);
        self.channel.socket().set_deadline(Instant::now() + time);
        let sent = self.channel.write_all(&self.head);
        sent.and_then(|()| self.channel.write_all(tail))
            .and_then(|()| self.channel.flush())
            .map_err(|error| failed(error, "take a message"))?;
        Ok(self.head.len() + tail.len())
    }

    /// Sends descriptors, [`CHUNK`] at most, to a process of this host.
    pub(crate) fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> Result<(), StreamError> {
        let Channel::Plain(socket) = &mut self.channel else {
            return Err(WireError::Invalid(NETWORK).into());
        };
        socket.set_deadline(Instant::now() + self.patience);
        socket
            .send_files(files)
            .map_err(|error| failed(error, "take descriptors"))
    }

    /// Takes `count` descriptors that were sent so.
    pub(crate) fn receive_files(&mut self, count: usize) -> Result<Vec<OwnedFd>, StreamError> {
        let Channel::Plain(socket) = &mut self.channel else {
            return Err(WireError::Invalid(NETWORK).into());
        };
        socket.set_deadline(Instant::now() + self.patience);
        let mut files = Vec::new();
        let all = socket.receive_files(&mut files);
        let all = all.map_err(|error| failed(error, "send descriptors"))?;
        match all {
            true if files.len() == count => Ok(files),
            true => Err(WireError::Invalid("another number of descriptors than was said").into()),
            false => Err(StreamError::Descriptors),
        }
    }

    /// The next message, which must begin within `wait`; `what` says what the other side should do.
    pub(crate) fn receive(&mut self, wait: Duration, what: &'static str) -> Result<Message<'_>, StreamError> {
        let came = self.take(wait, what)?;
        self.message(came)
    }

    /// Takes the bytes of the next message: what it is, and how long.
    pub(crate) fn take(&mut self, wait: Duration, what: &'static str) -> Result<(Kind, usize), StreamError> {
        let mut head = [0; HEAD];
        self.channel.socket().set_deadline(Instant::now() + wait);
        // The wait is for its first byte; what comes so slowly that it does not end is no message.
        let (first, rest) = head.split_at_mut(1);
        self.channel.read_exact(first).map_err(|error| failed(error, what))?;
        self.channel.socket().set_deadline(Instant::now() + self.patience);
        let failed = |error| failed(error, "send a whole message");
        self.channel.read_exact(rest).map_err(failed)?;
        let (kind, len) = decode::head(head)?;
        let mut have = 0;
        while have < len {
            // The buffer grows with what comes, not with what was said to come, and is kept for the next message.
            if have == self.body.len() {
                self.body.resize(len.min(2 * have.max(STEP)), 0);
            }
            let room = len.min(self.body.len());
            match self.channel.read(&mut self.body[have..room]) {
                Ok(0) => return Err(StreamError::Closed),
                Ok(read) => have += read,
                Err(error) => return Err(failed(error)),
            }
        }
        Ok((kind, len))
    }

    /// The message that was [`taken`](Self::take) last.
    pub(crate) fn message(&self, (kind, len): (Kind, usize)) -> Result<Message<'_>, StreamError> {
        Ok(decode::body(kind, &self.body[..len])?)
    }

    /// The same, of one kind that has no body. `Abort` is an error of its own.
    pub(crate) fn expect(&mut self, kind: Kind, wait: Duration, what: &'static str) -> Result<(), Answer> {
        match self.receive(wait, what) {
            Ok(Message::Abort(reason)) => Err(Answer::Abort(reason.to_owned())),
            Ok(message) if message.kind() == kind => Ok(()),
            Ok(message) => Err(Answer::Stream(unexpected(&message, what))),
            Err(error) => Err(Answer::Stream(error)),
        }
    }
}

/// Another answer than the one that was hoped for.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The other side wants no more, and says why.
    Abort(String),
    Stream(StreamError),
}

pub(crate) fn unexpected(found: &Message, expected: &'static str) -> StreamError {
    StreamError::Unexpected {
        found: format!("{:?}", found.kind()),
        expected,
    }
}

fn failed(error: io::Error, what: &'static str) -> StreamError {
    match error.kind() {
        LATE => StreamError::Late(what),
        STOPPED => StreamError::Stopped,
        io::ErrorKind::UnexpectedEof | io::ErrorKind::WriteZero => StreamError::Closed,
        io::ErrorKind::Unsupported => WireError::Invalid(NETWORK).into(),
        _ => StreamError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn pair(message: Duration) -> (Stream, UnixStream, Interrupt) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let interrupt = Interrupt::default();
        let socket = Socket::new(Plain::Unix(ours), interrupt.clone()).expect("a socket");
        (Stream::new(Channel::Plain(socket), message), theirs, interrupt)
    }

    #[test]
    fn a_byte_now_and_then_is_no_message() {
        let (mut stream, mut theirs, _) = pair(Duration::from_millis(300));
        let slow = thread::spawn(move || {
            // A message of 100 bytes that would take ten seconds.
            let mut bytes = vec![15, 0, 0, 0, 100, 0, 0, 0];
            bytes.extend([0; 100]);
            for byte in bytes {
                if theirs.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
        });
        let found = stream.receive(Duration::from_secs(5), "answer");
        assert!(
            matches!(found, Err(StreamError::Late("send a whole message"))),
            "{found:?}"
        );
        drop(stream);
        slow.join().expect("no panic");
    }

    #[test]
    fn silence_ends_at_the_deadline_and_by_interrupt() {
        let (mut stream, theirs, interrupt) = pair(Duration::from_secs(60));
        let found = stream.receive(Duration::from_millis(200), "answer");
        assert!(matches!(found, Err(StreamError::Late("answer"))), "{found:?}");
        let waits = thread::spawn(move || {
            let found = stream.receive(Duration::from_secs(60), "answer").map(|_| ());
            assert!(matches!(found, Err(StreamError::Stopped)), "{found:?}");
        });
        interrupt.raise();
        waits.join().expect("stopped");
        drop(theirs);
    }

    #[test]
    fn who_does_not_read_is_late_too() {
        let (mut stream, theirs, _) = pair(Duration::from_millis(300));
        let part = vec![1; 1 << 20];
        let message = Message::State {
            total: 1 << 20,
            part: &part,
        };
        let sent = stream.send(&message);
        assert!(matches!(sent, Err(StreamError::Late("take a message"))), "{sent:?}");
        drop(theirs);
    }

    #[test]
    fn an_end_inside_a_message_is_told() {
        let (mut stream, mut theirs, _) = pair(Duration::from_secs(5));
        theirs.write_all(&[15, 0, 0, 0, 100, 0, 0, 0, 1]).expect("sent");
        drop(theirs);
        let found = stream.receive(Duration::from_secs(5), "answer");
        assert!(matches!(found, Err(StreamError::Closed)), "{found:?}");
    }
}
