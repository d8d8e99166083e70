//! Split virtqueues (virtio 1.2 §2.7), the driver's side, with or without event index and indirect descriptors.

use super::feature;
use crate::arch::io::Mmio;
use crate::clock::Deadline;
use crate::interrupts;
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering, fence};

/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// While set, waiting for a completion spins, with interrupts still asked for: for tests that mask them.
pub static SPIN_ONLY: AtomicBool = AtomicBool::new(false);

/// Longest chain that goes into an indirect table.
const TABLE_ENTRIES: usize = 32;

/// Memory the device may reach: page-aligned, zeroed, freed with the value.
pub struct Dma {
    address: u64,
    layout: Layout,
}

impl Dma {
    /// `len` bytes.
    pub fn new(len: usize) -> Result<Self, String> {
        let layout = Layout::from_size_align(len.max(1), 4096).map_err(|_| "bad layout")?;
        // SAFETY: the layout is not empty.
        match unsafe { alloc_zeroed(layout) } as u64 {
            0 => Err("out of memory".into()),
            address => Ok(Self { address, layout }),
        }
    }

    /// Guest-physical address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// The bytes. Volatile enough: the queue's fences order what the device wrote before what is read here.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: our own allocation, borrowed exclusively.
        unsafe { core::slice::from_raw_parts_mut(self.address as *mut u8, self.layout.size()) }
    }

    /// Writes a little-endian number at `offset`.
    pub fn put<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        self.bytes()[offset..offset + N].copy_from_slice(&value);
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout. Devices are reset before their buffers are dropped.
        unsafe { dealloc(self.address as *mut u8, self.layout) };
    }
}

/// One element of a chain.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

impl Segment {
    /// A part of `dma` that the device reads.
    pub fn read(dma: &Dma, offset: usize, len: usize) -> Self {
        Self {
            address: dma.address + offset as u64,
            len: len as u32,
            write: false,
        }
    }

    /// A part of `dma` that the device writes.
    pub fn write(dma: &Dma, offset: usize, len: usize) -> Self {
        Self {
            write: true,
            ..Self::read(dma, offset, len)
        }
    }
}

/// How a queue works.
#[derive(Clone, Copy, Default)]
pub struct Options {
    /// VIRTIO_F_EVENT_IDX agreed.
    pub event_idx: bool,
    /// Put chains into indirect tables.
    pub indirect: bool,
    /// What the device knows memory by is so much higher than its address: an IOMMU maps it.
    pub offset: u64,
}

impl Options {
    /// From agreed features.
    pub fn of(features: u64) -> Self {
        Self {
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            offset: 0,
        }
    }
}

/// A queue.
pub struct Queue {
    /// Its number.
    pub index: u16,
    /// Number of entries.
    pub size: u16,
    /// Interrupt vector on the boot processor.
    pub vector: u8,
    /// MSI-X table entry.
    pub msix_entry: u16,
    /// Notifications sent.
    pub kicks: u64,
    options: Options,
    rings: Dma,
    tables: Option<Dma>,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    added: u16,
    kicked: u16,
    seen: u16,
    notify: Mmio,
    notify_offset: u64,
}

impl Queue {
    /// An empty queue; `notify` is where its number is written to at `notify_offset`.
    pub fn new(
        index: u16,
        size: u16,
        options: Options,
        vector: u8,
        msix_entry: u16,
        notify: Mmio,
        notify_offset: u64,
    ) -> Result<Self, String> {
        let rings = Dma::new(Self::used_offset(size) + 6 + 8 * usize::from(size))?;
        let tables = if options.indirect {
            Some(Dma::new(usize::from(size) * TABLE_ENTRIES * 16)?)
        } else {
            None
        };
        let (free, chains) = ((0..size).rev().collect(), (0..size).map(|_| Vec::new()).collect());
        Ok(Self {
            index,
            size,
            vector,
            msix_entry,
            kicks: 0,
            options,
            rings,
            tables,
            free,
            chains,
            added: 0,
            kicked: 0,
            seen: 0,
            notify,
            notify_offset,
        })
    }

    fn avail_offset(size: u16) -> usize {
        16 * usize::from(size)
    }

    fn used_offset(size: u16) -> usize {
        (Self::avail_offset(size) + 6 + 2 * usize::from(size)).next_multiple_of(4)
    }

    /// Addresses of descriptor table, available ring, used ring, as the device knows them.
    pub fn addresses(&self) -> (u64, u64, u64) {
        let base = self.rings.address().wrapping_add(self.options.offset);
        (
            base,
            base + Self::avail_offset(self.size) as u64,
            base + Self::used_offset(self.size) as u64,
        )
    }

    /// After the notification registers moved.
    pub fn move_notify(&mut self, notify: Mmio) {
        self.notify = notify;
    }

    fn get16(&self, offset: usize) -> u16 {
        // SAFETY: inside `rings`; volatile because the device writes there.
        unsafe { ((self.rings.address() as usize + offset) as *const u16).read_volatile() }
    }

    fn put16(&self, offset: usize, value: u16) {
        // SAFETY: as in `get16`.
        unsafe { ((self.rings.address() as usize + offset) as *mut u16).write_volatile(value) };
    }

    /// Writes a descriptor; for chains built by hand too.
    pub fn set_descriptor(&self, at: u16, address: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(self.rings.address() + 16 * u64::from(at), address, len, flags, next);
    }

    /// Makes the chain that starts at `head` available, whatever it looks like.
    pub fn publish(&mut self, head: u16) {
        let avail = Self::avail_offset(self.size);
        self.put16(avail + 4 + 2 * usize::from(self.added % self.size), head);
        self.added = self.added.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.put16(avail + 2, self.added);
    }

    /// Sets the available index to anything.
    pub fn set_available_index(&mut self, index: u16) {
        self.put16(Self::avail_offset(self.size) + 2, index);
    }

    /// Adds a chain and makes it available; its head, or `None` when there is no room.
    pub fn add(&mut self, segments: &[Segment]) -> Option<u16> {
        if self.options.indirect && segments.len() > 1 && segments.len() <= TABLE_ENTRIES {
            return self.add_indirect(segments);
        }
        if segments.is_empty() || segments.len() > self.free.len() {
            return None;
        }
        let taken: Vec<u16> = self.free.split_off(self.free.len() - segments.len());
        for (n, segment) in segments.iter().enumerate() {
            let next = taken.get(n + 1).copied();
            let flags = if next.is_some() { NEXT } else { 0 } | if segment.write { WRITE } else { 0 };
            let address = segment.address.wrapping_add(self.options.offset);
            self.set_descriptor(taken[n], address, segment.len, flags, next.unwrap_or(0));
        }
        let head = taken[0];
        self.chains[usize::from(head)] = taken;
        self.publish(head);
        Some(head)
    }

    fn add_indirect(&mut self, segments: &[Segment]) -> Option<u16> {
        let table = self.tables.as_ref()?.address();
        let head = self.free.pop()?;
        let table = table + u64::from(head) * TABLE_ENTRIES as u64 * 16;
        for (n, segment) in segments.iter().enumerate() {
            let more = n + 1 < segments.len();
            let flags = if more { NEXT } else { 0 } | if segment.write { WRITE } else { 0 };
            write_descriptor(
                table + 16 * n as u64,
                segment.address.wrapping_add(self.options.offset),
                segment.len,
                flags,
                if more { n as u16 + 1 } else { 0 },
            );
        }
        let table = table.wrapping_add(self.options.offset);
        self.set_descriptor(head, table, segments.len() as u32 * 16, INDIRECT, 0);
        self.chains[usize::from(head)] = alloc::vec![head];
        self.publish(head);
        Some(head)
    }

    /// Tells the device about new chains, when it wants to be told.
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let used = Self::used_offset(self.size);
        let wanted = if self.options.event_idx {
            let event = self.get16(used + 4 + 8 * usize::from(self.size));
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(self.kicked)
        } else {
            self.get16(used) & 1 == 0
        };
        self.kicked = self.added;
        if wanted {
            self.kick_anyway();
        }
    }

    /// Notifies the device in any case.
    pub fn kick_anyway(&mut self) {
        self.kicks += 1;
        self.notify.write16(self.notify_offset, self.index);
    }

    /// Asks for an interrupt at the next completion, or for none.
    pub fn want_interrupt(&mut self, wanted: bool) {
        if self.options.event_idx {
            self.set_event(if wanted { self.seen } else { self.seen.wrapping_sub(1) });
        } else {
            self.put16(Self::avail_offset(self.size), u16::from(!wanted));
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for an interrupt when so many completions and one more are there; without the event index, at the next one.
    pub fn want_interrupt_after(&mut self, count: u16) {
        if self.options.event_idx {
            self.set_event(self.seen.wrapping_add(count));
            fence(Ordering::SeqCst);
        } else {
            self.want_interrupt(true);
        }
    }

    fn set_event(&self, event: u16) {
        self.put16(Self::avail_offset(self.size) + 4 + 2 * usize::from(self.size), event);
    }

    /// Completions to be taken.
    pub fn done(&self) -> u16 {
        self.get16(Self::used_offset(self.size) + 2).wrapping_sub(self.seen)
    }

    /// The next completion: (head, bytes written by the device).
    pub fn poll(&mut self) -> Option<(u16, u32)> {
        if self.done() == 0 {
            return None;
        }
        let used = Self::used_offset(self.size);
        fence(Ordering::SeqCst);
        let at = used + 4 + 8 * usize::from(self.seen % self.size);
        let (head, len) = (
            self.get16(at),
            u32::from(self.get16(at + 4)) | u32::from(self.get16(at + 6)) << 16,
        );
        self.seen = self.seen.wrapping_add(1);
        if let Some(chain) = self.chains.get_mut(usize::from(head)) {
            self.free.append(chain);
        }
        Some((head, len))
    }

    /// Sleeps until a completion, at most until `deadline`.
    pub fn wait(&mut self, deadline: Deadline) -> Option<(u16, u32)> {
        loop {
            let counted = interrupts::count(self.vector);
            self.want_interrupt(true);
            if let Some(done) = self.poll() {
                return Some(done);
            }
            let left = deadline.left()?;
            if !SPIN_ONLY.load(Ordering::Relaxed) {
                interrupts::sleep(self.vector, counted, left);
            }
        }
    }

    /// Spins until a completion, without interrupts, at most until `deadline`.
    pub fn spin(&mut self, deadline: Deadline) -> Option<(u16, u32)> {
        self.want_interrupt(false);
        loop {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            for _ in 0..64 {
                core::hint::spin_loop();
            }
            deadline.left()?;
        }
    }

    /// What is told of a queue whose device has not answered in time.
    pub fn silence(&self) -> String {
        let used = Self::used_offset(self.size);
        let event = self.get16(used + 4 + 8 * usize::from(self.size));
        alloc::format!(
            "no answer on queue {}: {} added, {} seen, {} used, flags {:#x}, event {event}, {} kicks",
            self.index,
            self.added,
            self.seen,
            self.get16(used + 2),
            self.get16(used),
            self.kicks,
        )
    }

    /// Chains in flight.
    pub fn in_flight(&self) -> u16 {
        self.added.wrapping_sub(self.seen)
    }
}

/// Writes one descriptor at a guest-physical address.
pub fn write_descriptor(at: u64, address: u64, len: u32, flags: u16, next: u16) {
    // SAFETY: callers pass slots of descriptor tables they allocated.
    unsafe {
        (at as *mut u64).write_volatile(address);
        ((at + 8) as *mut u32).write_volatile(len);
        ((at + 12) as *mut u16).write_volatile(flags);
        ((at + 14) as *mut u16).write_volatile(next);
    }
}
