//! The host's end of a port: a tap, or a network card by way of a packet socket.

#![allow(unsafe_code)] // vectored I/O

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use libc::iovec;
use triarch_net::PacketQueue;

use super::packet::{Rest, vector};
use crate::offload::{Accepts, HEADER};
use crate::switch::Drop;

/// What a port of the host is made of.
pub struct HostEnd {
    /// Its queues, at least one.
    pub queues: Vec<Arc<PacketQueue>>,
    /// Bytes of virtio header before each packet: 12, or 10 without `num_buffers`.
    pub header: usize,
    /// What can be written there undone.
    pub accepts: Accepts,
    /// What it is in the eyes of an administrator: `tap vmtap0`.
    pub label: String,
}

/// Such a port at work.
pub(super) struct Host {
    pub(super) end: HostEnd,
    /// For each queue, what it is called among all that can have work.
    pub(super) sources: Vec<u64>,
    vectors: Vectors,
}

/// The allocation of vectors between uses, empty then.
#[derive(Default)]
struct Vectors(Vec<iovec>);

// SAFETY: it holds no pointers: the vector is empty whenever nobody is at work with it.
unsafe impl Send for Vectors {}

/// What reading led to.
pub(super) enum Read {
    /// A packet of so many bytes, header included.
    Packet(usize),
    /// Nothing is there.
    Nothing,
    /// One that cannot be had, or none this time.
    Lost,
}

impl Host {
    pub(super) fn new(end: HostEnd) -> Self {
        Self {
            end,
            sources: Vec::new(),
            vectors: Vectors::default(),
        }
    }

    /// What becomes readable with packets of queue `index`.
    pub(super) fn fd(&self, index: usize) -> Option<RawFd> {
        self.end.queues.get(index).map(|queue| queue.as_raw_fd())
    }

    /// Reads one packet, header first.
    pub(super) fn read(&self, index: usize, buffer: &mut [u8]) -> Read {
        let Some(queue) = self.end.queues.get(index) else {
            return Read::Nothing;
        };
        let whole = [iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        }];
        // SAFETY: the vector is the buffer, which is borrowed for the call.
        match unsafe { queue.read(&whole) } {
            Ok(n) if n > self.end.header && n < buffer.len() => Read::Packet(n),
            Ok(_) => Read::Lost,
            Err(error) => match error.raw_os_error() {
                // The kernel met a packet it cannot describe, and dropped it.
                Some(libc::EINVAL | libc::EFAULT | libc::ENOMEM | libc::EINTR) => Read::Lost,
                _ => Read::Nothing,
            },
        }
    }

    /// Writes one packet.
    pub(super) fn write(
        &mut self,
        flow: u8,
        header: &[u8; HEADER],
        head: &[u8],
        rest: Rest<'_>,
    ) -> Result<usize, Drop> {
        let index = usize::from(flow) % self.end.queues.len().max(1);
        let Some(queue) = self.end.queues.get(index) else {
            return Err(Drop::Down);
        };
        let mut vectors = std::mem::take(&mut self.vectors.0);
        vectors.push(vector(&header[..self.end.header.min(HEADER)]));
        vectors.push(vector(head));
        let written = rest.vectors(&mut vectors).and_then(|()| {
            // SAFETY: the first two vectors and those of memory of this process are borrowed for longer than the call; those of a
            // guest's came from its memory, which is borrowed too.
            unsafe { queue.write(&vectors) }
        });
        vectors.clear();
        self.vectors.0 = vectors;
        match written {
            Ok(_) => Ok(index),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Drop::Malformed),
            Err(_) => Err(Drop::Host),
        }
    }
}
