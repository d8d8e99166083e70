//! The backend without io_uring: operations run on the submitting thread, one after another.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::buffer::{Bounce, BouncePool};
use crate::disk::Disk;
use crate::error::QueueError;
use crate::job::{Action, Job};
use crate::metrics::QueueMetrics;
use crate::queue::{Finished, Full, IoQueue, OnCompletion, Op};
use crate::sys;

/// Runs each operation inside `submit`. The submitting thread is a worker of its own for every queue, so the guest's
/// vCPUs and the other queues go on meanwhile.
#[derive(Debug)]
pub(crate) struct SyncQueue {
    disk: Arc<Disk>,
    counters: Arc<QueueMetrics>,
    job: Job,
    bounce: BouncePool,
    finished: Finished,
    depth: usize,
}

impl SyncQueue {
    pub(crate) fn new(disk: Arc<Disk>, counters: Arc<QueueMetrics>, depth: usize) -> Result<Self, QueueError> {
        Ok(Self {
            bounce: BouncePool::new(disk.bounce_alignment()),
            job: Job::new(),
            finished: Finished::new(depth).map_err(QueueError::EventFd)?,
            disk,
            counters,
            depth,
        })
    }

    fn run(&mut self) -> Result<u64, i32> {
        loop {
            match self.job.next() {
                Action::Done(result) => return result,
                Action::NeedBounce => match self.bounce.take() {
                    Bounce::Taken(buffer) => self.job.lend(buffer),
                    // Busy cannot be: the only job there is asks.
                    Bounce::Busy | Bounce::NoMemory => self.job.fail(libc::ENOMEM),
                },
                action => {
                    // SAFETY: the vectors belong to the job, and the memory behind them is valid by the
                    // promise of `IoBuf::new`.
                    let result = unsafe { sys::perform(self.disk.fd(), &action) };
                    self.job.settle(&self.disk, result);
                }
            }
        }
    }
}

impl IoQueue for SyncQueue {
    fn submit(&mut self, op: &Op<'_>, tag: u64) -> Result<(), Full> {
        if self.finished.len() >= self.depth {
            return Err(Full);
        }
        self.counters.submitted();
        self.job.start(&self.disk, op, tag);
        let result = self.run();
        if let Some(buffer) = self.job.take_back() {
            self.bounce.give(buffer);
        }
        self.job.count(&self.counters, result);
        self.finished.push(tag, result);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.finished.len() > 0 {
            self.finished.signal();
        }
        Ok(())
    }

    fn completions(&mut self, done: &mut OnCompletion<'_>) -> usize {
        self.finished.clear();
        let mut count = 0;
        while let Some((tag, result)) = self.finished.pop() {
            self.counters.handed_out();
            count += 1;
            done(tag, result);
        }
        count
    }

    fn ready(&mut self) -> bool {
        self.finished.len() > 0
    }

    fn drain(&mut self, done: &mut OnCompletion<'_>) -> io::Result<()> {
        self.completions(done);
        Ok(())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.finished.fd()
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn backend(&self) -> &'static str {
        "sync"
    }
}

impl Drop for SyncQueue {
    fn drop(&mut self) {
        self.completions(&mut |_, _| {});
    }
}
