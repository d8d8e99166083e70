//! Messages over the socket of a front end, each with a deadline.
//!
//! The rust-vmm crates `vhost` and `vhost-user-backend` are not used for this. The first knows neither STATUS nor the back end's
//! request CONFIG_CHANGE, and waits for the rest of a message for ever; the second, built on it, refuses INFLIGHT_SHMFD.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use thiserror::Error;
use triarch_vhost_protocol::{HEADER, Header, MAX_FDS, MAX_REQUEST, REPLY, message};
use vmm_sys_util::eventfd::EventFd;

use super::fd;

/// How long the rest of a message may take, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a connection ends.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The front end has closed it.
    #[error("the front end closed the connection")]
    Closed,
    /// It was told to end.
    #[error("the back end ends")]
    Stopped,
    /// The front end is silent in the middle of a message, or does not take answers.
    #[error("the front end hangs in the middle of a message")]
    Hangs,
    /// Memory it shared is not there any more.
    #[error("the front end took memory away that it shared")]
    Lost,
    /// What it sends is no message of the protocol.
    #[error("{0}")]
    Nonsense(String),
    /// The socket fails.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
}

/// A message of the front end.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// The socket of a front end.
pub(crate) struct Channel {
    socket: OwnedFd,
    /// Readable when memory of the front end is gone.
    lost: Option<Arc<EventFd>>,
}

impl Channel {
    /// Takes over a connected, non-blocking socket. A readable `lost` ends the connection.
    pub(crate) fn new(socket: OwnedFd, lost: Option<Arc<EventFd>>) -> Self {
        Self { socket, lost }
    }

    /// The next message; `None` when none began within `time`. A readable `stop` ends the wait, and the connection.
    pub(crate) fn receive(
        &self,
        stop: BorrowedFd<'_>,
        time: Option<Duration>,
    ) -> Result<Option<Message>, ChannelError> {
        if !self.wait(PollFlags::IN, stop, time)? {
            return Ok(None);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        self.fill(&mut header, &mut fds, stop, deadline)?;
        let header = Header::decode(&header);
        let Header { request, flags, size } = header;
        if !header.is_known_version() || header.is_reply() {
            return Err(ChannelError::Nonsense(format!(
                "message {request} has the flags {flags:#x}"
            )));
        }
        let size = size as usize;
        if size > MAX_REQUEST {
            return Err(ChannelError::Nonsense(format!("message {request} has {size} bytes")));
        }
        let mut payload = vec![0; size];
        self.fill(&mut payload, &mut fds, stop, deadline)?;
        Ok(Some(Message { header, payload, fds }))
    }

    /// Answers `request`.
    pub(crate) fn answer(
        &self,
        request: u32,
        payload: &[u8],
        fd: Option<BorrowedFd<'_>>,
        stop: BorrowedFd<'_>,
    ) -> Result<(), ChannelError> {
        let deadline = Instant::now() + PATIENCE;
        let bytes = message(request, REPLY, payload);
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let rights: Vec<_> = fd.filter(|_| sent == 0).into_iter().collect();
            if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&rights)) {
                return Err(ChannelError::Broken(Errno::NOBUFS.into()));
            }
            let parts = [IoSlice::new(&bytes[sent..])];
            match rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(n) => sent += n,
                Err(Errno::AGAIN) => self.wait_until(PollFlags::OUT, stop, deadline)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    /// Reads exactly `buffer`.
    fn fill(
        &self,
        buffer: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        let mut have = 0;
        while have < buffer.len() {
            match self.take(&mut buffer[have..], fds)? {
                Some(n) => have += n,
                None => self.wait_until(PollFlags::IN, stop, deadline)?,
            }
        }
        Ok(())
    }

    /// What is there now; `None` if nothing is.
    fn take(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Option<usize>, ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        let message = match rustix::net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(broken(error)),
        };
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = item {
                fds.extend(rights);
            }
        }
        // Those past the buffer's end were closed by the kernel.
        if fds.len() > MAX_FDS || message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ChannelError::Nonsense(
                "too many descriptors come with a message".into(),
            ));
        }
        match message.bytes {
            0 => Err(ChannelError::Closed),
            n => Ok(Some(n)),
        }
    }

    fn wait_until(&self, events: PollFlags, stop: BorrowedFd<'_>, deadline: Instant) -> Result<(), ChannelError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !self.wait(events, stop, Some(left))? {
            return Err(ChannelError::Hangs);
        }
        Ok(())
    }

    /// Waits for the socket; false when `time` is over.
    fn wait(&self, events: PollFlags, stop: BorrowedFd<'_>, time: Option<Duration>) -> Result<bool, ChannelError> {
        let end = time.map(|time| Instant::now() + time);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let lost = self.lost.as_deref().map_or(stop, fd::borrow);
            let mut fds = [
                PollFd::new(&self.socket, events),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(lost, PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                Err(error) => return Err(broken(error)),
                Ok(_) => {}
            }
            if !fds[1].revents().is_empty() {
                return Err(ChannelError::Stopped);
            }
            if !fds[2].revents().is_empty() {
                return Err(ChannelError::Lost);
            }
            if !fds[0].revents().is_empty() {
                return Ok(true);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn broken(error: Errno) -> ChannelError {
    match error {
        Errno::PIPE | Errno::CONNRESET => ChannelError::Closed,
        error => ChannelError::Broken(error.into()),
    }
}
