//! Sockets with deadlines, and TLS over them.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};
use rustls::{ClientConnection, ServerConnection, StreamOwned};

use super::Interrupt;
use crate::hand_over::CHUNK;

/// How soon a thread that waits for the other side notices that it shall not.
const TICK: Duration = Duration::from_millis(100);

/// Bytes that are read ahead at most: some records of TLS.
const AHEAD: usize = 128 << 10;

/// A socket whose calls end at a deadline or when interrupted.
pub(crate) struct Socket {
    kind: Plain,
    deadline: Instant,
    pub(super) interrupt: Interrupt,
    /// For whoever reads little at a time.
    ahead: Option<Ahead>,
}

/// Bytes that came and that nobody has read yet.
struct Ahead {
    bytes: Box<[u8]>,
    unread: Range<usize>,
}

impl Ahead {
    fn give(&mut self, buffer: &mut [u8]) -> usize {
        let len = buffer.len().min(self.unread.len());
        let end = self.unread.start + len;
        buffer[..len].copy_from_slice(&self.bytes[self.unread.start..end]);
        self.unread.start = end;
        len
    }
}

pub(crate) enum Plain {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsFd for Plain {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// What the deadline of a [`Socket`] ends calls with.
pub(super) const LATE: io::ErrorKind = io::ErrorKind::TimedOut;
/// What an interrupt ends them with; not `Interrupted`, which readers take for an invitation to try again.
pub(super) const STOPPED: io::ErrorKind = io::ErrorKind::QuotaExceeded;

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
            ahead: None,
        })
    }

    /// Reads more than is asked for from now on, as much as there is: TLS asks for a quarter of a record at a time.
    pub(crate) fn read_ahead(&mut self) {
        self.ahead = Some(Ahead {
            bytes: vec![0; AHEAD].into_boxed_slice(),
            unread: 0..0,
        });
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.call(|kind| match kind {
            Plain::Unix(socket) => socket.read(buffer),
            Plain::Tcp(socket) => socket.read(buffer),
        })
    }

    /// Until when its calls may take, from now on.
    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    pub(super) fn call(&mut self, mut call: impl FnMut(&mut Plain) -> io::Result<usize>) -> io::Result<usize> {
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

    /// Sends `bytes`, which more follow.
    pub(super) fn send_first(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
            let sent = self.call(|kind| Ok(send(kind.as_fd(), bytes, flags)?))?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    /// Sends a byte with these descriptors, [`CHUNK`] at most.
    pub(super) fn send_files(&mut self, files: &[BorrowedFd<'_>]) -> io::Result<()> {
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
    pub(super) fn receive_files(&mut self, files: &mut Vec<OwnedFd>) -> io::Result<bool> {
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
        let Some(mut ahead) = self.ahead.take() else {
            return self.receive(buffer);
        };
        let came = match ahead.unread.is_empty() {
            true => self.receive(&mut ahead.bytes).map(|came| ahead.unread = 0..came),
            false => Ok(()),
        };
        let given = came.map(|()| ahead.give(buffer));
        self.ahead = Some(ahead);
        given
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// TLS has many records at a time.
    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.call(|kind| match kind {
            Plain::Unix(socket) => socket.write_vectored(parts),
            Plain::Tcp(socket) => socket.write_vectored(parts),
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
