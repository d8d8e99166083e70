//! A running virtqueue. Devices pop chains and complete them; the ring layout (split today) stays in here.

mod inflight;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::RateLimit;
use triarch_memory::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::atomic::GuestMemoryLoadGuard;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

pub use self::inflight::InflightQueue;
use self::walk::{MAX_SEGMENTS, Table, walk};
use crate::{Chain, DeviceMemory, VirtioInterrupt};

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
    /// An IOMMU does not let the device do that.
    #[error("the IOMMU does not let the device {} the buffer {addr:#x}+{len:#x}", if *.write { "write" } else { "read" })]
    Blocked {
        /// Address of the buffer, as the driver gave it.
        addr: u64,
        /// Its length in bytes.
        len: u32,
        /// It is for the device to write.
        write: bool,
    },
    /// A readable buffer follows a writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A chain has more buffers or bytes than any request needs.
    #[error("a chain has more than {MAX_SEGMENTS} buffers or 4 GiB")]
    TooLong,
    /// The inflight region is one of another kind of queue.
    #[error("its inflight region has another version or length")]
    Region,
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
    memory: DeviceMemory,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The used index when [`signal`](Self::signal) last looked.
    signalled: u16,
    faulted: bool,
    log: RateLimit,
    tracking: Option<Tracking>,
}

/// What a queue with an inflight region has beside the others.
struct Tracking {
    region: InflightQueue,
    /// Heads that an earlier process took and did not complete, to be popped before what the ring offers.
    again: VecDeque<u16>,
    /// What was popped last, and whether it was one of those.
    last: Option<(u16, bool)>,
}

impl VirtQueue {
    /// Takes over a queue the driver enabled. `kick` becomes readable when the driver notifies.
    pub fn new(
        layout: &QueueLayout,
        memory: impl Into<DeviceMemory>,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Result<Self, RingFault> {
        let memory = memory.into();
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
        if !ring.is_valid(&memory.view()) {
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
            tracking: None,
        })
    }

    /// Continues where an earlier process was when it ended, however that was: `region` has what it worked on, which is popped again
    /// before anything else, and the used ring has what it completed. Returns how many chains are popped again. From now on the
    /// region is kept up to date.
    ///
    /// # Errors
    /// The used ring cannot be read, or the region is one of another queue size or version.
    pub fn track(&mut self, mut region: InflightQueue) -> Result<usize, RingFault> {
        let used = self.used_index()?;
        let heads = region.recover(used).ok_or(RingFault::Region)?;
        let again: VecDeque<u16> = heads.into_iter().filter(|head| *head < self.size()).collect();
        let open = again.len();
        // At most as many as the ring is long.
        self.ring.set_next_avail(used.wrapping_add(open as u16));
        self.ring.set_next_used(used);
        self.signalled = used;
        self.tracking = Some(Tracking {
            region,
            again,
            last: None,
        });
        Ok(open)
    }

    /// The used ring's index as it stands in memory.
    ///
    /// # Errors
    /// The used ring cannot be read.
    pub fn used_index(&self) -> Result<u16, RingFault> {
        let memory = self.memory.view();
        let index = self.ring.used_idx(&memory, Ordering::Acquire);
        index.map(|index| index.0).map_err(|_| RingFault::Inaccessible)
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

    /// Address of the descriptor table, for who reads chains in another process.
    pub fn descriptors(&self) -> u64 {
        self.ring.desc_table()
    }

    /// GPA of the driver area (available ring).
    pub fn driver_area(&self) -> u64 {
        self.ring.avail_ring()
    }

    /// GPA of the device area (used ring).
    pub fn device_area(&self) -> u64 {
        self.ring.used_ring()
    }

    /// How many chains the driver has offered, modulo 2^16, as the ring tells.
    ///
    /// # Errors
    /// The ring is no longer in guest memory.
    pub fn offered(&self) -> Result<u16, RingFault> {
        let index = self.ring.avail_idx(&self.memory.view(), Ordering::Acquire);
        index.map(|index| index.0).map_err(|_| RingFault::Inaccessible)
    }

    /// Whether there is a chain to pop, as far as the ring's index tells: for whoever looks again and again.
    pub fn has_more(&self) -> bool {
        let again = self
            .tracking
            .as_ref()
            .is_some_and(|tracking| !tracking.again.is_empty());
        let next = self.ring.next_avail();
        !self.faulted && (again || self.offered().is_ok_and(|offered| offered != next))
    }

    /// How many chains were completed, modulo 2^16, as the ring tells: what another process completed is counted.
    ///
    /// # Errors
    /// The ring is no longer in guest memory.
    pub fn completed(&self) -> Result<u16, RingFault> {
        let index = self.ring.used_idx(&self.memory.view(), Ordering::Acquire);
        index.map(|index| index.0).map_err(|_| RingFault::Inaccessible)
    }

    /// The event that interrupts the driver, for another process; `None` if there is none now: then [`interrupt`](Self::interrupt).
    pub fn interrupt_event(&self) -> Option<EventFd> {
        self.interrupt.queue_event(self.index)
    }

    /// Interrupts the driver, whether it wants to hear or not.
    pub fn interrupt(&self) {
        if let Err(error) = self.interrupt.queue(self.index) {
            self.warn(&format_args!("cannot interrupt the guest: {error}"));
        }
    }

    /// Becomes readable when the driver notifies.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Guest memory as it is now.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemory> {
        self.memory.ram().memory()
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
        if let Some(tracking) = &mut self.tracking
            && let Some((head, again)) = tracking.last.take()
        {
            if again {
                return tracking.again.push_front(head);
            }
            tracking.region.cancel(head);
        }
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back, with the number of bytes written into it.
    pub fn complete(&mut self, head: u16, written: u32) {
        self.complete_all(&[(head, written)]);
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
        let memory = self.memory.view();
        if let Some(tracking) = &self.tracking {
            chains.iter().for_each(|(head, _)| tracking.region.ending(*head));
        }
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
        if self.ring.add_used(&memory, last, written).is_err() {
            return self.fault(&RingFault::Inaccessible);
        }
        if let Some(tracking) = &self.tracking {
            let heads = chains.iter().map(|(head, _)| *head);
            tracking.region.ended(heads, self.ring.next_used());
        }
    }

    /// Interrupts the driver if it wants to hear of what was completed since the last call.
    pub fn signal(&mut self) {
        if self.faulted {
            return;
        }
        match self.wants_interrupt() {
            Ok(false) => {}
            Ok(true) => self.interrupt(),
            Err(fault) => self.fault(&fault),
        }
    }

    /// Asks the driver for a notification of the next chain. Returns whether one came in meanwhile: then pop again instead of
    /// waiting.
    pub fn arm(&mut self) -> bool {
        if self.faulted {
            return false;
        }
        let memory = self.memory.view();
        match self.ring.enable_notification(&memory) {
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
        let memory = self.memory.view();
        if self.ring.disable_notification(&memory).is_err() {
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

    /// Marks the device as broken for a reason that is not its driver's doing. The queue stays empty until the driver resets the device.
    pub fn give_up(&mut self, reason: &dyn std::fmt::Display) {
        self.faulted = true;
        self.warn(&format_args!(
            "the queue cannot go on, the device needs a reset: {reason}"
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
        let memory = self.memory.view();
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

    /// Follows a chain once more that was popped and is not completed. The driver may have changed it since.
    pub fn chain(&self, head: u16) -> Result<Chain, RingFault> {
        let table = Table {
            at: GuestAddress(self.ring.desc_table()),
            len: self.ring.size(),
        };
        walk(&self.memory.view(), table, head)
    }

    fn try_pop(&mut self) -> Result<Option<Chain>, RingFault> {
        if let Some(head) = self.tracking.as_mut().and_then(|tracking| tracking.again.pop_front()) {
            let chain = self.chain(head)?;
            if let Some(tracking) = &mut self.tracking {
                tracking.last = Some((head, true));
            }
            return Ok(Some(chain));
        }
        let Some(chain) = self.next_offered()? else {
            return Ok(None);
        };
        if let Some(tracking) = &mut self.tracking {
            tracking.region.begin(chain.head);
            tracking.last = Some((chain.head, false));
        }
        Ok(Some(chain))
    }

    fn next_offered(&mut self) -> Result<Option<Chain>, RingFault> {
        let memory = self.memory.view();
        let avail = self
            .ring
            .avail_idx(&memory, Ordering::Acquire)
            .map_err(|_| RingFault::Inaccessible)?;
        if avail.0 == self.ring.next_avail() {
            return Ok(None);
        }
        let mut offered = self.ring.iter(&memory).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => RingFault::AvailIndex,
            _ => RingFault::Inaccessible,
        })?;
        let head = offered.next().ok_or(RingFault::Inaccessible)?.head_index();
        if head >= self.ring.size() {
            return Err(RingFault::Head(head));
        }
        self.chain(head).map(Some)
    }
}
