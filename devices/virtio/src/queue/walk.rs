//! Following descriptor chains of a split ring (virtio 1.2, 2.7.5), believing nothing.

use smallvec::SmallVec;
use triarch_memory::GuestMemory;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::RingFault;
use crate::chain::in_memory;
use crate::{Chain, Segment};

/// More buffers than this in one chain are refused: it is what the host can take in one vectored call (IOV_MAX).
pub(super) const MAX_SEGMENTS: usize = 1024;

/// A table of descriptors: the ring's own or an indirect one.
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub(super) at: GuestAddress,
    pub(super) len: u16,
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
pub(super) fn walk(memory: &GuestMemory, ring: Table, head: u16) -> Result<Chain, RingFault> {
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
