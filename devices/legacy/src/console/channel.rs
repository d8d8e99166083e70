//! Byte streams that never make the caller wait.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use super::sys;

/// One direction of a console, or both.
pub(super) enum Channel {
    /// Does not block by itself: opened so, or a regular file, whose writes end in the page cache.
    Direct(File),
    /// A socket, asked not to block at each call, because its flags may be shared with other processes.
    Socket(File),
    /// Blocks, and cannot be opened a second time; asked for readiness before each byte.
    Polled(File),
}

impl Channel {
    /// A way to use `fd` (stdin or stdout) without blocking and without touching the flags it shares with other processes.
    pub(super) fn inherit(fd: &impl AsFd, write: bool) -> io::Result<Self> {
        let file = sys::duplicate(fd)?;
        let kind = file.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Self::Direct(file));
        }
        if kind.is_socket() {
            return Ok(Self::Socket(file));
        }
        // A second open file description of the same terminal or pipe has flags of its own.
        let again = OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(again.map_or_else(|_| Self::Polled(file), Self::Direct))
    }

    /// Reads what is there: zero bytes at the end, `WouldBlock` when there is nothing.
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Direct(file) => (&*file).read(buf),
            Self::Socket(file) => sys::receive(file.as_fd(), buf),
            Self::Polled(file) => {
                self.ready(libc::POLLIN)?;
                let first = buf.len().min(1);
                (&*file).read(&mut buf[..first])
            }
        }
    }

    /// Writes as much as fits: `WouldBlock` when nothing does.
    pub(super) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Direct(file) => (&*file).write(buf),
            Self::Socket(file) => sys::send(file.as_fd(), buf),
            Self::Polled(file) => {
                self.ready(libc::POLLOUT)?;
                (&*file).write(&buf[..buf.len().min(1)])
            }
        }
    }

    /// Whether nobody is at the other end any more (or, for a pseudo-terminal, now).
    pub(super) fn hung_up(&self) -> bool {
        sys::poll(self.as_fd(), 0, Duration::ZERO) & (libc::POLLHUP | libc::POLLERR) != 0
    }

    fn ready(&self, events: i16) -> io::Result<()> {
        // A hang-up counts as ready: the call that follows reports it.
        match sys::poll(self.as_fd(), events, Duration::ZERO) {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Direct(file) | Self::Socket(file) | Self::Polled(file) => file.as_fd(),
        }
    }
}
