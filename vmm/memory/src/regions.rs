//! Regions that come and go while the guest runs.

use std::sync::{Arc, PoisonError};

use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::ram::{MemoryError, RamOptions, allocate};
use crate::{GuestMemory, GuestMemoryHandle, GuestRegion};

/// Makes `size` bytes of memory at `base`, with a file of their own if `options` want one, beside `memory`, which they become no part of
/// yet: [`insert`] does that.
///
/// # Errors
/// As [`allocate`]'s; the host must have enough for both.
pub fn allocate_region(
    memory: &GuestMemory,
    base: GuestAddress,
    size: u64,
    options: &RamOptions,
) -> Result<Arc<GuestRegion>, MemoryError> {
    let before: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    if options.huge_pages.is_none() {
        crate::ram::check_host_has(before.saturating_add(size))?;
    }
    let made = allocate(&[(base, size)], options)?;
    match made.remove_region(base, size) {
        Ok((_, region)) => Ok(region),
        Err(error) => Err(MemoryError::Layout(error)),
    }
}

/// Makes `region` a part of guest memory for everybody who has `handle`.
///
/// # Errors
/// It overlaps memory that is there.
pub fn insert(handle: &GuestMemoryHandle, region: Arc<GuestRegion>) -> Result<(), MemoryError> {
    let guard = handle.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = handle.memory().insert_region(region).map_err(MemoryError::Layout)?;
    guard.replace(memory);
    Ok(())
}

/// Takes the region that begins at `base` out of guest memory, for everybody who has `handle` and looks from now on. It stays mapped until
/// those are done who looked before, and until what is returned is dropped. `None` if there is none.
pub fn remove(handle: &GuestMemoryHandle, base: GuestAddress) -> Option<Arc<GuestRegion>> {
    let guard = handle.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = handle.memory();
    let size = memory
        .find_region(base)
        .filter(|region| region.start_addr() == base)?
        .len();
    let (memory, region) = memory.remove_region(base, size).ok()?;
    guard.replace(memory);
    Some(region)
}

/// Addresses of `room` that `memory` leaves free: where each gap begins, and its length in bytes.
pub fn gaps(memory: &GuestMemory, room: &std::ops::Range<u64>) -> Vec<(u64, u64)> {
    let mut regions: Vec<_> = memory
        .iter()
        .map(|region| (region.start_addr().raw_value(), region.last_addr().raw_value()))
        .collect();
    regions.sort_unstable();
    let (mut gaps, mut at) = (Vec::new(), room.start);
    for (first, last) in regions {
        let until = first.min(room.end);
        if until > at {
            gaps.push((at, until - at));
        }
        at = at.max(last.saturating_add(1));
    }
    if room.end > at {
        gaps.push((at, room.end - at));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn handle(options: &RamOptions) -> GuestMemoryHandle {
        GuestMemoryHandle::new(allocate(&[(GuestAddress(0), MIB)], options).expect("allocate"))
    }

    fn shared() -> RamOptions {
        RamOptions {
            shared: true,
            ..RamOptions::default()
        }
    }

    #[test]
    fn a_region_is_there_for_everybody_and_gone_for_everybody() {
        for options in [RamOptions::default(), shared()] {
            let handle = handle(&options);
            let other = handle.clone();
            let at = GuestAddress(4 * MIB);
            let before = other.memory();
            let region = allocate_region(&before, at, 2 * MIB, &options).expect("allocate");
            assert_eq!(region.file_offset().is_some(), options.shared);
            assert!(other.memory().write_obj(7u8, at).is_err());
            insert(&handle, region).expect("free addresses");
            other.memory().write_obj(7u8, at).expect("memory");
            assert!(
                before.write_obj(7u8, at).is_err(),
                "who looked before sees what was before"
            );
            let there = handle.memory();
            assert!(
                remove(&handle, GuestAddress(5 * MIB)).is_none(),
                "no region begins there"
            );
            let region = remove(&handle, at).expect("a region");
            assert_eq!(Arc::strong_count(&region), 2, "ours, and that of who still looks");
            assert_eq!(there.read_obj::<u8>(at).expect("memory"), 7);
            assert!(other.memory().read_obj::<u8>(at).is_err());
            assert!(remove(&handle, at).is_none());
        }
    }

    #[test]
    fn what_is_there_is_not_covered() {
        let options = shared();
        let handle = handle(&options);
        let add = |at, size| {
            let region = allocate_region(&handle.memory(), GuestAddress(at), size, &options).expect("allocate");
            insert(&handle, region)
        };
        add(2 * MIB, MIB).expect("free addresses");
        assert!(matches!(add(0, MIB), Err(MemoryError::Layout(_))));
        assert!(matches!(add(MIB, 2 * MIB), Err(MemoryError::Layout(_))));
        assert_eq!(handle.memory().iter().count(), 2);
    }

    #[test]
    fn the_host_must_have_all_of_it() {
        let options = RamOptions::default();
        let memory = handle(&options).memory().clone();
        let refused = allocate_region(&memory, GuestAddress(4 * MIB), 1 << 50, &options);
        assert!(matches!(refused, Err(MemoryError::MoreThanHost { .. })));
        let refused = allocate_region(&memory, GuestAddress(4 * MIB), 4097, &options);
        assert!(matches!(refused, Err(MemoryError::Unaligned { size: 4097, .. })));
    }

    #[test]
    fn gaps_are_what_is_free_in_the_room() {
        let options = RamOptions::default();
        let handle = handle(&options);
        let free = |room| gaps(&handle.memory(), &room);
        assert_eq!(free(4 * MIB..8 * MIB), [(4 * MIB, 4 * MIB)]);
        assert_eq!(free(0..3 * MIB), [(MIB, 2 * MIB)]);
        for at in [5 * MIB, 7 * MIB] {
            let region = allocate_region(&handle.memory(), GuestAddress(at), MIB, &options).expect("allocate");
            insert(&handle, region).expect("free addresses");
        }
        assert_eq!(free(4 * MIB..8 * MIB), [(4 * MIB, MIB), (6 * MIB, MIB)]);
        assert_eq!(free(4 * MIB..9 * MIB), [(4 * MIB, MIB), (6 * MIB, MIB), (8 * MIB, MIB)]);
        assert_eq!(free(5 * MIB..6 * MIB), []);
        assert_eq!(free(6 * MIB..6 * MIB), []);
    }
}
