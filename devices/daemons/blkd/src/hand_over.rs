//! One process goes on in another one's place: usually a new version of this program, while guests run.
//!
//! The new process connects to the control socket of the old one and sends it a socket. The old one finishes what is in flight, closes its
//! connections, and sends sockets and disks: descriptors, so that locks are never given up in between and the sockets' queues keep the
//! front ends that connect again meanwhile. Once the new one has said that it has all of it, the old one ends. If it does not say so,
//! the old one goes on.
//!
//! Each message is one packet: JSON, with descriptors. First the exports, then the control socket.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, sockopt,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_api::server::{Listener, Passage};

use crate::{Daemon, Export, ExportError, ExportOptions};

/// How long the other process may take for a message.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the old process may take to finish what is in flight.
const DRAIN: Duration = Duration::from_secs(60);
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
    /// The conversation broke off.
    #[error("cannot {0} the other process")]
    Socket(&'static str, #[source] io::Error),
    /// A packet that cannot be understood.
    #[error("the other process says what cannot be understood")]
    Packet(#[source] serde_json::Error),
    /// A packet without its descriptors, or at the wrong time.
    #[error("the other process's messages are incomplete")]
    Incomplete,
    /// What was taken over is unusable.
    #[error("export {0}")]
    Export(String, #[source] ExportError),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Packet {
    /// With the listening socket and the disk.
    Export {
        options: Box<ExportOptions>,
        /// The socket's path, if whoever has it removes it in the end.
        path: Option<PathBuf>,
    },
    /// With the control socket. There is no more.
    Control { path: Option<PathBuf> },
    /// Answer of the new process: it has everything.
    Taken,
}

fn socket_error(what: &'static str) -> impl Fn(rustix::io::Errno) -> HandOverError {
    move |error| HandOverError::Socket(what, error.into())
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
    let count = received.map_err(socket_error("hear from"))?.bytes;
    let fds = control
        .drain()
        .filter_map(|item| match item {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if count == 0 {
        return Err(HandOverError::Socket("hear from", io::ErrorKind::UnexpectedEof.into()));
    }
    let packet = serde_json::from_slice(&bytes[..count]).map_err(HandOverError::Packet)?;
    Ok((packet, fds))
}

/// Gives everything to the process at the other end of `socket`. When it has it, this process serves nothing any more and is to end;
/// otherwise it goes on.
pub(crate) fn give(daemon: &Daemon, socket: OwnedFd) -> Result<(), HandOverError> {
    let set = |timeout| sockopt::set_socket_timeout(&socket, timeout, Some(PATIENCE));
    for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        set(timeout).map_err(socket_error("wait for"))?;
    }
    let flags = rustix::fs::fcntl_getfl(&socket).map_err(socket_error("wait for"))?;
    let blocking = flags - rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&socket, blocking).map_err(socket_error("wait for"))?;
    daemon.pause();
    let given = give_all(daemon, &socket);
    match &given {
        Ok(()) => daemon.leave(),
        Err(_) => daemon.resume(),
    }
    given
}

fn give_all(daemon: &Daemon, socket: &OwnedFd) -> Result<(), HandOverError> {
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
    match receive(socket)? {
        (Packet::Taken, _) => Ok(()),
        _ => Err(HandOverError::Incomplete),
    }
}

/// What a process took over.
pub struct Taken {
    control: Listener,
    exports: Vec<Arc<Export>>,
    /// The paths of the sockets, which stay the old one's until it has confirmed.
    paths: Vec<Passage>,
    socket: OwnedFd,
    stream: UnixStream,
}

impl Taken {
    /// Asks the process at `control_socket` for everything it has. It serves nothing when this returns.
    ///
    /// # Errors
    /// See [`HandOverError`]; the other process goes on.
    pub fn ask(control_socket: &Path) -> Result<Self, HandOverError> {
        let connect = |error| HandOverError::Connect(control_socket.to_owned(), error);
        let stream = UnixStream::connect(control_socket).map_err(connect)?;
        stream.set_read_timeout(Some(DRAIN)).map_err(connect)?;
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(socket_error("make a socket for"))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(DRAIN)).map_err(socket_error("wait for"))?;
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
        let (mut exports, mut paths) = (Vec::new(), Vec::new());
        let mut adopt = |socket, path| {
            let listener = Listener::adopt(socket, path);
            let passage = listener
                .passage()
                .map_err(|error| HandOverError::Socket("take from", error))?;
            passage.leave();
            paths.push(passage);
            Ok(listener)
        };
        loop {
            let (packet, mut fds) = match receive(&socket) {
                Ok(received) => received,
                Err(error) => return Err(refusal(&stream).unwrap_or(error)),
            };
            match (packet, fds.pop(), fds.pop()) {
                (Packet::Export { options, path }, Some(disk), Some(listener)) => {
                    let name = options.name.clone();
                    let listener = adopt(listener, path)?;
                    let export = Export::adopt(*options, disk.into(), listener);
                    exports.push(export.map_err(|error| HandOverError::Export(name, error))?);
                }
                (Packet::Control { path }, Some(fd), None) => {
                    return Ok(Self {
                        control: adopt(fd, path)?,
                        exports,
                        paths,
                        socket,
                        stream,
                    });
                }
                _ => return Err(HandOverError::Incomplete),
            }
        }
    }

    /// Tells the old process that it may end, and returns the exports and the control socket. Until then nothing has changed hands.
    ///
    /// # Errors
    /// The other process is gone or did not wait.
    pub fn confirm(mut self) -> Result<(Vec<Arc<Export>>, Listener), HandOverError> {
        send(&self.socket, &Packet::Taken, &[])?;
        // Its last word: that the paths are ours now.
        let mut answer = [0; 64];
        let count = self.stream.read(&mut answer);
        let count = count.map_err(|error| HandOverError::Socket("hear from", error))?;
        if !answer[..count].starts_with(b"HTTP/1.1 204") {
            return Err(HandOverError::Incomplete);
        }
        self.paths.iter().for_each(Passage::own);
        Ok((self.exports, self.control))
    }
}

/// What the other process answered instead of handing over.
fn refusal(mut stream: &UnixStream) -> Option<HandOverError> {
    stream.set_read_timeout(Some(Duration::from_millis(200))).ok()?;
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        text.extend_from_slice(&buffer[..count]);
        if text.len() > MAX_PACKET {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text);
    let body = text.split_once("\r\n\r\n")?.1.trim();
    (!body.is_empty()).then(|| HandOverError::Refused(body.to_owned()))
}
