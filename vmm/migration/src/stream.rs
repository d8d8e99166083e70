//! One connection, with deadlines on everything.

mod socket;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::memory::{Inlet, Outlet};
use crate::wire::decode::LIST;
use crate::wire::{HEAD, Kind, Message, Runs, WireError, decode, encode};
pub(crate) use socket::{Channel, Plain, Socket};
use socket::{LATE, STOPPED};

/// Bytes of a message for which there is room before any of them came.
const STEP: usize = 64 << 10;

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

/// What comes through TLS is not what is on the pages.
const TLS: &str = "memory does not go through TLS as it is";

/// A connection that carries messages.
pub(crate) struct Stream {
    channel: Channel,
    /// How long a message may take from its first byte to its last.
    patience: Duration,
    head: Vec<u8>,
    body: Vec<u8>,
    /// Bytes of the message's body that are there.
    have: usize,
}

impl Stream {
    pub(crate) fn new(channel: Channel, message: Duration) -> Self {
        Self {
            channel,
            patience: message,
            head: Vec::new(),
            body: Vec::new(),
            have: 0,
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

    /// Sends descriptors, [`CHUNK`](crate::hand_over::CHUNK) at most, to a process of this host.
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
        let came = self.begin(wait, what)?;
        self.rest(came)
    }

    /// Takes the head of the next message, whose [`rest`](Self::rest) is to be taken next.
    pub(crate) fn begin(&mut self, wait: Duration, what: &'static str) -> Result<(Kind, usize), StreamError> {
        let mut head = [0; HEAD];
        self.channel.socket().set_deadline(Instant::now() + wait);
        // The wait is for its first byte; what comes so slowly that it does not end is no message.
        let came = match self.channel.read(&mut head) {
            Ok(0) => return Err(StreamError::Closed),
            Ok(came) => came,
            Err(error) => return Err(failed(error, what)),
        };
        self.channel.socket().set_deadline(Instant::now() + self.patience);
        self.channel.read_exact(&mut head[came..]).map_err(cut)?;
        self.have = 0;
        Ok(decode::head(head)?)
    }

    /// Takes the body of the message that [began](Self::begin).
    pub(crate) fn rest(&mut self, (kind, len): (Kind, usize)) -> Result<(Kind, usize), StreamError> {
        self.fill(len)?;
        Ok((kind, len))
    }

    /// Takes as much of a body as makes `len` bytes of it.
    fn fill(&mut self, len: usize) -> Result<(), StreamError> {
        while self.have < len {
            // The buffer grows with what comes, not with what was said to come, and is kept for the next message.
            if self.have == self.body.len() {
                self.body.resize(len.min(2 * self.have.max(STEP)), 0);
            }
            let room = len.min(self.body.len());
            match self.channel.read(&mut self.body[self.have..room]) {
                Ok(0) => return Err(StreamError::Closed),
                Ok(read) => self.have += read,
                Err(error) => return Err(cut(error)),
            }
        }
        Ok(())
    }

    /// Whether memory goes by this without being copied here.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.channel, Channel::Plain(_))
    }

    /// Sends the pages of `runs` with what is on them, straight from memory, and returns how many bytes the message has.
    pub(crate) fn send_pages(&mut self, runs: Runs, outlet: &dyn Outlet) -> Result<usize, StreamError> {
        let Channel::Plain(socket) = &mut self.channel else {
            return Err(WireError::Invalid(TLS).into());
        };
        encode::pages(&runs, &mut self.head);
        let len = self.head.len() + runs.len() as usize;
        socket.set_deadline(Instant::now() + self.patience);
        let sent = socket.send_first(&self.head).and_then(|()| {
            runs.each(|rest| match socket.call(|kind| outlet.send(rest, kind.as_fd()))? {
                0 => Err(io::ErrorKind::WriteZero.into()),
                sent => Ok(sent),
            })
        });
        sent.map_err(|error| failed(error, "take a message"))?;
        Ok(len)
    }

    /// The pages of the message of pages that [began](Self::begin), of `len` bytes, if what is on them can be put into memory as it comes: by
    /// [`receive_pages`](Self::receive_pages), instead of taking the rest.
    pub(crate) fn pages_ahead(&mut self, len: usize) -> Result<Option<Runs>, StreamError> {
        if !self.is_plain() {
            return Ok(None);
        }
        if len < LIST {
            return Err(WireError::Short.into());
        }
        self.fill(LIST)?;
        let list = match self.body.first_chunk() {
            Some(first) => decode::list_len(*first)?,
            None => return Ok(None),
        };
        if len < list {
            return Err(WireError::Short.into());
        }
        self.fill(list)?;
        Ok(decode::pages_of(&self.body[..list], len - list)?)
    }

    /// Puts what comes on the pages of `runs`, which are memory.
    pub(crate) fn receive_pages(&mut self, runs: Runs, inlet: &dyn Inlet) -> Result<(), StreamError> {
        let Channel::Plain(socket) = &mut self.channel else {
            return Err(WireError::Invalid(TLS).into());
        };
        inlet.expect(runs.as_slice());
        let came = runs.each(|rest| match socket.call(|kind| inlet.receive(rest, kind.as_fd()))? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            came => Ok(came),
        });
        came.map_err(cut)
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

/// Why the rest of a message did not come.
fn cut(error: io::Error) -> StreamError {
    failed(error, "send a whole message")
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
    use std::os::unix::net::UnixStream;
    use std::thread;

    use rustix::net::RecvFlags;

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

    /// Memory that takes any page, and tells what it took.
    struct Notes(std::sync::Mutex<Vec<(u64, usize)>>);

    impl Inlet for Notes {
        fn expect(&self, _runs: &[(u64, u64)]) {}

        fn receive(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
            let mut bytes = vec![0; runs[0].1 as usize];
            let (came, _) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::empty())?;
            self.0.lock().expect("notes").push((runs[0].0, came));
            Ok(came)
        }
    }

    /// A message of so many pages at 0, of which so many bytes come.
    fn pages(count: u64, bytes: usize) -> Vec<u8> {
        let mut runs = Runs::default();
        (0..count).for_each(|page| runs.push(page * crate::PAGE, crate::PAGE, true));
        let mut message = Vec::new();
        encode::pages(&runs, &mut message);
        message.resize(message.len() + bytes, 7);
        message
    }

    #[test]
    fn pages_that_do_not_come_as_a_whole_end_in_time() {
        for gone in [false, true] {
            let (mut stream, mut theirs, _) = pair(Duration::from_millis(300));
            theirs.write_all(&pages(2, 5000)).expect("sent");
            let (kind, len) = stream.begin(Duration::from_secs(5), "answer").expect("a head");
            assert_eq!(kind, Kind::Pages);
            let runs = stream.pages_ahead(len).expect("a list").expect("plain pages");
            assert_eq!(runs.as_slice(), [(0, 2 * crate::PAGE)]);
            let theirs = (!gone).then_some(theirs);
            let notes = Notes(std::sync::Mutex::default());
            let found = stream.receive_pages(runs, &notes);
            match gone {
                true => assert!(matches!(found, Err(StreamError::Closed)), "{found:?}"),
                false => assert!(
                    matches!(found, Err(StreamError::Late("send a whole message"))),
                    "{found:?}"
                ),
            }
            assert_eq!(
                notes
                    .0
                    .into_inner()
                    .expect("notes")
                    .iter()
                    .map(|(_, came)| came)
                    .sum::<usize>(),
                5000
            );
            drop(theirs);
        }
    }

    #[test]
    fn a_list_of_pages_is_looked_at_before_what_is_on_them() {
        let head = |len: u32| [&[5, 0, 0, 0][..], &len.to_le_bytes()].concat();
        let list = |packed: u32, count: u32| [packed.to_le_bytes(), count.to_le_bytes()].concat();
        for (len, body) in [
            (0, vec![]),
            (7, vec![0; 7]),
            (8, list(0, 0)),
            // More runs than there are bytes, or than may be.
            (23, list(0, 1)),
            (1 << 20, [list(0, 0), vec![0; 16]].concat()),
            (1 << 20, [list(0, 1025), vec![0; 16]].concat()),
            (1 << 20, [list(0, u32::MAX), vec![0; 16]].concat()),
            (1 << 20, [list(2, 1), vec![0; 16]].concat()),
            // A run that is no page.
            (1 << 20, [list(0, 1), vec![1; 16]].concat()),
        ] {
            let (mut stream, mut theirs, _) = pair(Duration::from_secs(20));
            theirs.write_all(&[head(len), body].concat()).expect("sent");
            let (_, len) = stream.begin(Duration::from_secs(5), "answer").expect("a head");
            let found = stream.pages_ahead(len);
            assert!(matches!(found, Err(StreamError::Wire(_))), "{found:?}");
        }
    }
}
