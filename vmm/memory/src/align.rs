//! Where a region lies in the address space of the VMM.
//!
//! KVM maps guest memory with huge pages only where the host's address and the guest's are the same within such a page. Linux before 6.7 puts
//! a mapping just below the last one, whatever its size, and later ones do so with files.

use std::ptr;

use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

/// Bytes of the huge pages that a host can use without being told to.
const HUGE: u64 = 2 << 20;

/// How often a mapping that lies badly is made anew.
const ATTEMPTS: usize = 8;

/// What `map` maps, `size` bytes for the GPA `base`, placed so that huge pages of the host can be the guest's. If that cannot be had, it lies
/// somewhere else, and nothing but speed is lost.
///
/// # Errors
/// `map` fails at once.
pub(crate) fn placed<B: Bitmap, E>(
    base: u64,
    size: u64,
    map: impl Fn() -> Result<MmapRegion<B>, E>,
) -> Result<MmapRegion<B>, E> {
    // Each fills the room where it is, so that the next one is somewhere else; they go with this.
    let mut misplaced = Vec::new();
    loop {
        let room = Room::new(base, size);
        let mapping = match map() {
            Ok(mapping) => mapping,
            Err(error) => return misplaced.pop().ok_or(error),
        };
        drop(room);
        let lies_well = mapping.as_ptr() as u64 % HUGE == base % HUGE;
        if size < HUGE || lies_well || misplaced.len() == ATTEMPTS {
            return Ok(mapping);
        }
        misplaced.push(mapping);
    }
}

/// Two mappings that nobody can touch, with room for a region in between; they go with this.
///
/// Linux takes the highest room that is large enough for a mapping without a place of its own. That was where this one is, and it still is,
/// unless there is a higher one that is large enough for the region and not for both, or another thread was faster.
#[derive(Debug)]
struct Room {
    /// Addresses and bytes.
    guards: [(usize, usize); 2],
}

impl Room {
    /// Room for `size` bytes at the GPA `base`; none for those too small for a huge page, or if the address space is short of it.
    fn new(base: u64, size: u64) -> Option<Self> {
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
