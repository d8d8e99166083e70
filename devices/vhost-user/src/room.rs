//! Room where memory of the guest comes and goes in parts, all of which daemons have from the start.

use std::sync::Arc;

use triarch_memory::{GuestMemory, GuestRegion};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// `memory` as a daemon is told of it: what of it lies in one of `rooms` is not told alone, but with all of that room. So parts come and
/// go without a word to the daemon, which the guest would have to wait for.
pub(crate) fn with_rooms(memory: &GuestMemory, rooms: &[Arc<GuestRegion>]) -> GuestMemory {
    let mut whole = memory.clone();
    for room in rooms {
        let parts = memory.iter().filter(|part| room.start_addr() <= part.start_addr());
        for part in parts.filter(|part| part.last_addr() <= room.last_addr()) {
            if let Ok((without, _)) = whole.remove_region(part.start_addr(), part.len()) {
                whole = without;
            }
        }
        // Nothing else is where a room is.
        if let Ok(with) = whole.insert_region(room.clone()) {
            whole = with;
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use triarch_memory::{RamOptions, SparseMemory, allocate};
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn parts_of_a_room_are_told_as_all_of_it() {
        const MIB: u64 = 1 << 20;
        let options = RamOptions {
            shared: true,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(0), MIB), (GuestAddress(64 * MIB), MIB)], &options).expect("memory");
        let mut room = SparseMemory::new(8 * MIB..16 * MIB, &options).expect("room");
        let whole = room.shared().expect("a region").expect("shared");
        let ranges = |memory: &GuestMemory| -> Vec<(u64, u64)> {
            memory
                .iter()
                .map(|region| (region.start_addr().0 / MIB, region.len() / MIB))
                .collect()
        };
        let rooms = [whole];
        let told = with_rooms(&memory, &rooms);
        assert_eq!(ranges(&told), [(0, 1), (8, 8), (64, 1)]);
        let mut more = memory.clone();
        for at in [8, 14] {
            let part = room.part(at * MIB..(at + 2) * MIB).expect("a part");
            more = more.insert_region(part).expect("free");
        }
        assert_eq!(ranges(&more), [(0, 1), (8, 2), (14, 2), (64, 1)]);
        assert_eq!(ranges(&with_rooms(&more, &rooms)), ranges(&told));
        assert_eq!(ranges(&with_rooms(&memory, &[])), ranges(&memory));
    }
}
