//! One process goes on in another one's place: usually a new version of this program, while guests run.
//!
//! The new process connects to the control socket of the old one and sends it a socket. Each message there is one packet: JSON, with
//! descriptors.
//!
//! ```text
//! new                old
//!   Hello     ──►         in which version of this conversation it speaks
//!             ◄──  Export one packet each, with its listening socket and its disk: locks are never given up in between, and the
//!                         socket's queue keeps the front ends that connect
//!             ◄──  Control, with the control socket: there is no more
//!   Ready     ──►         all of it was good; the old one served as ever until here
//!             ◄──  Yours  what was in flight is finished, and all connections are closed
//!   Taken     ──►         it goes on as soon as the answer on the control socket says that the old one ends
//! ```
//!
//! Whatever goes wrong, the old one goes on. What can go wrong does so before `Ready`, when guests notice nothing of it.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sockopt,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_api::server::{Listener, Passage};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Daemon, Export, ExportError, ExportOptions};

/// The version of this conversation.
const VERSION: u32 = 1;
/// How long the other process may take for a message while guests are served.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take for the last one, while they are not.
const LAST_PATIENCE: Duration = Duration::from_secs(2);
/// How long the old process may take to finish what is in flight.
const DRAIN: Duration = Duration::from_secs(60);
/// How long the rest of an answer may take.
const REST: Duration = Duration::from_millis(200);
/// Longest packet.
const MAX_PACKET: usize = 64 << 10;

/// Why one process could not take another one's place.
#[derive(Debug, Error)]
pub enum HandOverError {
    /// There is nobody at the control socket.
    #[error("cannot connect to {0}")]
    Connect(PathBuf, #[source] io::Error),
    /// The other process refuses.
    #[error("the other process refuses: {0}")]
    Refused(String),
    /// The conversation cannot be had.
    #[error("cannot {0} the other process")]
    Socket(&'static str, #[source] io::Error),
    /// It says nothing.
    #[error("the other process does not answer")]
    Hangs,
    /// It closed the conversation.
    #[error("the other process ended, or gave up")]
    Gone,
    /// It speaks another version.
    #[error("version {program} hands over in another way ({version}) than version {} ({VERSION})", env!("CARGO_PKG_VERSION"))]
    Version {
        /// Of the conversation.
        version: u32,
        /// Of the program.
        program: String,
    },
    /// This process cannot have as many descriptors.
    #[error("this process may not open as many files as are handed over; its limit (RLIMIT_NOFILE) must be higher")]
    Limit,
    /// There is an export of that name in this process.
    #[error("there is an export called {0} in both processes")]
    Name(String),
    /// The size of a disk that was taken over cannot be read.
    #[error("cannot read the size of export {0}")]
    Size(String, #[source] io::Error),
    /// A packet that cannot be understood.
    #[error("the other process says what cannot be understood")]
    Packet(#[source] serde_json::Error),
    /// A packet without its descriptors, or at the wrong time.
    #[error("the other process leaves something out")]
    Incomplete,
    /// What was taken over is unusable.
    #[error("export {0}")]
    Export(String, #[source] ExportError),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Packet {
    Hello {
        version: u32,
        /// Version of the program.
        program: String,
    },
    /// With the listening socket and the disk.
    Export {
        options: Box<ExportOptions>,
        /// The socket's path, if whoever has it removes it in the end.
        path: Option<PathBuf>,
    },
    /// With the control socket.
    Control {
        path: Option<PathBuf>,
    },
    Ready,
    Yours,
    Taken,
}

fn socket_error(what: &'static str) -> impl Fn(Errno) -> HandOverError {
    move |error| match error {
        Errno::AGAIN => HandOverError::Hangs,
        Errno::PIPE | Errno::CONNRESET => HandOverError::Gone,
        error => HandOverError::Socket(what, error.into()),
    }
}

/// How long a message may take from now on.
fn set_patience(socket: &OwnedFd, patience: Duration) -> Result<(), HandOverError> {
    for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(socket, timeout, Some(patience)).map_err(socket_error("wait for"))?;
    }
    Ok(())
}

fn send(socket: &OwnedFd, packet: &Packet, fds: &[BorrowedFd<'_>]) -> Result<(), HandOverError> {
    let bytes = serde_json::to_vec(packet).map_err(HandOverError::Packet)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(HandOverError::Incomplete);
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(socket_error("send to"))
}

fn receive(socket: &OwnedFd) -> Result<(Packet, Vec<OwnedFd>), HandOverError> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC);
    let received = received.map_err(socket_error("hear from"))?;
    let fds = control
        .drain()
        .filter_map(|item| match item {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(HandOverError::Limit);
    }
    let packet = match received.bytes {
        0 => return Err(HandOverError::Gone),
        count => serde_json::from_slice(&bytes[..count]).map_err(HandOverError::Packet)?,
    };
    Ok((packet, fds))
}

/// Gives everything to the process at the other end of `socket`. When it has it, this process serves nothing any more and is to end;
/// otherwise it goes on.
pub(crate) fn give(daemon: &Daemon, socket: OwnedFd) -> Result<(), HandOverError> {
    set_patience(&socket, PATIENCE)?;
    let flags = rustix::fs::fcntl_getfl(&socket).map_err(socket_error("wait for"))?;
    let blocking = flags - rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&socket, blocking).map_err(socket_error("wait for"))?;
    offer(daemon, &socket)?;
    set_patience(&socket, LAST_PATIENCE)?;
    daemon.pause();
    let given = let_go(&socket);
    match &given {
        Ok(()) => daemon.leave(),
        Err(_) => daemon.resume(),
    }
    given
}

/// Gives everything away, while it goes on being used, and waits until the other process is ready.
fn offer(daemon: &Daemon, socket: &OwnedFd) -> Result<(), HandOverError> {
    match receive(socket)?.0 {
        Packet::Hello { version: VERSION, .. } => {}
        Packet::Hello { version, program } => return Err(HandOverError::Version { version, program }),
        _ => return Err(HandOverError::Incomplete),
    }
    let no_descriptor = |error| HandOverError::Socket("share descriptors with", error);
    for export in daemon.exports() {
        let passage = export.listener().passage().map_err(no_descriptor)?;
        let disk = export.handle().disk().share_file().map_err(no_descriptor)?;
        let packet = Packet::Export {
            options: Box::new(export.options()),
            path: passage.path.clone(),
        };
        send(socket, &packet, &[passage.socket.as_fd(), disk.as_fd()])?;
    }
    let control = daemon.control().ok_or(HandOverError::Incomplete)?;
    let packet = Packet::Control {
        path: control.path.clone(),
    };
    send(socket, &packet, &[control.socket.as_fd()])?;
    expect(socket, &Packet::Ready)
}

/// Tells the other process that nothing is used here any more.
fn let_go(socket: &OwnedFd) -> Result<(), HandOverError> {
    send(socket, &Packet::Yours, &[])?;
    expect(socket, &Packet::Taken)
}

/// Receives this packet.
fn expect(socket: &OwnedFd, wanted: &Packet) -> Result<(), HandOverError> {
    let (packet, _) = receive(socket)?;
    if std::mem::discriminant(&packet) == std::mem::discriminant(wanted) {
        Ok(())
    } else {
        Err(HandOverError::Incomplete)
    }
}

/// What a process took over.
pub struct Taken {
    control: Option<Listener>,
    exports: Vec<Arc<Export>>,
    /// Of the control socket.
    passage: Passage,
    socket: OwnedFd,
    stream: UnixStream,
}

impl Taken {
    /// Asks the process at `control_socket` for everything it has. It goes on serving that.
    ///
    /// # Errors
    /// See [`HandOverError`].
    pub fn ask(control_socket: &Path) -> Result<Self, HandOverError> {
        let connect = |error| HandOverError::Connect(control_socket.to_owned(), error);
        let stream = UnixStream::connect(control_socket).map_err(connect)?;
        stream.set_read_timeout(Some(DRAIN)).map_err(connect)?;
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(socket_error("make a socket for"))?;
        set_patience(&socket, DRAIN)?;
        let request = b"PUT /api/v1/blkd.hand-over HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let rights = [theirs.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&rights)) {
            return Err(HandOverError::Incomplete);
        }
        rustix::net::sendmsg(&stream, &[IoSlice::new(request)], &mut control, SendFlags::NOSIGNAL)
            .map_err(socket_error("send to"))?;
        drop(theirs);
        let hello = Packet::Hello {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
        };
        send(&socket, &hello, &[]).map_err(|error| refusal(&stream).unwrap_or(error))?;
        let mut exports = Vec::new();
        loop {
            let (packet, mut fds) = match receive(&socket) {
                Ok(received) => received,
                Err(error) => return Err(refusal(&stream).unwrap_or(error)),
            };
            match (packet, fds.pop(), fds.pop()) {
                (Packet::Export { options, path }, Some(disk), Some(listener)) => {
                    let name = options.name.clone();
                    let listener = Listener::adopt(listener, path);
                    let export = Export::adopt(*options, disk.into(), listener);
                    exports.push(export.map_err(|error| HandOverError::Export(name, error))?);
                }
                (Packet::Control { path }, Some(fd), None) => {
                    let control = Listener::adopt(fd, path);
                    let passage = control.passage().map_err(|_| HandOverError::Limit)?;
                    reserve(&exports)?;
                    return Ok(Self {
                        control: Some(control),
                        exports,
                        passage,
                        socket,
                        stream,
                    });
                }
                _ => return Err(HandOverError::Incomplete),
            }
        }
    }

    /// The control socket. Nobody is to be served there before [`confirm`](Self::confirm) has returned.
    pub fn take_control(&mut self) -> Option<Listener> {
        self.control.take()
    }

    /// Tells the old process that it may end, and puts the exports into `daemon`. Until then nothing has changed hands: what can fail
    /// should have been done before.
    ///
    /// # Errors
    /// See [`HandOverError`]; the other process goes on, unless it is gone.
    pub fn confirm(mut self, daemon: &Daemon) -> Result<(), HandOverError> {
        if let Some(export) = self
            .exports
            .iter()
            .find(|export| daemon.export(export.name()).is_some())
        {
            return Err(HandOverError::Name(export.name().to_owned()));
        }
        let exchange = || {
            send(&self.socket, &Packet::Ready, &[])?;
            expect(&self.socket, &Packet::Yours)?;
            for export in &self.exports {
                // It may have been made larger while it was looked at here.
                let known = export.handle().refresh_size();
                known.map_err(|error| HandOverError::Size(export.name().to_owned(), error))?;
            }
            send(&self.socket, &Packet::Taken, &[])
        };
        exchange().map_err(|error: HandOverError| refusal(&self.stream).unwrap_or(error))?;
        // Its last word: that the paths are ours now.
        let mut answer = vec![0; 4096];
        let count = self.stream.read(&mut answer);
        answer.truncate(count.map_err(|error| HandOverError::Socket("hear from", error))?);
        if !answer.starts_with(b"HTTP/1.1 204") {
            return Err(refusal_after(answer, &self.stream).unwrap_or(HandOverError::Gone));
        }
        self.passage.own();
        for export in self.exports {
            export.listener().own();
            daemon.put(export);
        }
        Ok(())
    }
}

/// Looks whether this process may open as many files as front ends of `exports` will bring and need.
fn reserve(exports: &[Arc<Export>]) -> Result<(), HandOverError> {
    // Sockets, memory, the inflight region, the log; and for each queue its events and what its thread waits with.
    let needed = exports
        .iter()
        .map(|export| 24 + 12 * usize::from(export.options().num_queues));
    let event = || EventFd::new(EFD_NONBLOCK);
    let tried: Result<Vec<_>, _> = (0..needed.sum()).map(|_| event()).collect();
    tried.map(drop).map_err(|_| HandOverError::Limit)
}

/// What the other process answered instead of handing over.
fn refusal(stream: &UnixStream) -> Option<HandOverError> {
    refusal_after(Vec::new(), stream)
}

/// The same, of which `text` was read already.
fn refusal_after(mut text: Vec<u8>, mut stream: &UnixStream) -> Option<HandOverError> {
    #[derive(Deserialize)]
    struct Body {
        error: String,
    }
    stream.set_read_timeout(Some(REST)).ok()?;
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        text.extend_from_slice(&buffer[..count]);
        if text.len() > MAX_PACKET {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text);
    let body = text.split_once("\r\n\r\n")?.1.trim();
    let sentence = serde_json::from_str(body).map_or(body.to_owned(), |Body { error }| error);
    (!sentence.is_empty()).then_some(HandOverError::Refused(sentence))
}
