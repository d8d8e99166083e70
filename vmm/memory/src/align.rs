//! Where a region lies in the address space of the VMM.
//!
//! KVM maps guest memory with huge pages only where the host's address and the guest's are the same within such a page. Linux before 6.7 puts
//! a mapping just below the last one, whatever its size, and later ones do so with files.

use std::ptr;

/// Bytes of the huge pages that a host can use without being told to.
const HUGE: u64 = 2 << 20;

/// Two mappings that nobody can touch, with room for a region in between; they go with this.
///
/// Linux takes the highest room that is large enough for a mapping without a place of its own. That was where this one is, and
/// still is unless another thread was faster: then the region lies somewhere else, and nothing but speed is lost.
#[derive(Debug)]
pub(crate) struct Room {
    /// Addresses and bytes.
    guards: [(usize, usize); 2],
}

impl Room {
    /// Room for `size` bytes at the GPA `base`; none for those too small for a huge page, or if the address space is short of it.
    pub(crate) fn new(base: u64, size: u64) -> Option<Self> {
        if size < HUGE {
            return None;
        }
        let whole = usize::try_from(size.checked_add(HUGE)?).ok()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses the place, so that no other mapping is touched.
        let start = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let (start, size) = (start as usize, size as usize);
        // Whole pages of 4 KiB, as both addresses are.
        let below = (base.wrapping_sub(start as u64) % HUGE) as usize;
        let room = start + below;
        unmap(room, size);
        Some(Self {
            guards: [(start, below), (room + size, whole - below - size)],
        })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for (address, size) in self.guards {
            unmap(address, size);
        }
    }
}

/// Unmaps a part of what [`Room::new`] mapped.
fn unmap(address: usize, size: usize) {
    if size != 0 {
        // SAFETY: nobody else has the mapping that the range is a part of, and nobody points into it: it cannot be touched.
        unsafe { libc::munmap(address as *mut libc::c_void, size) };
    }
}
