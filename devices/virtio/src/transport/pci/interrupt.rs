//! The device's way to the driver: interrupts and the registers that go with them. No locks: any worker thread raises them.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use triarch_pci::MsiX;
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceEvent, Observer, status};
use crate::VirtioInterrupt;

/// VIRTIO_MSI_NO_VECTOR (virtio 1.2, 4.1.4.3).
pub(super) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What queues and the device raise interrupts with.
pub(super) struct Interrupts {
    pub(super) msix: MsiX,
    status: AtomicU8,
    isr: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    observer: OnceLock<Observer>,
}

impl Interrupts {
    /// Nothing routed, status zero.
    pub(super) fn new(msix: MsiX, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            observer: OnceLock::new(),
        }
    }

    /// Tells `observer` of what happens from now on. Once.
    pub(super) fn observe(&self, observer: Observer) {
        let _ = self.observer.set(observer);
    }

    /// Tells the observer, if there is one.
    pub(super) fn tell(&self, event: DeviceEvent) {
        if let Some(observer) = self.observer.get() {
            observer(event);
        }
    }

    /// The device_status register.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Adds status bits.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    /// The config_generation register.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// The ISR register, without the side effect of reading it.
    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Relaxed)
    }

    /// Reads the ISR register, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The vector of configuration changes.
    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// Routes configuration changes; a vector that does not exist becomes [`NO_VECTOR`].
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Relaxed);
    }

    /// The vector of queue `index`.
    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |v| v.load(Ordering::Relaxed))
    }

    /// Routes queue `index`; a vector that does not exist becomes [`NO_VECTOR`].
    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(self.existing(vector), Ordering::Relaxed);
        }
    }

    /// Back to what a driver finds first. Nothing of the device may run any more. Configuration generation goes on.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.isr.store(0, Ordering::Relaxed);
        self.status.store(0, Ordering::Release);
    }

    /// Takes over saved registers.
    pub(super) fn restore(&self, status: u8, isr: u8, generation: u8) {
        self.isr.store(isr, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        self.status.store(status, Ordering::Release);
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    /// There is no interrupt pin: without MSI-X a driver can only poll the ISR register.
    fn raise(&self, vector: u16) -> io::Result<()> {
        if vector == NO_VECTOR || !self.msix.enabled() {
            return Ok(());
        }
        self.msix.trigger(vector)
    }
}

impl VirtioInterrupt for Interrupts {
    fn queue(&self, index: u16) -> io::Result<()> {
        if !self.msix.enabled() {
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
        self.raise(self.queue_vector(index))
    }

    fn config(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.raise(self.config_vector())
    }

    fn needs_reset(&self) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        if before & status::NEEDS_RESET == 0 {
            self.tell(DeviceEvent::Broken);
        }
        if before & status::DRIVER_OK == 0 || before & status::NEEDS_RESET != 0 {
            return;
        }
        if let Err(error) = self.config() {
            // At most once until the driver resets the device.
            tracing::warn!("cannot tell the guest that a device needs a reset: {error}");
        }
    }

    fn queue_event(&self, index: u16) -> Option<EventFd> {
        match self.queue_vector(index) {
            _ if !self.msix.enabled() => None,
            NO_VECTOR => None,
            vector => self.msix.event_fd(vector).ok(),
        }
    }
}
