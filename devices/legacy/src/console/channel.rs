//! Byte streams that never make the caller wait.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use super::sys;

/// One direction of a console, or both. A vCPU thread may write to it, so it only uses calls that every thread is allowed.
pub(super) enum Channel {
    /// Does not block by itself: opened so, or a regular file, whose writes end in the page cache.
    Direct(File),
    /// Blocks, and shares its flags with other processes; asked for readiness first.
    Polled {
        file: File,
        /// Bytes that can be written at once without waiting when it says that it is ready.
        at_once: usize,
    },
}

/// A stream socket is only ready when a good part of its buffer is free: far more than this.
const SOCKET_ROOM: usize = 4096;

impl Channel {
    /// A way to use `fd` (stdin or stdout) without blocking and without touching the flags it shares with other processes.
    pub(super) fn inherit(fd: &impl AsFd, write: bool) -> io::Result<Self> {
        let file = sys::duplicate(fd)?;
        let kind = file.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Self::Direct(file));
        }
        // A second open file description of the same terminal or pipe has flags of its own. Sockets have none.
        let again = OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let at_once = if kind.is_socket() { SOCKET_ROOM } else { 1 };
        Ok(again.map_or_else(|_| Self::Polled { file, at_once }, Self::Direct))
    }

    /// Reads what is there: zero bytes at the end, `WouldBlock` when there is nothing.
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Direct(file) => (&*file).read(buf),
            Self::Polled { file, .. } => {
                self.ready(libc::POLLIN)?;
                (&*file).read(buf)
            }
        }
    }

    /// Writes as much as fits: `WouldBlock` when nothing does.
    pub(super) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Direct(file) => (&*file).write(buf),
            Self::Polled { file, at_once } => {
                self.ready(libc::POLLOUT)?;
                (&*file).write(&buf[..buf.len().min(*at_once)])
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
            Self::Direct(file) | Self::Polled { file, .. } => file.as_fd(),
        }
    }
}
