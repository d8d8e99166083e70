//! The IOMMU's threads: one serves requests, one tells of faults.

use std::io::{self, Read, Write};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::request::{PROPERTIES, REQUEST_MAX, Request, Status, TAIL};
use super::shared::{Fault, Shared};
use crate::wait::{Waiter, next, raw, stopping};
use crate::{Chain, RingFault, VirtQueue};

/// What a thread owns.
pub(super) struct Job {
    queue: VirtQueue,
    shared: Arc<Shared>,
    features: u64,
}

impl Job {
    pub(super) fn new(queue: VirtQueue, shared: Arc<Shared>, features: u64) -> Self {
        Self {
            queue,
            shared,
            features,
        }
    }

    /// The queue, as far as it was worked off.
    pub(super) fn into_queue(self) -> VirtQueue {
        self.queue
    }

    pub(super) fn requests(&mut self, stop: &EventFd) {
        if let Err(error) = self.work(stop) {
            tracing::error!("the IOMMU cannot wait and stops: {error}");
        }
    }

    fn work(&mut self, stop: &EventFd) -> io::Result<()> {
        let notified = Waiter::new(&raw([self.queue.kick(), stop]))?;
        while let Some(chain) = next(&mut self.queue, &notified, stop) {
            let written = self.serve(&chain);
            self.queue.complete(chain.head(), written);
            self.queue.signal();
        }
        Ok(())
    }

    /// Serves a request and answers it. Returns how many bytes were written.
    fn serve(&mut self, chain: &Chain) -> u32 {
        let memory = self.queue.memory();
        let mut bytes = [0; REQUEST_MAX];
        let request = match bytes.get_mut(..chain.readable_len() as usize) {
            None => Err(Status::Invalid),
            Some(bytes) => match chain.reader(&memory).read_exact(bytes) {
                Ok(()) => Request::parse(bytes),
                Err(_) => Err(Status::Device),
            },
        };
        let room = chain.writable_len() as usize;
        let Some(before) = room.checked_sub(TAIL) else {
            // No room for a status: nothing was done, and nothing was written.
            return 0;
        };
        let wants = match request {
            Ok(Request::Probe { .. }) => PROPERTIES,
            _ => 0,
        };
        let answer = match request {
            Ok(_) if before != wants => Err(Status::Invalid),
            Ok(request) => self.shared.serve(request, self.features),
            Err(status) => Err(status),
        };
        let (status, properties) = match answer {
            Ok(properties) => (Status::Ok, properties),
            Err(status) => (status, None),
        };
        let mut writer = chain.writer(&memory);
        let properties = properties.unwrap_or([0; PROPERTIES]);
        // The status is what a buffer ends with, however long it is.
        let first = match properties.get(..before) {
            Some(properties) => writer.write_all(properties),
            None => writer.take_segments(before as u32).map(drop),
        };
        match first.and_then(|()| writer.write_all(&[status as u8, 0, 0, 0])) {
            Ok(()) => writer.written(),
            // The region went away between the check and the copy.
            Err(_) => 0,
        }
    }

    pub(super) fn events(&mut self, stop: &EventFd) {
        if let Err(error) = self.tell(stop) {
            tracing::error!("the IOMMU cannot wait and tells of no faults: {error}");
        }
    }

    fn tell(&mut self, stop: &EventFd) -> io::Result<()> {
        let (shared, kick) = (self.shared.clone(), self.queue.kick().try_clone()?);
        let waiter = Waiter::new(&raw([&kick, &shared.wake, stop]))?;
        loop {
            if stopping(stop) {
                return Ok(());
            }
            let told = match shared.next_fault() {
                None => false,
                Some(fault) => self.tell_one(fault),
            };
            if !told {
                waiter.wait();
                let _ = kick.read();
                let _ = shared.wake.read();
            }
        }
    }

    /// Tells of a fault, if the driver has given a buffer for it. Whether it had.
    fn tell_one(&mut self, fault: Fault) -> bool {
        let Some(chain) = self.queue.pop() else {
            self.shared.keep_fault(fault);
            return self.queue.arm();
        };
        let bytes = fault.bytes();
        if chain.readable_len() != 0 || (chain.writable_len() as usize) < bytes.len() {
            let wrong = "a buffer for a fault of the IOMMU has no room for 24 bytes";
            self.queue.fault(&RingFault::Request(wrong));
            return false;
        }
        let memory = self.queue.memory();
        let mut writer = chain.writer(&memory);
        let written = writer.write_all(&bytes).map_or(0, |()| writer.written());
        drop(memory);
        self.queue.complete(chain.head(), written);
        self.queue.signal();
        true
    }
}
