//! The memory device's thread.

use std::io::{self, Read, Write};
use std::sync::Arc;

use triarch_device_core::RateLimit;
use vmm_sys_util::eventfd::EventFd;

use super::request::{REQUEST, RESPONSE, Request};
use super::shared::Shared;
use crate::wait::{Waiter, next, raw, stopping};
use crate::{Chain, RingFault, VirtQueue};

/// What the thread owns.
pub(super) struct Job {
    queue: VirtQueue,
    shared: Arc<Shared>,
    log: RateLimit,
}

impl Job {
    pub(super) fn new(queue: VirtQueue, shared: Arc<Shared>) -> Self {
        Self {
            queue,
            shared,
            log: RateLimit::default(),
        }
    }

    /// The queue, as far as it was worked off.
    pub(super) fn into_queue(self) -> VirtQueue {
        self.queue
    }

    pub(super) fn run(&mut self, stop: &EventFd) {
        if let Err(error) = self.work(stop) {
            tracing::error!("the memory device cannot wait and stops: {error}");
        }
    }

    fn work(&mut self, stop: &EventFd) -> io::Result<()> {
        let notified = Waiter::new(&raw([self.queue.kick(), stop]))?;
        while let Some(chain) = next(&mut self.queue, &notified, stop) {
            match self.serve(&chain, stop) {
                Ok(false) => {}
                Ok(true) => return Ok(()),
                Err(fault) => self.queue.fault(&fault),
            }
        }
        Ok(())
    }

    /// Serves a request. `true`: the thread was asked to stop, and whoever starts the queue finds the request again.
    fn serve(&mut self, chain: &Chain, stop: &EventFd) -> Result<bool, RingFault> {
        if (chain.readable_len() as usize) < REQUEST || (chain.writable_len() as usize) < RESPONSE {
            return Err(RingFault::Request(
                "a request of the memory device is not 24 bytes with room for an answer of 10",
            ));
        }
        let mut bytes = [0; REQUEST];
        chain
            .reader(&self.queue.memory())
            .read_exact(&mut bytes)
            .map_err(|_| RingFault::Inaccessible)?;
        let mut stopped = false;
        let mut asked = || {
            stopped |= stopping(stop);
            stopped
        };
        let (answer, trouble) = self.shared.serve(Request::parse(&bytes), &mut asked);
        if let Some(trouble) = trouble
            && let Some(held_back) = self.log.admit()
        {
            tracing::warn!(held_back, "cannot {}: {}", trouble.what, trouble.error);
        }
        if stopped {
            self.queue.unpop();
            return Ok(true);
        }
        let memory = self.queue.memory();
        let written = chain.writer(&memory).write_all(&answer.bytes());
        drop(memory);
        // The driver may have put the answer where it unplugged.
        let written = written.map_or(0, |()| RESPONSE as u32);
        self.queue.complete(chain.head(), written);
        self.queue.signal();
        Ok(false)
    }
}
