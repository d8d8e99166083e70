//! Memory device (virtio 1.2, 5.15): memory that the guest plugs and unplugs block by block until it has as much as the host wants.
//!
//! The host sets a size; the driver asks for each block before it uses it, and gives blocks back. What it gives back is the host's at
//! once. The guest can reach the region in parts of several blocks: a part is there while a block of it is plugged.

mod blocks;
mod region;
mod request;
mod shared;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;
use triarch_device_core::{ThreadClass, Worker};

pub use region::PlugError;
pub use shared::{BlockRunV1, MemCounters, MemHandle, MemStatus, VirtioMemStateV1};

use region::Region;
use shared::Shared;
use worker::Job;

use crate::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, feature, read_config_bytes};

/// The smallest block: what Linux gives back in one piece, and a huge page.
pub const MIN_BLOCK: u64 = 2 << 20;

/// Feature bits (virtio 1.2, 5.15.3).
mod bit {
    /// The number of the node in the configuration space counts.
    pub(super) const ACPI_PXM: u64 = 1 << 0;
    /// The driver does not even read what is not plugged.
    pub(super) const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
}

const QUEUE_SIZES: [u16; 1] = [64];

/// What a memory device is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemOptions {
    /// GPA of the region, a multiple of `block`.
    pub addr: u64,
    /// Bytes of the region, a multiple of `block`.
    pub size: u64,
    /// Bytes of a block: a power of two, at least [`MIN_BLOCK`].
    pub block: u64,
    /// Bytes of a part, a multiple of `block`. Parts are counted from the begin of the region; the last one may be shorter.
    pub part: u64,
    /// The guest's NUMA node of the region, if it has nodes.
    pub node: Option<u16>,
    /// Bytes the host wants plugged from the start, a multiple of `block`.
    pub requested: u64,
}

/// Why there can be no such memory device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MemError {
    /// Not whole blocks.
    #[error(
        "the region of {size:#x} bytes at {addr:#x} is not whole blocks of {block:#x} bytes in parts of {part:#x} bytes"
    )]
    Geometry {
        /// GPA of the region.
        addr: u64,
        /// Its bytes.
        size: u64,
        /// Bytes of a block.
        block: u64,
        /// Bytes of a part.
        part: u64,
    },
    /// A size it cannot have.
    #[error("{bytes} bytes is no size for it: it takes multiples of {block} bytes up to {size}")]
    Size {
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes of a block.
        block: u64,
        /// Bytes of the region.
        size: u64,
    },
}

/// The host's side of the region: what makes blocks memory. Ranges are GPAs, in whole blocks.
pub trait MemoryHost: Send {
    /// Lets the guest and its devices reach `part`, a whole part.
    fn open(&mut self, part: Range<u64>) -> io::Result<()>;
    /// Takes that away again. Devices may still finish what they began there.
    fn close(&mut self, part: Range<u64>) -> io::Result<()>;
    /// Blocks of an open part are about to be used: takes what could run short later.
    fn fill(&mut self, blocks: Range<u64>) -> io::Result<()>;
    /// Gives the memory of blocks back to the host, whether their part is open or not.
    fn discard(&mut self, blocks: Range<u64>) -> io::Result<()>;
}

/// Told when the guest has plugged or unplugged blocks. Once it was, it is not told again before somebody asked for the
/// [`status`](MemHandle::status). It must return at once.
pub type MemObserver = Box<dyn Fn() + Send + Sync>;

/// A memory device.
pub struct Mem {
    name: String,
    shared: Arc<Shared>,
    context: Option<DeviceContext>,
    place: Place,
}

/// Where the queue is.
enum Place {
    Idle,
    Running(Worker<Job>),
}

impl Mem {
    /// A device without a plugged block, whose blocks come from `host`. Its thread is called `name`.
    pub fn new(
        name: &str,
        options: MemOptions,
        host: Box<dyn MemoryHost>,
        observer: MemObserver,
    ) -> Result<Self, MemError> {
        let region = Region::new(options, host)?;
        region.check_size(options.requested)?;
        Ok(Self {
            name: name.to_owned(),
            shared: Arc::new(Shared::new(region, options, observer)),
            context: None,
            place: Place::Idle,
        })
    }

    /// A way to the device for when its transport has it.
    pub fn handle(&self) -> MemHandle {
        MemHandle(self.shared.clone())
    }

    /// Plugs what was plugged when `state` was saved; what is in there is for whoever restores the guest's memory.
    pub fn restore(&mut self, state: &VirtioMemStateV1) -> Result<(), PlugError> {
        self.shared.restore(state)
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> DeviceId {
        DeviceId::Mem
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let node = self.shared.options.node.map_or(0, |_| bit::ACPI_PXM);
        feature::COMMON | bit::UNPLUGGED_INACCESSIBLE | node
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the memory device is active already"));
        }
        self.shared.driver.set(Some(context.interrupt.clone()));
        self.context = Some(context);
        self.shared.observed.changed();
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver(
                "a queue starts before the memory device is active",
            ));
        };
        if let Place::Running(_) = self.place {
            return Err(ActivateError::Driver("the queue runs already"));
        }
        let job = Job::new(queue, self.shared.clone());
        let worker = Worker::spawn(&self.name, ThreadClass::Memory, &context.sandbox, job, Job::run);
        let worker = worker.map_err(|source| ActivateError::Host {
            what: "the thread of the memory device",
            source,
        })?;
        self.place = Place::Running(worker);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        if index != 0 {
            return None;
        }
        match std::mem::replace(&mut self.place, Place::Idle) {
            Place::Running(worker) => worker.stop().map(Job::into_queue),
            Place::Idle => None,
        }
    }

    /// Blocks stay plugged: the next driver can ask for their states, or give all of them back (virtio 1.2, 5.15.5.2).
    fn reset(&mut self) {
        self.stop_queue(0);
        self.context = None;
        self.shared.driver.set(None);
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        self.reset();
    }
}
