//! Guest buffers as the host's vectored calls want them.

#![allow(unsafe_code)] // hands pointers into guest memory to the kernel

use std::io;

use libc::iovec;
use triarch_memory::GuestMemory;
use triarch_net::PacketQueue;

use crate::{Segment, iovecs};

/// IOV_MAX.
const MAX_VECTORS: usize = 1024;

/// A queue of guest buffers, front first, usable while `memory` is held.
pub(super) struct GuestVectors<'m> {
    memory: &'m GuestMemory,
    vectors: Vec<iovec>,
    /// Vectors before this one were dropped.
    first: usize,
}

/// The allocation of [`GuestVectors`] between uses, empty then.
#[derive(Default)]
pub(super) struct Recycled(Vec<iovec>);

// SAFETY: it holds no pointers: the vector is empty whenever it is in here.
unsafe impl Send for Recycled {}

impl<'m> GuestVectors<'m> {
    pub(super) fn new(memory: &'m GuestMemory, recycled: &mut Recycled) -> Self {
        Self {
            memory,
            vectors: std::mem::take(&mut recycled.0),
            first: 0,
        }
    }

    /// Gives the allocation back for the next use.
    pub(super) fn recycle(mut self, recycled: &mut Recycled) {
        self.vectors.clear();
        recycled.0 = self.vectors;
    }

    /// Appends buffers and returns how many vectors they became.
    pub(super) fn push(&mut self, segments: &[Segment]) -> io::Result<usize> {
        let before = self.vectors.len();
        iovecs(self.memory, segments, &mut self.vectors)?;
        Ok(self.vectors.len() - before)
    }

    /// Drops `count` vectors at the front.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.first = (self.first + count).min(self.vectors.len());
        if self.first == self.vectors.len() {
            self.vectors.clear();
            self.first = 0;
        }
    }

    /// Reads a packet into the first `count` vectors, or as many as one call takes. A packet that does not fit is consumed and
    /// gives `None`.
    pub(super) fn read(&mut self, queue: &PacketQueue, count: usize) -> io::Result<Option<usize>> {
        let count = count.min(self.vectors.len() - self.first).min(MAX_VECTORS - 1);
        let end = self.first + count;
        let room: usize = self.vectors[self.first..end].iter().map(|v| v.iov_len).sum();
        // One byte more than there is room for tells a packet that fits from one that was cut off.
        let mut spill = 0u8;
        let spill = iovec {
            iov_base: (&raw mut spill).cast(),
            iov_len: 1,
        };
        let held = match self.vectors.get_mut(end) {
            Some(next) => Some(std::mem::replace(next, spill)),
            None => {
                self.vectors.push(spill);
                None
            }
        };
        // SAFETY: the vectors came from `iovecs` of memory that is borrowed for longer than this call and that nobody holds Rust
        // references into; the last one is a local.
        let result = unsafe { queue.read(&self.vectors[self.first..=end]) };
        match held {
            Some(vector) => self.vectors[end] = vector,
            None => self.vectors.truncate(end),
        }
        result.map(|n| (n <= room).then_some(n))
    }

    /// Writes all vectors as one packet.
    pub(super) fn write(&self, queue: &PacketQueue) -> io::Result<usize> {
        let vectors = &self.vectors[self.first..];
        if vectors.len() > MAX_VECTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the vectors came from `iovecs` of memory that is borrowed for longer than this call.
        unsafe { queue.write(vectors) }
    }
}
