//! Following descriptor chains of a split ring (virtio 1.2, 2.7.5), believing nothing.

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::RingFault;
use crate::Chain;
use crate::chain::in_memory;
use crate::dma::DeviceView;

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

    fn read(&self, memory: &DeviceView<'_>, index: u16) -> Result<Descriptor, RingFault> {
        if index >= self.len {
            return Err(RingFault::Broken);
        }
        let offset = u64::from(index) * size_of::<Descriptor>() as u64;
        let at = self.at.checked_add(offset).ok_or(RingFault::Broken)?;
        memory.read_obj(at).map_err(|_| RingFault::Broken)
    }
}

/// Follows a chain from `head` and checks all of it.
pub(super) fn walk(memory: &DeviceView<'_>, ring: Table, head: u16) -> Result<Chain, RingFault> {
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
        let write = descriptor.is_write_only();
        bytes = bytes.checked_add(len).ok_or(RingFault::TooLong)?;
        if !write && chain.readable != chain.segments.len() {
            return Err(RingFault::Order);
        }
        add_buffer(memory, &mut chain, addr, len, write)?;
        if !write {
            chain.readable = chain.segments.len();
        }
        if !descriptor.has_next() {
            return Ok(chain);
        }
        index = descriptor.next();
    }
}

/// Adds the memory behind a buffer to the chain.
fn add_buffer(
    memory: &DeviceView<'_>,
    chain: &mut Chain,
    addr: GuestAddress,
    len: u32,
    write: bool,
) -> Result<(), RingFault> {
    if len == 0 {
        return Err(RingFault::Empty);
    }
    let room = MAX_SEGMENTS - chain.segments.len();
    let blocked = RingFault::Blocked {
        addr: addr.0,
        len,
        write,
    };
    let pieces = memory.translate(addr, len, write, room + 1).ok_or(blocked)?;
    if pieces.len() > room {
        return Err(RingFault::TooLong);
    }
    for piece in pieces {
        if !in_memory(memory.ram(), piece.addr, piece.len) {
            return Err(RingFault::OutOfMemory { addr: addr.0, len });
        }
        chain.segments.push(piece);
    }
    Ok(())
}
