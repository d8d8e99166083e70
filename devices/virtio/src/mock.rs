//! The driver's side of a queue, for tests of devices: writes descriptors as a guest does, well or badly.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use triarch_device_core::NoSandbox;
use triarch_memory::{GuestMemory, GuestMemoryHandle, RamOptions, allocate};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::iommu::Endpoint;
use crate::{DeviceContext, DeviceMemory, QueueLayout, RingFault, VirtQueue, VirtioInterrupt, feature};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// GPAs of queue 0's parts; queue `n` has them `n * QUEUE_STRIDE` higher. Each part has a page, so at most 256 descriptors.
const DESCRIPTORS: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;
const QUEUE_STRIDE: u64 = 0x10_0000;
/// Size of the fake guest's memory in bytes.
pub const MEMORY: u64 = 16 << 20;

/// A raw descriptor (virtio 1.2, 2.7.5).
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    /// GPA of the buffer.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// NEXT, WRITE and INDIRECT.
    pub flags: u16,
    /// Next descriptor when NEXT is set.
    pub next: u16,
}

impl Desc {
    /// A buffer the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: 0,
            next: 0,
        }
    }
    /// A buffer the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: F_WRITE,
            next: 0,
        }
    }
    /// An indirect table of `len` bytes.
    pub fn indirect(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: F_INDIRECT,
            next: 0,
        }
    }
    /// The same, chained to descriptor `index`.
    pub fn next(self, index: u16) -> Self {
        Self {
            flags: self.flags | F_NEXT,
            next: index,
            ..self
        }
    }
}

/// Counts what the device signals.
#[derive(Default)]
pub struct MockInterrupt {
    queues: Mutex<HashMap<u16, u64>>,
    config: AtomicU64,
    needs_reset: AtomicU64,
    event: Mutex<Option<EventFd>>,
}

impl MockInterrupt {
    /// From now on every queue has this event.
    pub fn set_event(&self, event: Option<EventFd>) {
        *self.event.lock().expect("lock") = event;
    }

    /// Interrupts of queue `index` so far.
    pub fn queue_count(&self, index: u16) -> u64 {
        self.queues.lock().expect("lock").get(&index).copied().unwrap_or(0)
    }
    /// Waits until queue `index` had an interrupt: a device's thread interrupts a little after a request shows as used. `false` when none
    /// came in five seconds.
    pub fn wait_queue(&self, index: u16) -> bool {
        (0..5000).any(|_| {
            let came = self.queue_count(index) > 0;
            if !came {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            came
        })
    }
    /// Configuration interrupts so far.
    pub fn config_count(&self) -> u64 {
        self.config.load(Ordering::SeqCst)
    }
    /// How often the device was marked as needing a reset.
    pub fn needs_reset_count(&self) -> u64 {
        self.needs_reset.load(Ordering::SeqCst)
    }
}

impl VirtioInterrupt for MockInterrupt {
    fn queue(&self, index: u16) -> io::Result<()> {
        *self.queues.lock().expect("lock").entry(index).or_default() += 1;
        Ok(())
    }
    fn config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
    fn queue_event(&self, _index: u16) -> Option<EventFd> {
        let event = self.event.lock().expect("lock");
        event.as_ref().map(|event| event.try_clone().expect("a descriptor"))
    }
}

/// A driver of one queue in a guest of [`MEMORY`] bytes.
pub struct FakeDriver {
    /// The guest's memory.
    pub memory: GuestMemoryHandle,
    /// What the device signalled.
    pub interrupt: Arc<MockInterrupt>,
    /// The notification descriptor the device waits on.
    pub kick: Arc<EventFd>,
    layout: QueueLayout,
    next_descriptor: u16,
    avail: u16,
    /// The available index when [`wants_kick`](Self::wants_kick) last looked.
    announced: u16,
    used: u16,
}

impl FakeDriver {
    /// Queue 0 with `size` descriptors (a power of two, at most 256) in fresh memory.
    pub fn new(size: u16, event_idx: bool) -> Self {
        let ram = allocate(&[(GuestAddress(0), MEMORY)], &RamOptions::default()).expect("guest memory");
        Self::with(GuestMemoryHandle::new(ram), Arc::default(), 0, size, event_idx)
    }

    /// The same in memory that other processes can map.
    pub fn sharing(size: u16, event_idx: bool) -> Self {
        let options = RamOptions {
            shared: true,
            ..RamOptions::default()
        };
        let ram = allocate(&[(GuestAddress(0), MEMORY)], &options).expect("guest memory");
        Self::with(GuestMemoryHandle::new(ram), Arc::default(), 0, size, event_idx)
    }

    /// Queue `index` of the same device as `other`, with its memory and interrupts.
    pub fn beside(other: &Self, index: u16) -> Self {
        let (memory, interrupt) = (other.memory.clone(), other.interrupt.clone());
        Self::with(memory, interrupt, index, other.layout.size, other.layout.event_idx)
    }

    fn with(memory: GuestMemoryHandle, interrupt: Arc<MockInterrupt>, index: u16, size: u16, event_idx: bool) -> Self {
        assert!(size <= 256);
        let base = u64::from(index) * QUEUE_STRIDE;
        let layout = QueueLayout {
            index,
            size,
            max_size: size,
            descriptors: base + DESCRIPTORS,
            driver: base + DRIVER,
            device: base + DEVICE,
            event_idx,
        };
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("eventfd"));
        Self {
            memory,
            interrupt,
            kick,
            layout,
            next_descriptor: 0,
            avail: 0,
            announced: 0,
            used: 0,
        }
    }

    /// The device's view of the queue.
    pub fn queue(&self) -> VirtQueue {
        VirtQueue::new(
            &self.layout,
            self.memory.clone(),
            self.kick.clone(),
            self.interrupt.clone(),
        )
        .expect("layout")
    }

    /// The same of a device behind an IOMMU, to which the driver tells addresses that are `offset` higher than where things are.
    pub fn queue_behind(&self, endpoint: Arc<Endpoint>, offset: u64) -> Result<VirtQueue, RingFault> {
        let layout = QueueLayout {
            descriptors: self.layout.descriptors + offset,
            driver: self.layout.driver + offset,
            device: self.layout.device + offset,
            ..self.layout
        };
        let memory = DeviceMemory::behind(self.memory.clone(), endpoint);
        VirtQueue::new(&layout, memory, self.kick.clone(), self.interrupt.clone())
    }

    /// What the transport would activate the device with, with `features` and the common ones acknowledged.
    pub fn context(&self, features: u64) -> DeviceContext {
        let event_idx = if self.layout.event_idx { feature::EVENT_IDX } else { 0 };
        DeviceContext {
            features: features | feature::VERSION_1 | feature::INDIRECT_DESC | event_idx,
            memory: self.memory.clone(),
            interrupt: self.interrupt.clone(),
            sandbox: Arc::new(NoSandbox),
        }
    }

    /// Guest memory for reading and writing buffers.
    pub fn ram(&self) -> impl std::ops::Deref<Target = GuestMemory> {
        self.memory.memory()
    }

    /// Writes raw descriptors from index 0 on, as they are.
    pub fn write_descriptors(&mut self, descriptors: &[Desc]) {
        self.write_table(self.layout.descriptors, descriptors);
    }

    /// Writes raw descriptors as a table at GPA `at`.
    pub fn write_table(&self, at: u64, descriptors: &[Desc]) {
        let ram = self.memory.memory();
        for (i, d) in (0u64..).zip(descriptors) {
            let at = at + 16 * i;
            ram.write_obj(d.addr, GuestAddress(at)).expect("descriptor");
            ram.write_obj(d.len, GuestAddress(at + 8)).expect("descriptor");
            ram.write_obj(d.flags, GuestAddress(at + 12)).expect("descriptor");
            ram.write_obj(d.next, GuestAddress(at + 14)).expect("descriptor");
        }
    }

    /// Chains `buffers` in free descriptors, offers the chain and returns its head. Descriptors are used round and round.
    pub fn add(&mut self, buffers: &[Desc]) -> u16 {
        let size = self.layout.size;
        let head = self.next_descriptor;
        for (i, d) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % size;
            let d = if i + 1 < buffers.len() {
                d.next(self.next_descriptor)
            } else {
                *d
            };
            self.write_table(self.layout.descriptors + 16 * u64::from(index), &[d]);
        }
        self.offer(head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.layout.size);
        let ram = self.memory.memory();
        ram.write_obj(head, GuestAddress(self.layout.driver + 4 + 2 * slot))
            .expect("avail entry");
        self.set_avail_index(self.avail.wrapping_add(1));
    }

    /// Sets the available index.
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail = index;
        let ram = self.memory.memory();
        ram.store(index, GuestAddress(self.layout.driver + 2), Ordering::Release)
            .expect("avail index");
    }

    /// Sets or clears NO_INTERRUPT.
    pub fn set_no_interrupt(&self, on: bool) {
        self.memory
            .memory()
            .write_obj(u16::from(on), GuestAddress(self.layout.driver))
            .expect("flags");
    }

    /// Sets `used_event`: interrupt when the used index passes it.
    pub fn set_used_event(&self, index: u16) {
        let at = self.layout.driver + 4 + 2 * u64::from(self.layout.size);
        self.memory
            .memory()
            .write_obj(index, GuestAddress(at))
            .expect("used_event");
    }

    /// Whether the device wants to be notified of what was offered since the last call (virtio 1.2, 2.7.10 and 2.7.8.1).
    pub fn wants_kick(&mut self) -> bool {
        // Orders the available index before what the device asks for.
        std::sync::atomic::fence(Ordering::SeqCst);
        let ram = self.memory.memory();
        let load = |at| {
            ram.load::<u16>(GuestAddress(at), Ordering::Relaxed)
                .expect("device area")
        };
        let before = std::mem::replace(&mut self.announced, self.avail);
        if !self.layout.event_idx {
            return load(self.layout.device) & 1 == 0;
        }
        let event = load(self.layout.device + 4 + 8 * u64::from(self.layout.size));
        self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(before)
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).expect("kick");
    }

    /// The next completed chain and the bytes written into it.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let ram = self.memory.memory();
        let index: u16 = ram
            .load(GuestAddress(self.layout.device + 2), Ordering::Acquire)
            .expect("used index");
        if index == self.used {
            return None;
        }
        let at = self.layout.device + 4 + 8 * u64::from(self.used % self.layout.size);
        self.used = self.used.wrapping_add(1);
        let head: u32 = ram.read_obj(GuestAddress(at)).expect("used entry");
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).expect("used entry");
        Some((head as u16, len))
    }

    /// Waits up to five seconds for a completed chain.
    pub fn wait_used(&mut self) -> Option<(u16, u32)> {
        for _ in 0..5000 {
            if let Some(used) = self.used() {
                return Some(used);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        None
    }
}
