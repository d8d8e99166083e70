//! Entropy device (virtio 1.2, 5.4).

mod source;

use std::io::{self, Write};

use triarch_device_core::{ThreadClass, Worker};
use vmm_sys_util::eventfd::EventFd;

pub use source::{EntropySource, SourceError};

use crate::wait::{Waiter, raw, stopping};
use crate::{ActivateError, DeviceContext, DeviceId, RingFault, VirtQueue, VirtioDevice, feature, read_config_bytes};

const QUEUE_SIZES: [u16; 1] = [256];
/// Bytes given to one request at most. The driver has to take fewer than it has room for anyway (5.4.6).
const REQUEST_MAX: usize = 4096;

/// An entropy device: one queue, whose buffers are filled with random bytes by a thread of its own.
pub struct VirtioRng {
    name: String,
    context: Option<DeviceContext>,
    state: State,
}

enum State {
    Stopped(EntropySource),
    Running(Worker<Job>),
    /// The thread died; only a fault of ours does that.
    Lost,
}

/// What the thread owns.
struct Job {
    queue: VirtQueue,
    source: EntropySource,
}

impl VirtioRng {
    /// A device that gives bytes of `source`. Its thread is called `name`.
    pub fn new(name: &str, source: EntropySource) -> Self {
        Self {
            name: name.to_owned(),
            context: None,
            state: State::Stopped(source),
        }
    }
}

impl VirtioDevice for VirtioRng {
    fn id(&self) -> DeviceId {
        DeviceId::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature::COMMON
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the device is active already"));
        }
        self.context = Some(context);
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver("a queue was started before the device"));
        };
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Stopped(source) => {
                let job = Job { queue, source };
                let worker = Worker::spawn(&self.name, ThreadClass::Device, &context.sandbox, job, Job::run);
                self.state = State::Running(worker.map_err(|source| ActivateError::Host {
                    what: "the entropy thread",
                    source,
                })?);
                Ok(())
            }
            State::Running(worker) => {
                self.state = State::Running(worker);
                Err(ActivateError::Driver("the queue runs already"))
            }
            State::Lost => Err(ActivateError::Driver("the entropy thread is gone")),
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        if index != 0 {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(worker) => {
                let job = worker.stop()?;
                self.state = State::Stopped(job.source);
                Some(job.queue)
            }
            other => {
                self.state = other;
                None
            }
        }
    }

    fn reset(&mut self) {
        self.context = None;
    }
}

enum Served {
    /// Every chain.
    All,
    /// The source has nothing now.
    Dry,
    Stop,
}

impl Job {
    fn run(&mut self, stop: &EventFd) {
        if let Err(error) = self.work(stop) {
            tracing::error!("the entropy device cannot wait and stops: {error}");
        }
    }

    fn work(&mut self, stop: &EventFd) -> io::Result<()> {
        let notified = Waiter::new(&raw([self.queue.kick(), stop]))?;
        loop {
            match self.serve(stop) {
                Served::Stop => return Ok(()),
                Served::All if self.queue.arm() => {}
                Served::All => {
                    notified.wait();
                    // A notification that came is answered by looking at the queue.
                    let _ = self.queue.kick().read();
                }
                Served::Dry => Waiter::new(&raw([&self.source, stop]))?.wait(),
            }
        }
    }

    fn serve(&mut self, stop: &EventFd) -> Served {
        let mut bytes = [0; REQUEST_MAX];
        loop {
            if stopping(stop) {
                return Served::Stop;
            }
            let Some(chain) = self.queue.pop() else {
                return Served::All;
            };
            if chain.readable_len() != 0 || chain.writable_len() == 0 {
                self.queue
                    .fault(&RingFault::Request("an entropy request is not one buffer to be filled"));
                return Served::All;
            }
            let room = (chain.writable_len() as usize).min(REQUEST_MAX);
            let filled = match self.source.fill(&mut bytes[..room]) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.unpop();
                    return Served::Dry;
                }
                Err(error) => {
                    // Without the kernel's own entropy there is nothing left to give; the driver sees an empty answer.
                    tracing::error!("no entropy for the guest: {error}");
                    0
                }
            };
            let memory = self.queue.memory();
            let mut writer = chain.writer(&memory);
            let written = match writer.write_all(&bytes[..filled]) {
                Ok(()) => writer.written(),
                // The region went away between the check and the copy.
                Err(_) => 0,
            };
            drop(memory);
            self.queue.complete(chain.head(), written);
            self.queue.signal();
        }
    }
}

#[cfg(test)]
mod tests;
