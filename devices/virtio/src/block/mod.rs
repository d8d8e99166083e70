//! The block device (virtio 1.2, 5.2) on the disk engine.

mod config;
mod polling;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_block::{Disk, DiskCounters, GrowError, MAX_DEPTH};
use triarch_device_core::{ThreadClass, Worker};
use vmm_sys_util::eventfd::EventFd;

pub use config::feature as block_feature;
pub use polling::LookCounters;

use config::feature;
use polling::Looks;
use worker::{Cache, Common, QueueWorker};

use crate::config_listener::ConfigListener;
use crate::{
    ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, VirtioInterrupt, feature as common_feature,
    read_config_bytes,
};

/// Most queues a block device may have.
pub const MAX_BLOCK_QUEUES: u16 = 256;

/// Why a block device could not be made or restored.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The number of queues is out of range.
    #[error("{0} queues are not possible for a disk, 1 to {MAX_BLOCK_QUEUES} are")]
    Queues(u16),
    /// The queue size is unusable.
    #[error("a disk's queue size must be a power of two from 4 to {MAX_DEPTH}, not {0}")]
    QueueSize(u16),
    /// The saved guest knows another disk than the one opened.
    #[error("the saved disk has {saved} bytes, the one opened has {opened}: it is not the same disk")]
    Capacity {
        /// Size the guest saw, in bytes.
        saved: u64,
        /// Size of the disk opened, in bytes.
        opened: u64,
    },
}

/// Why a disk of a guest could not be made larger.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// The disk itself.
    #[error(transparent)]
    Disk(#[from] GrowError),
    /// It has its new size, and the guest does not know.
    #[error("the disk has its new size, but the guest could not be told")]
    Guest(#[source] io::Error),
}

/// What of a block device goes into a snapshot, beside what the transport saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// Size of the disk as the guest knows it, in bytes.
    pub size: u64,
    /// Whether the driver may leave writes in the cache until it flushes.
    pub writeback: bool,
}

/// Shared by a device and its handles.
struct Shared {
    disk: Arc<Disk>,
    driver: ConfigListener,
    looks: Arc<Looks>,
}

/// Reaches the disk behind a device that the transport owns.
#[derive(Clone)]
pub struct BlockHandle(Arc<Shared>);

impl BlockHandle {
    /// Looks at the disk's size again and tells the guest when it changed. Returns the new size in bytes in that case.
    ///
    /// # Errors
    /// The size cannot be read, or the guest cannot be interrupted.
    pub fn refresh_size(&self) -> io::Result<Option<u64>> {
        let changed = self.0.disk.refresh_size()?;
        if changed.is_some() {
            self.0.driver.config_changed()?;
        }
        Ok(changed)
    }

    /// Makes the disk `size` bytes long and tells the guest. Repeating it is free.
    ///
    /// # Errors
    /// See [`ResizeError`].
    pub fn resize(&self, size: u64) -> Result<(), ResizeError> {
        self.0.disk.grow(size)?;
        self.refresh_size().map_err(ResizeError::Guest)?;
        Ok(())
    }

    /// What the disk did so far.
    pub fn counters(&self) -> DiskCounters {
        self.0.disk.counters().read()
    }

    /// What came of looking for work before sleeping ([`Block::set_look`]).
    pub fn looks(&self) -> LookCounters {
        self.0.looks.read()
    }

    /// The disk itself.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.0.disk
    }
}

/// A virtio block device. Each queue has a thread of its own, called `{id}_q{index}`.
pub struct Block {
    id: Arc<str>,
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    features: u64,
    cache: Arc<Cache>,
    look: Duration,
    context: Option<DeviceContext>,
    workers: Vec<Option<Running>>,
}

/// A queue being served.
struct Running {
    worker: Worker<QueueWorker>,
    /// Wakes the worker as a notification of the driver does.
    kick: EventFd,
}

impl Block {
    /// A device called `id` (`_disk0`) with `queues` queues of at most `queue_size` descriptors.
    ///
    /// # Errors
    /// A number is out of range.
    pub fn new(id: &str, disk: Arc<Disk>, queues: u16, queue_size: u16) -> Result<Self, BlockError> {
        if !(1..=MAX_BLOCK_QUEUES).contains(&queues) {
            return Err(BlockError::Queues(queues));
        }
        if !queue_size.is_power_of_two() || !(4..=MAX_DEPTH).contains(&usize::from(queue_size)) {
            return Err(BlockError::QueueSize(queue_size));
        }
        Ok(Self {
            id: id.into(),
            features: common_feature::COMMON | config::features(&disk, queues.into()),
            shared: Arc::new(Shared {
                disk,
                driver: ConfigListener::default(),
                looks: Arc::default(),
            }),
            queue_sizes: vec![queue_size; queues.into()],
            cache: Arc::new(Cache {
                writeback: AtomicBool::new(true),
                flush: AtomicBool::new(false),
            }),
            look: Duration::ZERO,
            context: None,
            workers: (0..queues).map(|_| None).collect(),
        })
    }

    /// Lets the threads of queues that start from now on look for work for `longest` at most before they sleep: requests that follow
    /// each other are seen sooner, for a processor's time while they come. How long it is adapts to them; when none come, or with zero,
    /// which it is in the beginning, nobody looks.
    pub fn set_look(&mut self, longest: Duration) {
        self.look = longest;
    }

    /// A handle that outlives the device's move into its transport.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle(Arc::clone(&self.shared))
    }

    /// What to save. Call it when no queue runs.
    pub fn state(&self) -> BlockStateV1 {
        BlockStateV1 {
            size: self.shared.disk.size(),
            writeback: self.cache.writeback.load(Relaxed),
        }
    }

    /// Takes over a saved state, after `activate` and before queues start.
    ///
    /// # Errors
    /// The disk is smaller than the guest knows it. A larger one was resized meanwhile; tell the guest by
    /// [`BlockHandle::refresh_size`] and a configuration interrupt.
    pub fn restore(&mut self, state: &BlockStateV1) -> Result<(), BlockError> {
        let opened = self.shared.disk.size();
        if opened < state.size {
            return Err(BlockError::Capacity {
                saved: state.size,
                opened,
            });
        }
        self.cache.writeback.store(state.writeback, Relaxed);
        Ok(())
    }

    /// Tells `listener` of another size, until the driver is there to be told or the device is reset.
    pub fn set_listener(&mut self, listener: Option<Arc<dyn VirtioInterrupt>>) {
        self.shared.driver.set(listener);
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let writeback = self.cache.writeback.load(Relaxed);
        let space = config::space(&self.shared.disk, &self.queue_sizes, writeback);
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let negotiated = self.context.as_ref().map_or(0, |c| c.features);
        if offset != config::WRITEBACK || negotiated & feature::CONFIG_WCE == 0 {
            return;
        }
        if let [value] = data {
            let on = value & 1 != 0;
            if self.cache.writeback.swap(on, Relaxed) && !on {
                // The driver will not flush any more what it wrote before. A worker does, as this thread must not wait;
                // if none runs, the next one to start does.
                self.cache.flush.store(true, Relaxed);
                if let Some(running) = self.workers.iter().flatten().next() {
                    // Fails only when it is readable already.
                    let _ = running.kick.write(1);
                }
            }
        }
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the disk is active already"));
        }
        // Without a way to flush or to choose, every write has to be durable (virtio 1.2, 5.2.6.2).
        let cached = context.features & (feature::FLUSH | feature::CONFIG_WCE) != 0;
        self.cache.writeback.store(cached, Relaxed);
        self.shared.driver.set(Some(Arc::clone(&context.interrupt)));
        self.context = Some(context);
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver("a queue of a disk that is not active"));
        };
        let index = queue.index();
        let slot = match self.workers.get_mut(usize::from(index)) {
            Some(slot) if slot.is_none() => slot,
            _ => {
                return Err(ActivateError::Driver(
                    "a queue the disk does not have, or that runs already",
                ));
            }
        };
        let host = |what| move |source| ActivateError::Host { what, source };
        let depth = usize::from(queue.size());
        let io = self.shared.disk.queue(index, depth).map_err(io::Error::other);
        let common = Common {
            disk: Arc::clone(&self.shared.disk),
            id: Arc::clone(&self.id),
            features: context.features,
            cache: Arc::clone(&self.cache),
            look: self.look,
            looks: Arc::clone(&self.shared.looks),
        };
        let kick = queue.kick().try_clone().map_err(host("a disk's notification"))?;
        let state = io
            .and_then(|io| QueueWorker::new(queue, io, &common))
            .map_err(host("a disk's I/O queue"))?;
        let name = format!("{}_q{index}", self.id);
        let worker = Worker::spawn(&name, ThreadClass::Disk, &context.sandbox, state, QueueWorker::run);
        let worker = worker.map_err(host("a disk's worker thread"))?;
        *slot = Some(Running { worker, kick });
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let running = self.workers.get_mut(usize::from(index))?.take()?;
        Some(running.worker.stop()?.into_queue())
    }

    fn reset(&mut self) {
        self.shared.driver.set(None);
        self.context = None;
        self.cache.writeback.store(true, Relaxed);
        self.cache.flush.store(false, Relaxed);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        for running in self.workers.iter_mut().filter_map(Option::take) {
            running.worker.stop();
        }
    }
}
