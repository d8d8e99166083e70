//! Memory that operations read from and write to.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;

/// Bytes of one bounce buffer; a longer transfer goes through it in several steps.
pub(crate) const BOUNCE_SIZE: usize = 128 << 10;
/// Bounce buffers one queue may have. Further operations that need one wait for their turn, so a guest
/// cannot make the VMM grow by sending badly aligned buffers.
const BOUNCE_BUFFERS: usize = 8;

/// One contiguous piece of memory of this process, usually guest memory.
///
/// The type is the place where the engine's only promise about memory is made: whoever creates one says
/// for how long it stays valid, and everything after that is safe code.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct IoBuf(libc::iovec);

// SAFETY: only an address and a length; `IoBuf::new` makes its caller promise that the memory may be
// accessed for as long as it is used, from whichever thread.
unsafe impl Send for IoBuf {}
// SAFETY: as above.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// Describes `len` bytes at `base`.
    ///
    /// # Safety
    /// From the time an operation with this buffer is submitted until its completion has been handed out,
    /// or the queue has been dropped (which waits for all operations), the memory must stay mapped and
    /// must be writable for reads and readable for writes. No Rust reference may point into it unless it
    /// is a shared one and the operation is a write. Other threads and the guest may access it meanwhile:
    /// the data moved is then unspecified, nothing else is.
    pub const unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// Sees vectors as buffers, without a copy.
    ///
    /// # Safety
    /// The promise of [`IoBuf::new`] for each of them.
    pub const unsafe fn from_iovecs(vecs: &[libc::iovec]) -> &[Self] {
        // SAFETY: the layouts are the same (`repr(transparent)`); the caller promises the rest.
        unsafe { std::slice::from_raw_parts(vecs.as_ptr().cast(), vecs.len()) }
    }

    /// Bytes in the buffer.
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether the buffer has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    pub(crate) fn iovec(&self) -> libc::iovec {
        self.0
    }
}

const ZEROES_SIZE: usize = 16 << 10;

#[repr(C, align(4096))]
struct Zeroes([u8; ZEROES_SIZE]);

static ZEROES: Zeroes = Zeroes([0; ZEROES_SIZE]);

/// Appends vectors of zero bytes, `len` at most, and returns how many bytes they hold: less than `len` only
/// when `len` is above 1 MiB. The vectors are for writing from.
pub(crate) fn push_zeroes(vecs: &mut Vec<libc::iovec>, len: u64) -> u64 {
    let len = len.min(1 << 20) as usize;
    let mut left = len;
    while left > 0 {
        let part = left.min(ZEROES_SIZE);
        vecs.push(libc::iovec {
            iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
            iov_len: part,
        });
        left -= part;
    }
    len as u64
}

/// A buffer of [`BOUNCE_SIZE`] bytes with an address fit for direct I/O.
#[derive(Debug)]
pub(crate) struct AlignedBuf {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: sole owner of its memory.
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// Allocates a buffer at a multiple of `align` (a power of two), zeroed by nobody. `None` when there is no memory.
    fn new(align: usize) -> Option<Self> {
        let layout = Layout::from_size_align(BOUNCE_SIZE, align).ok()?;
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc(layout) })?;
        Some(Self { base, layout })
    }

    /// The first `len` bytes as a vector.
    pub(crate) fn iovec(&self, len: usize) -> libc::iovec {
        libc::iovec {
            iov_base: self.base.as_ptr().cast(),
            iov_len: len.min(BOUNCE_SIZE),
        }
    }

    /// Copies the first `len` bytes out to `vecs`, as far as these reach.
    pub(crate) fn scatter(&self, vecs: &[libc::iovec], len: usize) {
        let mut done = 0;
        for vec in vecs {
            let part = vec.iov_len.min(len.min(BOUNCE_SIZE) - done);
            // SAFETY: `done + part` stays within this buffer; the vector is valid by the promise of
            // `IoBuf::new` and cannot overlap a buffer that only this engine knows.
            unsafe {
                vec.iov_base
                    .cast::<u8>()
                    .copy_from_nonoverlapping(self.base.as_ptr().add(done), part);
            };
            done += part;
        }
    }

    /// Fills the first `len` bytes from `vecs`, as far as these reach.
    pub(crate) fn gather(&mut self, vecs: &[libc::iovec], len: usize) {
        let mut done = 0;
        for vec in vecs {
            let part = vec.iov_len.min(len.min(BOUNCE_SIZE) - done);
            // SAFETY: as in `scatter`, in the other direction.
            unsafe {
                self.base
                    .as_ptr()
                    .add(done)
                    .copy_from_nonoverlapping(vec.iov_base.cast(), part);
            };
            done += part;
        }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Moves the start of `vec` forward by `len` bytes, which must not be more than it has.
pub(crate) fn advance(vec: &mut libc::iovec, len: usize) {
    debug_assert!(len <= vec.iov_len);
    vec.iov_base = vec.iov_base.cast::<u8>().wrapping_add(len).cast();
    vec.iov_len -= len;
}

/// The bounce buffers of one queue, made when first needed and kept.
#[derive(Debug)]
pub(crate) struct BouncePool {
    free: Vec<AlignedBuf>,
    made: usize,
    align: usize,
}

/// What [`BouncePool::take`] found.
pub(crate) enum Bounce {
    /// A buffer to use and give back.
    Taken(AlignedBuf),
    /// All are in use: wait until one is given back.
    Busy,
    /// None in use and no memory for one.
    NoMemory,
}

impl BouncePool {
    pub(crate) fn new(align: usize) -> Self {
        Self {
            free: Vec::new(),
            made: 0,
            align,
        }
    }

    pub(crate) fn take(&mut self) -> Bounce {
        if let Some(buffer) = self.free.pop() {
            return Bounce::Taken(buffer);
        }
        if self.made >= BOUNCE_BUFFERS {
            return Bounce::Busy;
        }
        match AlignedBuf::new(self.align) {
            Some(buffer) => {
                self.made += 1;
                Bounce::Taken(buffer)
            }
            None if self.made > 0 => Bounce::Busy,
            None => Bounce::NoMemory,
        }
    }

    pub(crate) fn give(&mut self, buffer: AlignedBuf) {
        self.free.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vecs_of(parts: &mut [Vec<u8>]) -> Vec<libc::iovec> {
        parts
            .iter_mut()
            .map(|p| libc::iovec {
                iov_base: p.as_mut_ptr().cast(),
                iov_len: p.len(),
            })
            .collect()
    }

    #[test]
    fn gather_and_scatter_keep_order_across_uneven_parts() {
        let mut from = vec![vec![1u8; 3], vec![2; 1000], vec![3; 7]];
        let mut to = vec![vec![0u8; 500], vec![0; 510]];
        let mut bounce = AlignedBuf::new(4096).unwrap();
        let (from_vecs, to_vecs) = (vecs_of(&mut from), vecs_of(&mut to));
        bounce.gather(&from_vecs, 1010);
        bounce.scatter(&to_vecs, 1010);
        assert_eq!(from.concat(), to.concat());
    }

    #[test]
    fn copies_stop_at_the_length_given_and_at_the_end_of_the_buffer() {
        let mut from = vec![vec![7u8; 2 * BOUNCE_SIZE]];
        let mut to = vec![vec![0u8; 2 * BOUNCE_SIZE]];
        let mut bounce = AlignedBuf::new(4096).unwrap();
        bounce.gather(&vecs_of(&mut from), usize::MAX);
        bounce.scatter(&vecs_of(&mut to), 10);
        assert_eq!(to[0].iter().filter(|b| **b == 7).count(), 10);
        bounce.scatter(&vecs_of(&mut to), usize::MAX);
        assert_eq!(to[0].iter().filter(|b| **b == 7).count(), BOUNCE_SIZE);
    }

    #[test]
    fn pool_is_bounded_and_reuses() {
        let mut pool = BouncePool::new(4096);
        let mut taken = Vec::new();
        while let Bounce::Taken(buffer) = pool.take() {
            taken.push(buffer);
        }
        assert!(taken.len() * BOUNCE_SIZE <= 1 << 20, "more than 1 MiB a queue");
        pool.give(taken.pop().unwrap());
        assert!(matches!(pool.take(), Bounce::Taken(_)));
        assert!(matches!(pool.take(), Bounce::Busy));
    }

    #[test]
    fn zeroes_are_capped_per_call() {
        let mut vecs = Vec::new();
        assert_eq!(push_zeroes(&mut vecs, 20_000), 20_000);
        assert_eq!(vecs.iter().map(|v| v.iov_len).sum::<usize>(), 20_000);
        vecs.clear();
        assert_eq!(push_zeroes(&mut vecs, u64::MAX), 1 << 20);
        assert_eq!(vecs.len(), 64);
    }
}
