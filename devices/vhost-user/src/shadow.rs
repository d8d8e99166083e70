//! The rings a daemon works on. They lie in memory of the VMM's own, beside the guest's: the relay fills them from the guest's rings.
//!
//! Split rings without EVENT_IDX (virtio 1.2, 2.7). What the daemon writes is not trusted.

use std::sync::atomic::{Ordering, fence};

use triarch_memory::{GuestMemory, RamOptions, allocate};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::LinkError;

/// VIRTQ_USED_F_NO_NOTIFY (virtio 1.2, 2.7.10).
const NO_NOTIFY: u16 = 1;
const PAGE: u64 = 4096;

/// Memory with the rings of one connection. Each connection has its own, so that a daemon which was given up and goes on all the same
/// writes where nobody looks.
pub(crate) struct Shadow {
    memory: GuestMemory,
    /// Where each queue's rings begin (GPA).
    rings: Vec<u64>,
    sizes: Vec<u16>,
}

/// Bytes of whole pages that hold `bytes`.
fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE) * PAGE
}

impl Shadow {
    /// Rings for queues of at most so many entries, which the daemon finds at `base`.
    pub(crate) fn new(base: GuestAddress, sizes: &[u16]) -> Result<Self, LinkError> {
        let mut length = 0;
        let rings = sizes.iter().map(|size| {
            let at = base.0 + length;
            length += Self::used_offset(*size) + pages(6 + 8 * u64::from(*size));
            at
        });
        let rings = rings.collect();
        let options = RamOptions {
            shared: true,
            thp: false,
            ..RamOptions::default()
        };
        let memory = allocate(&[(base, length)], &options);
        let memory = memory.map_err(|error| LinkError::Host {
            what: "memory for the daemon's rings",
            cause: std::io::Error::other(error),
        })?;
        Ok(Self {
            memory,
            rings,
            sizes: sizes.to_vec(),
        })
    }

    fn used_offset(size: u16) -> u64 {
        pages(6 + 2 * u64::from(size))
    }

    /// The memory to share.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The ring of queue `index`, which has `size` entries, empty. `None` if there is no such queue or it is larger.
    pub(crate) fn ring(&self, index: u16, size: u16) -> Option<ShadowRing> {
        let index = usize::from(index);
        let (available, most) = (*self.rings.get(index)?, *self.sizes.get(index)?);
        (size <= most).then(|| ShadowRing {
            memory: self.memory.clone(),
            available,
            used: available + Self::used_offset(most),
            size,
            offered: 0,
            taken: 0,
        })
    }
}

/// One ring, as its driver sees it.
pub(crate) struct ShadowRing {
    memory: GuestMemory,
    available: u64,
    used: u64,
    size: u16,
    /// Entries offered so far.
    offered: u16,
    /// Used entries taken so far.
    taken: u16,
}

impl ShadowRing {
    /// Where the daemon finds the available ring.
    pub(crate) fn available(&self) -> u64 {
        self.available
    }

    /// Where the daemon finds the used ring.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Empties both, as the daemon must find them.
    pub(crate) fn clear(&mut self) -> Result<(), GuestMemoryError> {
        self.offered = 0;
        self.taken = 0;
        self.memory.write_obj(0u32, GuestAddress(self.available))?;
        self.memory.write_obj(0u32, GuestAddress(self.used))
    }

    /// Writes a chain's head, not to be seen before [`publish`](Self::publish).
    pub(crate) fn push(&mut self, head: u16) -> Result<(), GuestMemoryError> {
        let slot = u64::from(self.offered % self.size);
        self.memory
            .write_obj(head.to_le(), GuestAddress(self.available + 4 + 2 * slot))?;
        self.offered = self.offered.wrapping_add(1);
        Ok(())
    }

    /// Lets the daemon see what was pushed; whether it wants to be notified.
    pub(crate) fn publish(&self) -> Result<bool, GuestMemoryError> {
        let index = GuestAddress(self.available + 2);
        self.memory.store(self.offered.to_le(), index, Ordering::Release)?;
        // Orders the index before the flag: the daemon sets the flag, then looks at the index once more.
        fence(Ordering::SeqCst);
        let flags: u16 = self.memory.load(GuestAddress(self.used), Ordering::Relaxed)?;
        Ok(u16::from_le(flags) & NO_NOTIFY == 0)
    }

    /// How many used entries there are to take.
    pub(crate) fn ready(&self) -> Result<u16, GuestMemoryError> {
        let index: u16 = self.memory.load(GuestAddress(self.used + 2), Ordering::Acquire)?;
        Ok(u16::from_le(index).wrapping_sub(self.taken))
    }

    /// The next used entry: head and bytes written.
    pub(crate) fn take(&mut self) -> Result<(u32, u32), GuestMemoryError> {
        let at = self.used + 4 + 8 * u64::from(self.taken % self.size);
        let [head, written]: [u32; 2] = [
            self.memory.read_obj(GuestAddress(at))?,
            self.memory.read_obj(GuestAddress(at + 4))?,
        ];
        self.taken = self.taken.wrapping_add(1);
        Ok((u32::from_le(head), u32::from_le(written)))
    }
}
