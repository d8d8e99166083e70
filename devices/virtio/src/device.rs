//! What a virtio device is to its transport.

use std::any::Any;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use triarch_device_core::Sandbox;
use triarch_memory::GuestMemoryHandle;
use vmm_sys_util::eventfd::EventFd;

use crate::VirtQueue;

/// Feature bits that belong to no device type (virtio 1.2, 6).
pub mod feature {
    /// Descriptors may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say at which index they want to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// DMA goes through the platform's IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Packed ring layout.
    pub const RING_PACKED: u64 = 1 << 34;
    /// A single queue can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// Device types (virtio 1.2, 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceId {
    /// Network card.
    Net,
    /// Block device.
    Block,
    /// Console.
    Console,
    /// Entropy source.
    Rng,
    /// Memory balloon.
    Balloon,
    /// Socket device.
    Vsock,
    /// IOMMU.
    Iommu,
    /// Memory device.
    Mem,
    /// File system device.
    Fs,
    /// Any other, by its number.
    Other(u16),
}

impl DeviceId {
    /// The type with this number.
    pub const fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Net,
            2 => Self::Block,
            3 => Self::Console,
            4 => Self::Rng,
            5 => Self::Balloon,
            19 => Self::Vsock,
            23 => Self::Iommu,
            24 => Self::Mem,
            26 => Self::Fs,
            other => Self::Other(other),
        }
    }

    /// The type's number.
    pub const fn number(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Iommu => 23,
            Self::Mem => 24,
            Self::Fs => 26,
            Self::Other(number) => number,
        }
    }
}

/// How a device tells the driver something. The transport implements it.
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue(&self, index: u16) -> io::Result<()>;
    /// The configuration space changed.
    fn config(&self) -> io::Result<()>;
    /// The device is broken until reset: sets DEVICE_NEEDS_RESET and raises a configuration interrupt.
    fn needs_reset(&self);
    /// The descriptor behind [`queue`](Self::queue), when that is an event of its own: while MSI-X is enabled and the queue has a vector.
    /// Masks of the vector hold what it raises. [`VirtioDevice::interrupts_changed`] tells when it may be another one.
    fn queue_event(&self, index: u16) -> Option<EventFd>;
}

/// What a device gets when the driver is ready.
#[derive(Clone)]
pub struct DeviceContext {
    /// Features both sides agreed on.
    pub features: u64,
    /// Guest memory.
    pub memory: GuestMemoryHandle,
    /// Interrupts to the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
    /// Confines the threads the device starts.
    pub sandbox: Arc<dyn Sandbox>,
}

/// Why a device could not start. It is then marked as needing a reset; the guest and its other devices go on.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// A thread, descriptor or ring of the host could not be made.
    #[error("cannot set up {what}")]
    Host {
        /// What was being set up.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The driver's settings contradict each other.
    #[error("the driver's configuration is invalid: {0}")]
    Driver(&'static str),
}

/// A virtio device, independent of its transport.
///
/// ```text
///            activate(ctx)            start_queue(i, q)
///  [idle] ----------------> [active] <----------------> [active, queue i running]
///    ^                          |      stop_queue(i)
///    |          reset()         |
///    +--------------------------+
/// ```
///
/// * The transport negotiates features, then calls `activate` once and `start_queue` for each queue the driver enabled.
/// * `stop_queue` returns when nothing is in flight any more, with the queue as far as it was worked off: the transport keeps it
///   to start it again (resume), to save it (snapshot), or drops it (reset). Stopping a queue that does not run gives `None`.
/// * `reset` comes after every queue was stopped, from any state, and leads back to idle.
/// * `activate` while active and `start_queue` while idle are errors of the transport ([`ActivateError::Driver`]).
///
/// All calls come from one thread at a time. Configuration space may be read in any state. What a device is beside this its owner finds
/// out as of [`Any`]: what it saves, for instance.
pub trait VirtioDevice: Send + Any {
    /// Which kind of device it is.
    fn id(&self) -> DeviceId;
    /// The largest size of each queue, a power of two; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The features offered, [`feature::COMMON`] among them.
    fn features(&self) -> u64;
    /// Reads the device's configuration space from `offset` bytes; what lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes it; writes to read-only fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver is ready (DRIVER_OK).
    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError>;
    /// Starts working on a queue.
    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError>;
    /// Finishes what is in flight and hands the queue back.
    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue>;
    /// The driver gave queues other interrupts while the device is active. Only who passed
    /// [`queue_event`](VirtioInterrupt::queue_event) on needs to know.
    fn interrupts_changed(&mut self) {}
    /// Forgets the driver.
    fn reset(&mut self);
}

/// Serves a read of a configuration space that is laid out as `config`: bytes past its end are zero.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let have = config.get(from..).unwrap_or_default();
    let n = have.len().min(data.len());
    data[..n].copy_from_slice(&have[..n]);
    data[n..].fill(0);
}
