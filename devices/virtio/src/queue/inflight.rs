//! Which requests of a queue are being worked on, in memory that outlives the process: the inflight region of vhost-user
//! (docs/interop/vhost-user.rst, "Inflight I/O tracking", split rings).
//!
//! The region lies in a file that the front end keeps while back ends come and go. What stands in it is believed no more than a ring.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

/// Bytes before the first entry: features, version, number of entries, head of the last batch, used index.
const HEADER: usize = 16;
/// Bytes of an entry: a flag, padding, the next head of its batch, a counter.
const ENTRY: usize = 16;
/// Parts of the queues begin at multiples of this, so that no two share a cache line.
const ALIGNMENT: usize = 64;

const VERSION: usize = 8;
const ENTRIES: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The only version there is.
const SPLIT_V1: u16 = 1;

/// The part of an inflight region that belongs to one queue.
#[derive(Debug, Clone)]
pub struct InflightQueue {
    region: Arc<MmapRegion<()>>,
    offset: usize,
    entries: u16,
    counter: u64,
}

impl InflightQueue {
    /// Bytes of a region for one queue of `size` descriptors.
    pub fn bytes(size: u16) -> usize {
        (HEADER + ENTRY * usize::from(size)).next_multiple_of(ALIGNMENT)
    }

    /// The part at byte `offset` of `region`, for a queue of up to `size` descriptors. `None` if it is not inside, or not aligned.
    pub fn new(region: Arc<MmapRegion<()>>, offset: usize, size: u16) -> Option<Self> {
        let end = offset.checked_add(Self::bytes(size))?;
        (end <= region.size() && offset.is_multiple_of(ALIGNMENT)).then_some(Self {
            region,
            offset,
            entries: size,
            counter: 0,
        })
    }

    fn slice(&self) -> Option<VolatileSlice<'_, ()>> {
        self.region.get_slice(self.offset, Self::bytes(self.entries)).ok()
    }

    fn load16(&self, at: usize) -> u16 {
        let slice = self.slice();
        slice.and_then(|s| s.load(at, Ordering::Acquire).ok()).unwrap_or(0)
    }

    // `new` checked that the part is inside of the region, so no store fails.
    fn store16(&self, at: usize, value: u16) {
        let _ = self.slice().map(|s| s.store(value, at, Ordering::Release));
    }

    fn flag(&self, head: u16) -> bool {
        let at = HEADER + ENTRY * usize::from(head);
        let value: Option<u8> = self.slice().and_then(|s| s.load(at, Ordering::Acquire).ok());
        head < self.entries && value == Some(1)
    }

    fn set_flag(&self, head: u16, on: bool) {
        if head < self.entries {
            let at = HEADER + ENTRY * usize::from(head);
            let _ = self.slice().map(|s| s.store(u8::from(on), at, Ordering::Release));
        }
    }

    fn counter_of(&self, head: u16) -> u64 {
        let at = HEADER + ENTRY * usize::from(head) + COUNTER;
        let slice = self.slice();
        slice.and_then(|s| s.load(at, Ordering::Acquire).ok()).unwrap_or(0)
    }

    /// Takes the region over. `used` is the used ring's index as it stands in memory, of which the region may be a step behind when its
    /// last user was killed. Returns the heads of what was in flight, in the order in which it came; `None` if the region is one of
    /// another version or length. A region of zeroes is a new one.
    pub(super) fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        match (self.load16(VERSION), self.load16(ENTRIES)) {
            (0, _) => self.reset(),
            (SPLIT_V1, entries) if entries == self.entries => {}
            _ => return None,
        }
        // What was put into the used ring and not taken out of here.
        let behind = used.wrapping_sub(self.load16(USED_INDEX)).min(self.entries);
        let mut head = self.load16(LAST_BATCH_HEAD);
        for _ in 0..behind {
            if head >= self.entries {
                break;
            }
            self.set_flag(head, false);
            head = self.load16(HEADER + ENTRY * usize::from(head) + NEXT);
        }
        self.store16(USED_INDEX, used);
        let mut open: Vec<(u64, u16)> = (0..self.entries)
            .filter(|head| self.flag(*head))
            .map(|head| (self.counter_of(head), head))
            .collect();
        open.sort_unstable();
        self.counter = open.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(open.into_iter().map(|(_, head)| head).collect())
    }

    fn reset(&self) {
        for head in 0..self.entries {
            self.set_flag(head, false);
        }
        self.store16(LAST_BATCH_HEAD, 0);
        self.store16(USED_INDEX, 0);
        self.store16(ENTRIES, self.entries);
        self.store16(VERSION, SPLIT_V1);
    }

    /// A chain is taken from the ring.
    pub(super) fn begin(&mut self, head: u16) {
        if head < self.entries {
            let at = HEADER + ENTRY * usize::from(head) + COUNTER;
            let counter = self.counter;
            let _ = self.slice().map(|s| s.store(counter, at, Ordering::Release));
            self.counter = counter.wrapping_add(1);
            self.set_flag(head, true);
        }
    }

    /// A chain that was taken is put back.
    pub(super) fn cancel(&self, head: u16) {
        self.set_flag(head, false);
    }

    /// A chain is about to be put into the used ring.
    pub(super) fn ending(&self, head: u16) {
        if head < self.entries {
            let before = self.load16(LAST_BATCH_HEAD);
            self.store16(HEADER + ENTRY * usize::from(head) + NEXT, before);
            self.store16(LAST_BATCH_HEAD, head);
        }
    }

    /// Chains are in the used ring, whose index is `used` now.
    pub(super) fn ended(&self, heads: impl Iterator<Item = u16>, used: u16) {
        heads.for_each(|head| self.set_flag(head, false));
        self.store16(USED_INDEX, used);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u16 = 8;

    fn region() -> Arc<MmapRegion<()>> {
        Arc::new(MmapRegion::new(InflightQueue::bytes(SIZE)).expect("memory"))
    }

    fn queue(region: &Arc<MmapRegion<()>>) -> InflightQueue {
        InflightQueue::new(region.clone(), 0, SIZE).expect("it fits")
    }

    #[test]
    fn what_was_taken_and_not_ended_is_found_in_order() {
        let region = region();
        let mut first = queue(&region);
        assert_eq!(first.recover(0), Some(vec![]));
        for head in [5, 2, 7, 1] {
            first.begin(head);
        }
        first.ending(2);
        first.ended([2].into_iter(), 1);
        first.begin(2);
        assert_eq!(queue(&region).recover(1), Some(vec![5, 7, 1, 2]));
        // And again: nothing is forgotten by looking, and what comes now is behind it.
        let mut next = queue(&region);
        next.recover(1);
        next.begin(0);
        assert_eq!(queue(&region).recover(1), Some(vec![5, 7, 1, 2, 0]));
    }

    #[test]
    fn a_step_that_was_cut_short_is_finished() {
        for batch in [&[3][..], &[3, 4], &[4, 0, 3]] {
            let region = region();
            let mut first = queue(&region);
            first.recover(65_535);
            for head in [0, 3, 4, 6] {
                first.begin(head);
            }
            batch.iter().for_each(|head| first.ending(*head));
            // The used index was written, and then the process was killed.
            let used = 65_535u16.wrapping_add(batch.len() as u16);
            let mut open = vec![0, 3, 4, 6];
            open.retain(|head| !batch.contains(head));
            for _ in 0..2 {
                assert_eq!(queue(&region).recover(used).as_ref(), Some(&open));
            }
        }
        // Killed before that: all are still open.
        let region = region();
        let mut first = queue(&region);
        first.recover(9);
        first.begin(3);
        first.ending(3);
        assert_eq!(queue(&region).recover(9), Some(vec![3]));
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        assert!(InflightQueue::new(region(), 64, SIZE).is_none());
        assert!(InflightQueue::new(region(), usize::MAX - 63, SIZE).is_none());
        assert!(InflightQueue::new(region(), 0, SIZE + 8).is_none());
    }

    #[test]
    fn a_region_of_another_shape_is_refused() {
        let region = region();
        queue(&region).recover(0);
        let mut shorter = InflightQueue::new(region, 0, SIZE / 2).expect("it fits");
        assert_eq!(shorter.recover(0), None);
    }

    proptest! {
        #[test]
        fn any_content_is_survived(bytes in proptest::collection::vec(any::<u8>(), InflightQueue::bytes(SIZE)), used: u16) {
            let region = region();
            region.as_volatile_slice().copy_from(&bytes[..]);
            // As if it had the right shape.
            region.as_volatile_slice().store(SPLIT_V1, VERSION, Ordering::Relaxed).expect("inside");
            region.as_volatile_slice().store(SIZE, ENTRIES, Ordering::Relaxed).expect("inside");
            let mut queue = queue(&region);
            let mut heads = queue.recover(used).expect("the right shape");
            heads.sort_unstable();
            let before = heads.len();
            heads.dedup();
            prop_assert_eq!(before, heads.len());
            prop_assert!(heads.iter().all(|head| *head < SIZE));
        }
    }
}
