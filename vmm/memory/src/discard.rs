//! Gives pages of guest memory back to the host.

use std::any::Any;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::backing::Pages;
use crate::cow::renew;
use crate::ram::MemoryError;
use crate::{Backing, GuestMemory, GuestMemoryHandle, GuestRegion, RamOptions};

/// The smallest page of any guest, and the step in which addresses outside of memory are passed over.
const STEP: u64 = 4096;

/// Bytes of the parts of a region, from its begin, within which nobody divides its mappings. Private memory is given back part by part: older
/// kernels, such as 6.12, leave out what is behind a place where a mapping is divided while they wait for whoever serves page faults, and do
/// not tell so (`madvise_dontneed_free` in mm/madvise.c).
pub const PART: u64 = 4 << 20;

/// Why pages could not be given back. All others are, which a guest that gave them up cannot see.
#[derive(Debug, Error)]
#[error("the host does not take {len} bytes at {at:#x} of the guest's memory back")]
pub struct DiscardError {
    /// GPA of the pages.
    pub at: u64,
    /// Their bytes.
    pub len: u64,
    /// Cause.
    #[source]
    pub source: io::Error,
}

/// Gives pages of one guest's memory back to the host. They read as zeroes afterwards, here and in every process that maps shared
/// memory, and take memory again when somebody writes to them.
#[derive(Clone)]
pub struct Discarder {
    memory: GuestMemoryHandle,
    pages: Pages,
    backing: Backing,
    /// As long as one of them lives nothing is given back.
    keepers: Arc<RwLock<Vec<Keeper>>>,
}

/// Somebody who holds pages of the guest, such as devices of the host.
type Keeper = Weak<dyn Any + Send + Sync>;

impl Discarder {
    /// For `memory`, which was made as `backing` says.
    pub fn new(memory: GuestMemoryHandle, backing: impl Into<Backing>) -> Result<Self, MemoryError> {
        let backing = backing.into();
        let pages = backing.pages()?;
        Ok(Self {
            memory,
            pages,
            backing,
            keepers: Arc::default(),
        })
    }

    /// Gives nothing back any more, here and by all clones, as long as `keeper` lives: a device that holds a page would go on with that one while
    /// the guest gets another. What is being given back just now is done when this returns.
    pub fn keep_for(&self, keeper: Weak<dyn Any + Send + Sync>) {
        let mut keepers = self.keepers.write().unwrap_or_else(PoisonError::into_inner);
        keepers.retain(|other| other.strong_count() > 0 && !other.ptr_eq(&keeper));
        keepers.push(keeper);
    }

    /// Bytes of the largest page that the host backs any of the memory with: that much can be given back anywhere, less perhaps not.
    pub fn page_size(&self) -> u64 {
        self.pages.largest()
    }

    /// How the memory was made.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Whether there is guest memory at `at`.
    pub fn is_memory(&self, at: GuestAddress) -> bool {
        self.memory.memory().find_region(at).is_some()
    }

    /// Gives back every whole page between `at` and `at + len` that is guest memory, and nothing else. Returns how many bytes that were.
    pub fn discard(&self, at: GuestAddress, len: u64) -> Result<u64, DiscardError> {
        let keepers = self.keepers.read().unwrap_or_else(PoisonError::into_inner);
        if keepers.iter().any(|keeper| keeper.strong_count() > 0) {
            return Ok(0);
        }
        let memory = self.memory.memory();
        let mut all = Ok(0);
        for (region, offset, len) in pieces(&memory, at, len) {
            let base = region.start_addr().raw_value();
            let (options, page) = (self.backing.of(base), self.pages.at(base));
            let end = (offset + len) / page * page;
            let start = offset.next_multiple_of(page);
            if start < end {
                let given = punch(region, start, end - start, options).map_err(|source| DiscardError {
                    at: base + start,
                    len: end - start,
                    source,
                });
                // Whatever comes of one, the others are given back.
                all = all.and_then(|done| given.map(|()| done + end - start));
            }
        }
        all
    }

    /// Takes memory of the host for all of `[at, at + len)` now, if that is what could run short later: a pool of huge pages, where a
    /// guest's access would find none and end it. `[at, at + len)` must be whole pages of guest memory.
    pub fn reserve(&self, at: GuestAddress, len: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        for (region, offset, len) in pieces(&memory, at, len) {
            if self.backing.of(region.start_addr().raw_value()).huge_pages.is_none() {
                continue;
            }
            advise(region, offset, len, libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }
}

/// The parts of `[at, at + len)` that are guest memory: their region, where they begin in it, and their length.
fn pieces(memory: &GuestMemory, at: GuestAddress, len: u64) -> impl Iterator<Item = (&GuestRegion, u64, u64)> {
    let (mut next, mut left) = (Some(at), len);
    std::iter::from_fn(move || {
        loop {
            let at = next.filter(|_| left > 0)?;
            let found = memory
                .to_region_addr(at)
                .map(|(region, start)| (region, start.raw_value()));
            let step = match &found {
                Some((region, offset)) => left.min(region.len() - offset),
                None => left.min(STEP - at.raw_value() % STEP),
            };
            next = at.checked_add(step);
            left -= step;
            if let Some((region, offset)) = found {
                return Some((region, offset, step));
            }
        }
    })
}

/// Where the parts of `[offset, offset + len)` of a region begin, and their bytes.
fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    (offset / PART..end.div_ceil(PART)).map(move |part| {
        let start = offset.max(part * PART);
        (start, end.min((part + 1) * PART) - start)
    })
}

/// Gives `len` bytes from `offset` of `region` back, which are whole pages of its own. After an error those of other
/// [`PART`]s are given back all the same.
pub(crate) fn punch(region: &GuestRegion, offset: u64, len: u64, options: &RamOptions) -> io::Result<()> {
    let given = give_back(region, offset, len, options);
    // Whoever copies the guest must copy the zeroes.
    region.bitmap().mark_dirty(offset as usize, len as usize);
    given
}

fn give_back(region: &GuestRegion, offset: u64, len: u64, options: &RamOptions) -> io::Result<()> {
    let shared = region.flags() & libc::MAP_SHARED != 0;
    match region.file_offset().filter(|_| shared) {
        // Unmapping would leave the pages in the file. Not by the file's descriptor: who serves page faults would not be told.
        Some(_) if options.huge_pages.is_none() => advise(region, offset, len, libc::MADV_REMOVE),
        Some(file) => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let (start, len) = (file.start() + offset, len);
            // SAFETY: the call takes no pointers. What it frees belongs to this region alone: `offset + len` is within it.
            match unsafe { libc::fallocate64(file.file().as_raw_fd(), mode, start as i64, len as i64) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
        // The page of the file would come back.
        None if options.copy_on_write => renew(region, offset, len, options),
        None if options.huge_pages.is_some() => advise(region, offset, len, libc::MADV_DONTNEED),
        None => parts(offset, len)
            .map(|(offset, len)| advise(region, offset, len, libc::MADV_DONTNEED))
            .fold(Ok(()), Result::and),
    }
}

pub(crate) fn advise(region: &GuestRegion, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    let start = region
        .get_host_address(MemoryRegionAddress(offset))
        .map_err(io::Error::other)?;
    // SAFETY: the bytes are part of a live mapping of ours. Its contents belong to the guest, which expects them to change at any time:
    // nothing in this process holds a reference to them.
    match unsafe { libc::madvise(start.cast(), len as usize, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::allocate;

    const MIB: u64 = 1 << 20;

    fn fresh(shared: bool) -> Discarder {
        let options = RamOptions {
            shared,
            ..RamOptions::default()
        };
        let ranges = [
            (GuestAddress(0), MIB),
            (GuestAddress(4 * MIB), MIB),
            (GuestAddress(5 * MIB), MIB),
        ];
        let memory = allocate(&ranges, &options).expect("allocate");
        Discarder::new(GuestMemoryHandle::new(memory), options).expect("a page size")
    }

    fn filled(shared: bool) -> Discarder {
        let discarder = fresh(shared);
        for region in discarder.memory.memory().iter() {
            region
                .write_slice(&vec![7; MIB as usize], MemoryRegionAddress(0))
                .expect("fill");
        }
        discarder
    }

    /// Bytes that the host holds for the guest's memory.
    fn held(discarder: &Discarder) -> u64 {
        let memory = discarder.memory.memory();
        let pages = |region: &GuestRegion| {
            let mut map = vec![0u8; (region.len() / STEP) as usize];
            // SAFETY: one byte for each page of a live mapping.
            let done = unsafe { libc::mincore(region.as_ptr().cast(), region.len() as usize, map.as_mut_ptr().cast()) };
            assert_eq!(done, 0);
            map.iter().filter(|page| **page & 1 != 0).count() as u64 * STEP
        };
        memory.iter().map(pages).sum()
    }

    #[test]
    fn whole_pages_are_given_back_and_nothing_beside_them() {
        for shared in [false, true] {
            let discarder = filled(shared);
            assert_eq!(held(&discarder), 3 * MIB);
            // From the middle of a page of the second region to the middle of one of the third.
            let (at, end) = (4 * MIB + STEP + 1, 5 * MIB + 3 * STEP + 1);
            assert_eq!(
                discarder.discard(GuestAddress(at), end - at).expect("discard"),
                MIB + STEP
            );
            assert_eq!(held(&discarder), 2 * MIB - STEP, "shared {shared}");
            let memory = discarder.memory.memory();
            let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).expect("memory");
            for (at, value) in [
                (MIB - 1, 7),
                (4 * MIB + 2 * STEP - 1, 7),
                (4 * MIB + 2 * STEP, 0),
                (5 * MIB + 3 * STEP - 1, 0),
                (5 * MIB + 3 * STEP, 7),
            ] {
                assert_eq!(byte(at), value, "{at:#x}, shared {shared}");
            }
        }
    }

    #[test]
    fn nothing_is_given_back_while_somebody_holds_pages() {
        let discarder = filled(false);
        let (clone, keeper) = (discarder.clone(), Arc::new(()));
        let weak: Weak<()> = Arc::downgrade(&keeper);
        discarder.keep_for(weak);
        assert_eq!(clone.discard(GuestAddress(0), MIB).expect("kept"), 0);
        assert_eq!(held(&clone), 3 * MIB);
        drop(keeper);
        assert_eq!(clone.discard(GuestAddress(0), MIB).expect("given back"), MIB);
        assert_eq!(held(&clone), 2 * MIB);
    }

    #[test]
    fn what_is_no_memory_is_passed_over() {
        let discarder = filled(true);
        let (at, len) = (GuestAddress(MIB - STEP), 3 * MIB + 2 * STEP);
        assert_eq!(
            discarder.discard(at, len).expect("discard"),
            2 * STEP,
            "the ends of both regions"
        );
        assert_eq!(discarder.discard(GuestAddress(2 * MIB), MIB).expect("a hole"), 0);
        let end = u64::MAX - 2 * STEP;
        assert_eq!(discarder.discard(GuestAddress(end), STEP * 4).expect("the end"), 0);
        assert_eq!(held(&discarder), 3 * MIB - 2 * STEP);
        assert!(discarder.is_memory(GuestAddress(MIB - 1)) && !discarder.is_memory(GuestAddress(MIB)));
    }

    #[test]
    fn no_part_is_of_two() {
        let all = |offset, len| parts(offset, len).collect::<Vec<_>>();
        assert_eq!(all(STEP, PART - STEP), [(STEP, PART - STEP)]);
        assert_eq!(all(PART, PART), [(PART, PART)]);
        let found = all(PART - STEP, PART + 2 * STEP);
        assert_eq!(found, [(PART - STEP, STEP), (PART, PART), (2 * PART, STEP)]);
        assert_eq!(all(PART, 0), []);
    }

    #[test]
    fn zeroes_are_changes() {
        let discarder = fresh(false);
        let memory = discarder.memory.memory();
        let dirty = |at| {
            let (region, at) = memory.to_region_addr(GuestAddress(at)).expect("memory");
            region.bitmap().dirty_at(at.raw_value() as usize)
        };
        assert!(!dirty(4 * MIB));
        discarder.discard(GuestAddress(4 * MIB), STEP).expect("discard");
        assert!(dirty(4 * MIB) && !dirty(4 * MIB + STEP));
    }
}
