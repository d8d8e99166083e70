//! Memory balloon (virtio 1.2, 5.5): pages that the guest lends to the host.
//!
//! The host sets a target; the driver puts pages into the balloon or takes them out until it is reached, and writes into the
//! configuration space how many there are. Pages in the balloon, and free pages that the driver reports, are given back to the host.

mod pages;
mod shared;
mod statistics;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use triarch_device_core::{ThreadClass, Worker};
use triarch_memory::Discarder;

pub use shared::{BalloonCounters, BalloonHandle, BalloonStateV1, BalloonStatus};
pub use statistics::BalloonStatistics;

use pages::HugePages;
use shared::Shared;
use worker::Job;

use crate::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, feature, read_config_bytes};

/// Pages of a balloon have this size, whatever the guest's or the host's have (virtio 1.2, 5.5.6).
pub const BALLOON_PAGE: u64 = 4096;

/// Feature bits (virtio 1.2, 5.5.3).
mod bit {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_POISON: u64 = 1 << 4;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// Offsets of what the driver writes in the configuration space, whose fields have 32 bits: target, actual, a command that is not used
/// here, and the poison.
const ACTUAL: u64 = 4;
const POISON: u64 = 12;
const CONFIG: usize = 16;

const QUEUE_SIZE: u16 = 128;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

impl Role {
    /// The queue that reports free pages has the number 4 by the specification; but drivers, Linux among them, leave no gap for queues
    /// that were not negotiated, and then it has the next one.
    fn of(index: u16, features: u64) -> Option<Self> {
        let optional = [
            (bit::STATS_VQ, Self::Statistics),
            (bit::PAGE_REPORTING, Self::Reporting),
        ];
        let negotiated = optional.into_iter().filter(|(bit, _)| features & bit != 0);
        let mut roles = [Self::Inflate, Self::Deflate]
            .into_iter()
            .chain(negotiated.map(|(_, role)| role));
        match roles.nth(index.into()) {
            None if index == 4 && features & bit::PAGE_REPORTING != 0 => Some(Self::Reporting),
            role => role,
        }
    }
}

/// What a balloon is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Bytes the host wants from the start.
    pub size: u64,
    /// The driver may take pages out when the guest runs short of memory.
    pub deflate_on_oom: bool,
    /// The driver may report pages that are free.
    pub free_page_reporting: bool,
}

/// Told when the driver has changed the size of the balloon. Once it was, it is not told again before somebody asked for the
/// [`status`](BalloonHandle::status). It must return at once.
pub type BalloonObserver = Box<dyn Fn() + Send + Sync>;

/// A balloon.
pub struct Balloon {
    name: String,
    features: u64,
    /// As many as a driver may number.
    queues: Vec<u16>,
    shared: Arc<Shared>,
    context: Option<DeviceContext>,
    place: Place,
}

/// What the thread owns, wherever it is.
enum Place {
    Idle(Box<Job>),
    Running(Worker<Box<Job>>),
    /// Its thread died, or could not be started.
    Lost,
}

impl Balloon {
    /// A balloon of a guest whose pages `discarder` gives back. Its thread is called `name`.
    pub fn new(
        name: &str,
        options: BalloonOptions,
        discarder: Discarder,
        observer: BalloonObserver,
    ) -> io::Result<Self> {
        let optional = [
            (options.deflate_on_oom, bit::DEFLATE_ON_OOM),
            (options.free_page_reporting, bit::PAGE_REPORTING | bit::PAGE_POISON),
        ];
        let optional = optional
            .into_iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, bits)| all | bits);
        let shared = Arc::new(Shared::new(pages_of(options.size), observer)?);
        let job = Job {
            huge: HugePages::new(discarder.page_size()),
            discarder,
            shared: shared.clone(),
            queues: Vec::new(),
            statistics: None,
            log: Default::default(),
        };
        Ok(Self {
            name: name.to_owned(),
            features: feature::COMMON | bit::STATS_VQ | optional,
            queues: vec![QUEUE_SIZE; if options.free_page_reporting { 5 } else { 3 }],
            shared,
            context: None,
            place: Place::Idle(Box::new(job)),
        })
    }

    /// A way to the device for when its transport has it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(self.shared.clone())
    }

    /// Continues where `state` was saved. Pages that were in the balloon stay there; only with huge pages, the rest of a page that is
    /// partly in the balloon is not given back any more when it follows.
    pub fn restore(&mut self, state: &BalloonStateV1) {
        self.shared.target.store(state.target_pages, SeqCst);
        self.shared.actual.store(state.actual_pages, SeqCst);
        self.shared.poison.store(state.poison, SeqCst);
    }

    /// Stops the thread, if one runs, and gives access to what it owns.
    fn halt(&mut self) -> Option<&mut Job> {
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Running(worker) => worker.stop().map_or(Place::Lost, Place::Idle),
            other => other,
        };
        match &mut self.place {
            Place::Idle(job) => Some(job),
            _ => None,
        }
    }

    /// Starts the thread if there is a queue to work on.
    fn go_on(&mut self) -> io::Result<()> {
        let Some(context) = &self.context else { return Ok(()) };
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Idle(job) if !job.queues.is_empty() => {
                let worker = Worker::spawn(&self.name, ThreadClass::Memory, &context.sandbox, job, |job, stop| {
                    job.run(stop);
                });
                Place::Running(worker?)
            }
            other => other,
        };
        Ok(())
    }
}

/// Whole pages of a balloon in `bytes`.
fn pages_of(bytes: u64) -> u32 {
    u32::try_from(bytes / BALLOON_PAGE).unwrap_or(u32::MAX)
}

impl VirtioDevice for Balloon {
    fn id(&self) -> DeviceId {
        DeviceId::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queues
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let end = offset.saturating_add(data.len() as u64);
        if offset >= CONFIG as u64 || end > CONFIG as u64 {
            return;
        }
        let mut config = self.shared.config();
        config[offset as usize..end as usize].copy_from_slice(data);
        let field = |at: u64| {
            let at = at as usize;
            u32::from_le_bytes([config[at], config[at + 1], config[at + 2], config[at + 3]])
        };
        self.shared.poison.store(field(POISON), Relaxed);
        if self.shared.actual.swap(field(ACTUAL), SeqCst) != field(ACTUAL) {
            self.shared.observed.changed();
        }
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the balloon is active already"));
        }
        self.shared.driver.set(Some(context.interrupt.clone()));
        self.context = Some(context);
        self.shared.observed.changed();
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver("a queue starts before the balloon is active"));
        };
        let Some(role) = Role::of(queue.index(), context.features) else {
            return Err(ActivateError::Driver(
                "it starts a queue of a feature that was not negotiated",
            ));
        };
        let no_thread = |source| ActivateError::Host {
            what: "the thread of the balloon",
            source,
        };
        let job = self
            .halt()
            .ok_or_else(|| no_thread(io::Error::other("it died earlier")))?;
        let started = job.queues.iter().all(|(_, other)| other.index() != queue.index());
        if started {
            job.queues.push((role, queue));
        }
        self.go_on().map_err(no_thread)?;
        match started {
            true => Ok(()),
            false => Err(ActivateError::Driver("the queue runs already")),
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let job = self.halt()?;
        let queue = job.take_queue(index);
        if let (Err(error), Some(context)) = (self.go_on(), &self.context) {
            tracing::error!("cannot go on with the other queues of the balloon: {error}");
            context.interrupt.needs_reset();
        }
        queue
    }

    fn reset(&mut self) {
        self.context = None;
        self.shared.forget_driver();
        if let Some(job) = self.halt() {
            job.forget_driver();
        }
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset();
    }
}
