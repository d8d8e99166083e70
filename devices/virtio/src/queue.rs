//! A running virtqueue. Devices pop chains and complete them; the ring layout (split today) stays in here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use thiserror::Error;
use triarch_device_core::RateLimit;
use triarch_memory::{GuestMemory, GuestMemoryHandle};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::atomic::GuestMemoryLoadGuard;
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::in_memory;
use crate::{Chain, Segment, VirtioInterrupt};

/// More buffers than this in one chain are refused: it is what the host can take in one vectored call (IOV_MAX).
const MAX_SEGMENTS: usize = 1024;
/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// How the driver broke the rules of the ring (virtio 1.2, 2.6 and 2.7).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RingFault {
    /// The ring's addresses are unaligned, out of memory or its size is not a power of two.
    #[error("its rings are not in guest memory or not aligned")]
    Layout,
    /// More chains are offered than the ring holds.
    #[error("its available index is further ahead than the queue is long")]
    AvailIndex,
    /// A ring could not be read or written.
    #[error("its rings cannot be accessed")]
    Inaccessible,
    /// A chain starts past the descriptor table.
    #[error("a chain starts at descriptor {0}, past the table")]
    Head(u16),
    /// A chain has no end, or points past its table, or to an unusable indirect table.
    #[error("a chain loops, leaves its table or has an invalid indirect table")]
    Broken,
    /// A buffer has no bytes.
    #[error("a buffer is empty")]
    Empty,
    /// A buffer lies outside of guest memory.
    #[error("the buffer {addr:#x}+{len:#x} is not guest memory")]
    OutOfMemory {
        /// GPA of the buffer.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A readable buffer follows a writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A chain has more buffers or bytes than any request needs.
    #[error("a chain has more than {MAX_SEGMENTS} buffers or 4 GiB")]
    TooLong,
    /// The request inside the chain is not one the device type defines.
    #[error("{0}")]
    Request(&'static str),
}

/// Where the driver put a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLayout {
    /// Index of the queue in its device.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Largest number the device allows.
    pub max_size: u16,
    /// GPA of the descriptor table.
    pub descriptors: u64,
    /// GPA of the driver area (available ring).
    pub driver: u64,
    /// GPA of the device area (used ring).
    pub device: u64,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// What of a queue goes into a snapshot, beside its [`QueueLayout`], which the transport saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    /// Index of the queue in its device.
    pub index: u16,
    /// Next entry of the available ring to look at.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

/// One virtqueue between start and stop.
pub struct VirtQueue {
    index: u16,
    ring: Queue,
    memory: GuestMemoryHandle,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The used index when [`signal`](Self::signal) last looked.
    signalled: u16,
    faulted: bool,
    log: RateLimit,
}

impl VirtQueue {
    /// Takes over a queue the driver enabled. `kick` becomes readable when the driver notifies.
    pub fn new(
        layout: &QueueLayout,
        memory: GuestMemoryHandle,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Result<Self, RingFault> {
        let mut ring = Queue::new(layout.max_size).map_err(|_| RingFault::Layout)?;
        let at = GuestAddress;
        ring.try_set_size(layout.size).map_err(|_| RingFault::Layout)?;
        ring.try_set_desc_table_address(at(layout.descriptors))
            .map_err(|_| RingFault::Layout)?;
        ring.try_set_avail_ring_address(at(layout.driver))
            .map_err(|_| RingFault::Layout)?;
        ring.try_set_used_ring_address(at(layout.device))
            .map_err(|_| RingFault::Layout)?;
        ring.set_event_idx(layout.event_idx);
        ring.set_ready(true);
        if !ring.is_valid(&*memory.memory()) {
            return Err(RingFault::Layout);
        }
        Ok(Self {
            index: layout.index,
            ring,
            memory,
            kick,
            interrupt,
            signalled: 0,
            faulted: false,
            log: RateLimit::default(),
        })
    }

    /// Continues where `state` left off.
    pub fn restore(&mut self, state: &QueueStateV1) {
        self.ring.set_next_avail(state.next_avail);
        self.ring.set_next_used(state.next_used);
        self.signalled = state.next_used;
    }

    /// How far the queue was worked off.
    pub fn state(&self) -> QueueStateV1 {
        QueueStateV1 {
            index: self.index,
            next_avail: self.ring.next_avail(),
            next_used: self.ring.next_used(),
        }
    }

    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Becomes readable when the driver notifies.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Guest memory as it is now.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemory> {
        self.memory.memory()
    }

    /// The next chain the driver offers. A chain that breaks the rules never gets here: the device is then marked as needing a
    /// reset and the queue stays empty until that comes.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.faulted {
            return None;
        }
        match self.try_pop() {
            Ok(chain) => chain,
            Err(fault) => {
                self.fault(&fault);
                None
            }
        }
    }

    /// Puts the last popped chain back, to be popped again. Only before anything else is popped or completed.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back, with the number of bytes written into it.
    pub fn complete(&mut self, head: u16, written: u32) {
        if self.faulted {
            return;
        }
        let memory = self.memory.memory();
        if self.ring.add_used(&*memory, head, written).is_err() {
            self.fault(&RingFault::Inaccessible);
        }
    }

    /// Gives several chains (head, bytes written) back in one step: the driver sees all of them or none. What spans several
    /// chains needs that, such as a packet in mergeable buffers, whose driver takes a missing one for an error.
    pub fn complete_all(&mut self, chains: &[(u16, u32)]) {
        let Some((&(last, written), first)) = chains.split_last() else {
            return;
        };
        if self.faulted {
            return;
        }
        let memory = self.memory.memory();
        let mut next = self.ring.next_used();
        for &(head, written) in first {
            let element = (u64::from(written) << 32) | u64::from(head);
            let slot = u64::from(next % self.ring.size());
            // The used ring was checked to lie in guest memory, so the sum does not wrap.
            let at = GuestAddress(self.ring.used_ring() + 4 + 8 * slot);
            if memory.write_obj(element.to_le(), at).is_err() {
                return self.fault(&RingFault::Inaccessible);
            }
            next = next.wrapping_add(1);
        }
        // The last one publishes the index, and with it the ones before.
        self.ring.set_next_used(next);
        self.complete(last, written);
    }

    /// Interrupts the driver if it wants to hear of what was completed since the last call.
    pub fn signal(&mut self) {
        if self.faulted {
            return;
        }
        match self.wants_interrupt() {
            Ok(false) => {}
            Ok(true) => {
                if let Err(error) = self.interrupt.queue(self.index) {
                    self.warn(&format_args!("cannot interrupt the guest: {error}"));
                }
            }
            Err(fault) => self.fault(&fault),
        }
    }

    /// Asks the driver for a notification of the next chain. Returns whether one came in meanwhile: then pop again instead of
    /// waiting.
    pub fn arm(&mut self) -> bool {
        if self.faulted {
            return false;
        }
        let memory = self.memory.memory();
        match self.ring.enable_notification(&*memory) {
            Ok(more) => more,
            Err(_) => {
                self.fault(&RingFault::Inaccessible);
                false
            }
        }
    }

    /// Tells the driver that no notification is needed for now.
    pub fn disarm(&mut self) {
        if self.faulted {
            return;
        }
        let memory = self.memory.memory();
        if self.ring.disable_notification(&*memory).is_err() {
            self.fault(&RingFault::Inaccessible);
        }
    }

    /// Marks the device as broken by its driver. The queue stays empty until the driver resets the device.
    pub fn fault(&mut self, fault: &RingFault) {
        self.faulted = true;
        self.warn(&format_args!(
            "the driver broke the queue, the device needs a reset: {fault}"
        ));
        self.interrupt.needs_reset();
    }

    /// Whether the driver broke the queue.
    pub fn faulted(&self) -> bool {
        self.faulted
    }

    fn warn(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(queue = self.index, held_back, "{message}");
        }
    }

    fn wants_interrupt(&mut self) -> Result<bool, RingFault> {
        let memory = self.memory.memory();
        // Orders the used index before what is read here: the driver sets these and then looks at the index once more.
        std::sync::atomic::fence(Ordering::SeqCst);
        let load = |at| {
            memory
                .load(GuestAddress(at), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|_| RingFault::Inaccessible)
        };
        if !self.ring.event_idx_enabled() {
            return Ok(load(self.ring.avail_ring())? & NO_INTERRUPT == 0);
        }
        let event = load(self.ring.avail_ring() + 4 + 2 * u64::from(self.ring.size()))?;
        let used = self.ring.next_used();
        let before = std::mem::replace(&mut self.signalled, used);
        // Whether the index passed `event` since the last look (virtio 1.2, 2.7.7.2).
        Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before))
    }

    fn try_pop(&mut self) -> Result<Option<Chain>, RingFault> {
        let memory = self.memory.memory();
        let avail = self
            .ring
            .avail_idx(&*memory, Ordering::Acquire)
            .map_err(|_| RingFault::Inaccessible)?;
        if avail.0 == self.ring.next_avail() {
            return Ok(None);
        }
        let mut offered = self.ring.iter(&*memory).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => RingFault::AvailIndex,
            _ => RingFault::Inaccessible,
        })?;
        let head = offered.next().ok_or(RingFault::Inaccessible)?.head_index();
        let size = self.ring.size();
        if head >= size {
            return Err(RingFault::Head(head));
        }
        let table = Table {
            at: GuestAddress(self.ring.desc_table()),
            len: size,
        };
        walk(&memory, table, head).map(Some)
    }
}

/// A table of descriptors: the ring's own or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    at: GuestAddress,
    len: u16,
}

impl Table {
    /// The indirect table that `descriptor` points to (virtio 1.2, 2.7.5.3).
    fn indirect(descriptor: &Descriptor) -> Result<Self, RingFault> {
        let bytes = descriptor.len() as usize;
        let len = u16::try_from(bytes / size_of::<Descriptor>()).map_err(|_| RingFault::Broken)?;
        if len == 0 || !bytes.is_multiple_of(size_of::<Descriptor>()) {
            return Err(RingFault::Broken);
        }
        Ok(Self {
            at: descriptor.addr(),
            len,
        })
    }

    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, RingFault> {
        if index >= self.len {
            return Err(RingFault::Broken);
        }
        let offset = u64::from(index) * size_of::<Descriptor>() as u64;
        let at = self.at.checked_add(offset).ok_or(RingFault::Broken)?;
        memory.read_obj(at).map_err(|_| RingFault::Broken)
    }
}

/// Follows a chain from `head` and checks all of it.
fn walk(memory: &GuestMemory, ring: Table, head: u16) -> Result<Chain, RingFault> {
    let mut chain = Chain {
        head,
        segments: SmallVec::new(),
        readable: 0,
    };
    let (mut table, mut index, mut inside) = (ring, head, false);
    let (mut steps, mut bytes) = (0, 0u32);
    loop {
        // A chain that visits more descriptors than its table has goes round in circles.
        if steps == table.len {
            return Err(RingFault::Broken);
        }
        steps += 1;
        let descriptor = table.read(memory, index)?;
        if descriptor.refers_to_indirect_table() {
            if inside || descriptor.has_next() {
                return Err(RingFault::Broken);
            }
            (table, index, inside, steps) = (Table::indirect(&descriptor)?, 0, true, 0);
            continue;
        }
        let (addr, len) = (descriptor.addr(), descriptor.len());
        check_buffer(memory, addr, len)?;
        bytes = bytes.checked_add(len).ok_or(RingFault::TooLong)?;
        if !descriptor.is_write_only() {
            if chain.readable != chain.segments.len() {
                return Err(RingFault::Order);
            }
            chain.readable += 1;
        }
        if chain.segments.len() == MAX_SEGMENTS {
            return Err(RingFault::TooLong);
        }
        chain.segments.push(Segment { addr, len });
        if !descriptor.has_next() {
            return Ok(chain);
        }
        index = descriptor.next();
    }
}

fn check_buffer(memory: &GuestMemory, addr: GuestAddress, len: u32) -> Result<(), RingFault> {
    if len == 0 {
        return Err(RingFault::Empty);
    }
    if !in_memory(memory, addr, len) {
        return Err(RingFault::OutOfMemory { addr: addr.0, len });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::mock::{Desc, FakeDriver};

    const DATA: u64 = 0x8000;

    fn faults(descriptors: &[Desc], head: u16) -> bool {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        driver.write_descriptors(descriptors);
        driver.offer(head);
        let popped = queue.pop();
        assert_eq!(popped.is_none(), queue.faulted());
        assert_eq!(driver.interrupt.needs_reset_count() > 0, queue.faulted());
        queue.faulted()
    }

    #[test]
    fn a_request_goes_through_and_interrupts() {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        driver.add(&[
            Desc::readable(DATA, 16),
            Desc::writable(DATA + 64, 512),
            Desc::writable(DATA + 1024, 1),
        ]);
        let chain = queue.pop().expect("a chain");
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 513));
        assert!(queue.pop().is_none());
        queue.complete(chain.head(), 513);
        queue.signal();
        assert_eq!(driver.used(), Some((chain.head(), 513)));
        assert_eq!(driver.interrupt.queue_count(0), 1);
    }

    #[test]
    fn no_interrupt_is_respected() {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        driver.set_no_interrupt(true);
        driver.add(&[Desc::readable(DATA, 16)]);
        let chain = queue.pop().expect("a chain");
        queue.complete(chain.head(), 0);
        queue.signal();
        assert_eq!(driver.interrupt.queue_count(0), 0);
    }

    #[test]
    fn event_index_decides_about_interrupts() {
        let mut driver = FakeDriver::new(8, true);
        let mut queue = driver.queue();
        driver.set_used_event(1);
        for expected in [0, 1] {
            driver.add(&[Desc::readable(DATA, 16)]);
            let chain = queue.pop().expect("a chain");
            queue.complete(chain.head(), 0);
            queue.signal();
            assert_eq!(driver.interrupt.queue_count(0), expected);
        }
    }

    #[test]
    fn chains_completed_together_appear_together() {
        let mut driver = FakeDriver::new(4, true);
        let mut queue = driver.queue();
        // Twice round the ring, with the event index in the middle of what is completed.
        for round in 0..3u16 {
            driver.set_used_event(round * 3 + 1);
            for _ in 0..3 {
                driver.add(&[Desc::writable(DATA, 16)]);
            }
            let heads: Vec<u16> = std::iter::from_fn(|| queue.pop().map(|c| c.head())).collect();
            let done: Vec<(u16, u32)> = heads.iter().copied().zip(1..).collect();
            queue.complete_all(&[]);
            assert_eq!(driver.used(), None);
            queue.complete_all(&done);
            queue.signal();
            assert_eq!(std::iter::from_fn(|| driver.used()).collect::<Vec<_>>(), done);
            assert_eq!(driver.interrupt.queue_count(0), u64::from(round) + 1);
            queue.signal();
            assert_eq!(driver.interrupt.queue_count(0), u64::from(round) + 1, "nothing new");
        }
    }

    #[test]
    fn indirect_tables_are_followed() {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        driver.write_table(
            0x6000,
            &[Desc::readable(DATA, 16).next(1), Desc::writable(DATA + 64, 8)],
        );
        driver.add(&[Desc::indirect(0x6000, 32)]);
        let chain = queue.pop().expect("a chain");
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 8));
    }

    #[test]
    fn broken_chains_mark_the_device() {
        let looping = [Desc::readable(DATA, 8).next(1), Desc::readable(DATA, 8).next(0)];
        assert!(faults(&looping, 0), "loop");
        assert!(faults(&[Desc::readable(DATA, 8).next(0)], 0), "self loop");
        assert!(faults(&[Desc::readable(DATA, 8).next(9)], 0), "next past the table");
        assert!(faults(&[Desc::readable(DATA, 8)], 8), "head past the table");
        assert!(faults(&[Desc::readable(DATA, 0)], 0), "empty buffer");
        assert!(faults(&[Desc::readable(1 << 40, 8)], 0), "out of memory");
        assert!(faults(&[Desc::readable(u64::MAX - 3, 8)], 0), "wraps");
        assert!(
            faults(&[Desc::writable(DATA, 8).next(1), Desc::readable(DATA, 8)], 0),
            "wrong direction"
        );
        assert!(
            faults(&[Desc::indirect(0x6000, 16).next(1), Desc::readable(DATA, 8)], 0),
            "indirect and next"
        );
        assert!(faults(&[Desc::indirect(0x6000, 17)], 0), "odd indirect table");
        assert!(faults(&[Desc::indirect(0x6000, 0)], 0), "empty indirect table");
        assert!(
            faults(&[Desc::indirect(1 << 40, 16)], 0),
            "indirect table out of memory"
        );
        assert!(!faults(&[Desc::readable(DATA, 8)], 0), "a good one does not");
    }

    #[test]
    fn a_faulted_queue_stays_silent() {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        driver.set_avail_index(100);
        assert!(queue.pop().is_none());
        assert!(queue.faulted());
        driver.set_avail_index(0);
        driver.add(&[Desc::readable(DATA, 8)]);
        assert!(queue.pop().is_none());
        assert!(!queue.arm(), "a worker must not spin on it");
    }

    #[test]
    fn state_moves_to_another_queue() {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        for _ in 0..3 {
            driver.add(&[Desc::readable(DATA, 8)]);
        }
        let first = queue.pop().expect("a chain");
        queue.complete(first.head(), 0);
        let mut restored = driver.queue();
        restored.restore(&queue.state());
        assert_eq!(restored.pop().map(|c| c.head()), Some(1));
        assert_eq!(restored.pop().map(|c| c.head()), Some(2));
        assert!(restored.pop().is_none());
    }

    fn any_desc() -> impl Strategy<Value = Desc> {
        let addr = prop_oneof![0u64..0x2_0000, any::<u64>()];
        let len = prop_oneof![0u32..64, any::<u32>()];
        (addr, len, 0u16..8, 0u16..12).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
    }

    proptest! {
        #[test]
        fn nothing_a_driver_writes_panics_or_spins(
            descriptors in prop::collection::vec(any_desc(), 8),
            table in prop::collection::vec(any_desc(), 4),
            heads in prop::collection::vec(0u16..10, 1..8),
        ) {
            let mut driver = FakeDriver::new(8, false);
            let mut queue = driver.queue();
            driver.write_descriptors(&descriptors);
            driver.write_table(0x6000, &table);
            let offered = heads.len();
            for head in heads {
                driver.offer(head);
            }
            let mut popped = 0;
            while let Some(chain) = queue.pop() {
                popped += 1;
                let memory = queue.memory();
                let mut vectors = Vec::new();
                crate::iovecs(&memory, chain.readable(), &mut vectors).expect("checked");
                crate::iovecs(&memory, chain.writable(), &mut vectors).expect("checked");
                queue.complete(chain.head(), chain.writable_len());
                queue.signal();
            }
            prop_assert!(popped == offered || queue.faulted());
            prop_assert_eq!(queue.faulted(), driver.interrupt.needs_reset_count() > 0);
        }
    }
}
