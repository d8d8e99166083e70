//! Descriptor chains as devices see them: checked lists of guest buffers.

use std::io::{self, Read, Write};

use smallvec::SmallVec;
use triarch_memory::GuestMemory;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// One buffer of a chain, in guest memory from end to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts (GPA).
    pub addr: GuestAddress,
    /// Its length in bytes, never zero.
    pub len: u32,
}

/// A request: buffers for the device to read, then buffers for it to write (virtio 1.2, 2.6.4.2).
///
/// The queue checked it: every segment lies in guest memory, none is empty, no readable one follows a writable one, the total is
/// at most `u32::MAX` bytes.
#[derive(Debug)]
pub struct Chain {
    pub(crate) head: u16,
    pub(crate) segments: SmallVec<[Segment; 6]>,
    pub(crate) readable: usize,
}

impl Chain {
    /// What names the chain towards the driver; give it to [`VirtQueue::complete`](crate::VirtQueue::complete).
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers to read, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// The buffers to write, in order.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes there are to read.
    pub fn readable_len(&self) -> u32 {
        self.readable().iter().map(|s| s.len).sum()
    }

    /// Bytes that can be written.
    pub fn writable_len(&self) -> u32 {
        self.writable().iter().map(|s| s.len).sum()
    }

    /// Reads the readable buffers as one stream.
    pub fn reader<'a>(&'a self, memory: &'a GuestMemory) -> ChainReader<'a> {
        ChainReader(Cursor {
            memory,
            segments: self.readable(),
            offset: 0,
            done: 0,
        })
    }

    /// Writes the writable buffers as one stream.
    pub fn writer<'a>(&'a self, memory: &'a GuestMemory) -> ChainWriter<'a> {
        ChainWriter(Cursor {
            memory,
            segments: self.writable(),
            offset: 0,
            done: 0,
        })
    }
}

struct Cursor<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    /// Bytes of the first segment already passed.
    offset: u32,
    done: u32,
}

impl<'a> Cursor<'a> {
    /// The next piece of at most `max` bytes; `None` at the end.
    fn piece(&self, max: usize) -> Option<(GuestAddress, usize)> {
        let first = self.segments.first()?;
        let len = ((first.len - self.offset) as usize).min(max);
        Some((GuestAddress(first.addr.0 + u64::from(self.offset)), len))
    }

    fn advance(&mut self, n: usize) {
        self.offset += n as u32;
        self.done += n as u32;
        if self.segments.first().is_some_and(|s| s.len == self.offset) {
            self.segments = &self.segments[1..];
            self.offset = 0;
        }
    }

    /// Cuts `n` bytes off the front, as segments.
    fn take(&mut self, n: u32) -> io::Result<SmallVec<[Segment; 6]>> {
        let mut cut = SmallVec::new();
        let mut left = n;
        while left > 0 {
            let (addr, len) = self.piece(left as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
            cut.push(Segment { addr, len: len as u32 });
            self.advance(len);
            left -= len as u32;
        }
        Ok(cut)
    }

    fn left(&self) -> u32 {
        self.segments.iter().map(|s| s.len).sum::<u32>() - self.offset
    }
}

/// Reads the device-readable part of a chain.
pub struct ChainReader<'a>(Cursor<'a>);

impl ChainReader<'_> {
    /// Bytes not read yet.
    pub fn left(&self) -> u32 {
        self.0.left()
    }

    /// Passes over the next `len` bytes and returns where they are, for vectored I/O without a copy.
    pub fn take_segments(&mut self, len: u32) -> io::Result<SmallVec<[Segment; 6]>> {
        self.0.take(len)
    }
}

impl Read for ChainReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((addr, len)) = self.0.piece(buf.len()) else {
            return Ok(0);
        };
        self.0
            .memory
            .read_slice(&mut buf[..len], addr)
            .map_err(io::Error::other)?;
        self.0.advance(len);
        Ok(len)
    }
}

/// Writes the device-writable part of a chain.
pub struct ChainWriter<'a>(Cursor<'a>);

impl ChainWriter<'_> {
    /// Bytes of room left.
    pub fn left(&self) -> u32 {
        self.0.left()
    }

    /// Bytes written or passed so far: the length to complete the chain with.
    pub fn written(&self) -> u32 {
        self.0.done
    }

    /// Passes over the next `len` bytes and returns where they are, for vectored I/O without a copy. Call [`mark_written`] once
    /// they hold data.
    pub fn take_segments(&mut self, len: u32) -> io::Result<SmallVec<[Segment; 6]>> {
        self.0.take(len)
    }
}

impl Write for ChainWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some((addr, len)) = self.0.piece(buf.len()) else {
            return Ok(0);
        };
        self.0.memory.write_slice(&buf[..len], addr).map_err(io::Error::other)?;
        self.0.advance(len);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Appends the host view of `segments` to `out`. The pointers stay valid as long as the caller holds the guard `memory` came from.
pub fn iovecs(memory: &GuestMemory, segments: &[Segment], out: &mut Vec<libc::iovec>) -> io::Result<()> {
    for segment in segments {
        for slice in GuestMemoryBackend::get_slices(memory, segment.addr, segment.len as usize) {
            let slice = slice.map_err(io::Error::other)?;
            out.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    Ok(())
}

/// Records that the host wrote the first `len` bytes of `segments` through pointers, so that migration sends them.
pub fn mark_written(memory: &GuestMemory, segments: &[Segment], mut len: u32) {
    for segment in segments {
        let n = segment.len.min(len);
        for slice in GuestMemoryBackend::get_slices(memory, segment.addr, n as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        len -= n;
        if len == 0 {
            break;
        }
    }
}

/// Whether `[addr, addr + len)` is guest memory from end to end.
pub(crate) fn in_memory(memory: &GuestMemory, addr: GuestAddress, len: u32) -> bool {
    GuestMemoryBackend::check_range(memory, addr, len as usize)
}
