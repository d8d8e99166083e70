//! One packet queue: a descriptor that gives and takes one packet per call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::sys;

/// A non-blocking descriptor that reads and writes whole packets: a tap queue, or in tests a datagram socket.
#[derive(Debug)]
pub struct PacketQueue(OwnedFd);

impl PacketQueue {
    /// Takes over `fd` and makes it non-blocking. That setting belongs to the open file, so it shows in copies of the
    /// descriptor in other processes too.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        sys::set_nonblocking(fd.as_fd())?;
        Ok(Self(fd))
    }

    /// Reads one packet into `buffers` and returns its length; what does not fit is lost without a trace, so give a byte more
    /// than may come to notice. [`io::ErrorKind::WouldBlock`] when none waits.
    ///
    /// # Safety
    ///
    /// Each buffer must be memory that stays mapped and may be written for the time of the call. Others, the guest above all, may
    /// read and write it meanwhile, so nothing may hold a Rust reference into it.
    #[allow(unsafe_code)] // the buffers are guest memory
    pub unsafe fn read(&self, buffers: &[libc::iovec]) -> io::Result<usize> {
        let count = libc::c_int::try_from(buffers.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `buffers` is a live slice of `count` entries, and the caller answers for what they point to.
        let n = unsafe { libc::readv(self.0.as_raw_fd(), buffers.as_ptr(), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one packet from `buffers`. [`io::ErrorKind::WouldBlock`] when the queue is full.
    ///
    /// # Safety
    ///
    /// Each buffer must be memory that stays mapped for the time of the call; its contents may change meanwhile.
    #[allow(unsafe_code)] // the buffers are guest memory
    pub unsafe fn write(&self, buffers: &[libc::iovec]) -> io::Result<usize> {
        let count = libc::c_int::try_from(buffers.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `buffers` is a live slice of `count` entries, and the caller answers for what they point to.
        let n = unsafe { libc::writev(self.0.as_raw_fd(), buffers.as_ptr(), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Writes `packet`, header and frame. [`io::ErrorKind::WouldBlock`] when the queue is full.
    #[allow(unsafe_code)] // one buffer of our own
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let buffer = libc::iovec {
            iov_base: packet.as_ptr().cast_mut().cast(),
            iov_len: packet.len(),
        };
        // SAFETY: the buffer is `packet`, which is there as long as the call takes, and is only read.
        unsafe { self.write(&[buffer]) }.map(drop)
    }
}

impl AsFd for PacketQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PacketQueue {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}
