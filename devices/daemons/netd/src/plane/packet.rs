//! A frame on its way: where its bytes are, and copying them.

use std::io;

use libc::iovec;
use smallvec::SmallVec;
use triarch_memory::GuestMemory;
use triarch_virtio::{Chain, Segment, iovecs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Where the bytes of a frame are that nobody looks at.
#[derive(Clone, Copy)]
pub(super) enum Rest<'a> {
    /// In another guest's memory, which may change at any time; so each byte of it is read once.
    Guest(&'a GuestMemory, &'a [Segment]),
    /// Here.
    Own(&'a [u8]),
}

impl Rest<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Guest(_, segments) => segments.iter().map(|s| s.len as usize).sum(),
            Self::Own(bytes) => bytes.len(),
        }
    }

    /// Appends it to `buffer`.
    pub(super) fn append(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Own(bytes) => buffer.extend_from_slice(bytes),
            Self::Guest(memory, segments) => {
                for segment in *segments {
                    let at = buffer.len();
                    buffer.resize(at + segment.len as usize, 0);
                    memory
                        .read_slice(&mut buffer[at..], segment.addr)
                        .map_err(io::Error::other)?;
                }
            }
        }
        Ok(())
    }

    /// Appends where it is, for vectored I/O.
    pub(super) fn vectors(&self, out: &mut Vec<iovec>) -> io::Result<()> {
        match self {
            Self::Own([]) => Ok(()),
            Self::Own(bytes) => {
                out.push(vector(bytes));
                Ok(())
            }
            Self::Guest(memory, segments) => iovecs(memory, segments, out),
        }
    }
}

/// Bytes of this process as a vectored call to write wants them.
pub(super) fn vector(bytes: &[u8]) -> iovec {
    iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// Cuts what is behind the first `skip` bytes out of `segments`, as segments.
pub(super) fn behind(segments: &[Segment], skip: usize) -> SmallVec<[Segment; 6]> {
    let mut left = skip;
    let mut rest = SmallVec::new();
    for segment in segments {
        let cut = left.min(segment.len as usize);
        left -= cut;
        if cut < segment.len as usize {
            rest.push(Segment {
                addr: GuestAddress(segment.addr.0 + cut as u64),
                len: segment.len - cut as u32,
            });
        }
    }
    rest
}

/// Reads the first bytes of `segments` into `buffer`; returns how many there are.
pub(super) fn read_front(memory: &GuestMemory, segments: &[Segment], buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    for segment in segments {
        let n = (segment.len as usize).min(buffer.len() - done);
        memory
            .read_slice(&mut buffer[done..done + n], segment.addr)
            .map_err(io::Error::other)?;
        done += n;
        if done == buffer.len() {
            break;
        }
    }
    Ok(done)
}

/// Writes into the buffers of several chains as one stream.
pub(super) struct Scatter<'a> {
    memory: &'a GuestMemory,
    chains: &'a [Chain],
    chain: usize,
    segment: usize,
    offset: u32,
}

impl<'a> Scatter<'a> {
    pub(super) fn new(memory: &'a GuestMemory, chains: &'a [Chain]) -> Self {
        Self {
            memory,
            chains,
            chain: 0,
            segment: 0,
            offset: 0,
        }
    }

    /// The next place, of at most `max` bytes.
    fn place(&mut self, max: usize) -> io::Result<(GuestAddress, usize)> {
        loop {
            let chain = self.chains.get(self.chain).ok_or(io::ErrorKind::WriteZero)?;
            match chain.writable().get(self.segment) {
                None => (self.chain, self.segment) = (self.chain + 1, 0),
                Some(segment) if segment.len == self.offset => (self.segment, self.offset) = (self.segment + 1, 0),
                Some(segment) => {
                    let n = ((segment.len - self.offset) as usize).min(max);
                    let at = GuestAddress(segment.addr.0 + u64::from(self.offset));
                    self.offset += n as u32;
                    return Ok((at, n));
                }
            }
        }
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (at, n) = self.place(bytes.len())?;
            let (now, later) = bytes.split_at(n);
            self.memory.write_slice(now, at).map_err(io::Error::other)?;
            bytes = later;
        }
        Ok(())
    }

    /// Writes what lies elsewhere, with one copy.
    pub(super) fn write_rest(&mut self, rest: Rest<'_>) -> io::Result<()> {
        let (memory, segments) = match rest {
            Rest::Own(bytes) => return self.write(bytes),
            Rest::Guest(memory, segments) => (memory, segments),
        };
        for segment in segments {
            for source in GuestMemoryBackend::get_slices(memory, segment.addr, segment.len as usize) {
                let source = source.map_err(io::Error::other)?;
                let mut done = 0;
                while done < source.len() {
                    let (at, n) = self.place(source.len() - done)?;
                    let part = source.subslice(done, n).map_err(io::Error::other)?;
                    let mut part_done = 0;
                    for target in GuestMemoryBackend::get_slices(self.memory, at, n) {
                        let target = target.map_err(io::Error::other)?;
                        let from = part.subslice(part_done, target.len()).map_err(io::Error::other)?;
                        from.copy_to_volatile_slice(target);
                        part_done += target.len();
                    }
                    done += n;
                }
            }
        }
        Ok(())
    }
}
