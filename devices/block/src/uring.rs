//! The io_uring backend (io_uring(7)).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use crate::buffer::{AlignedBuf, Bounce, BouncePool};
use crate::disk::Disk;
use crate::error::QueueError;
use crate::job::{Action, Job};
use crate::metrics::QueueMetrics;
use crate::queue::{Finished, Full, IoQueue, OnCompletion, Op};
use crate::sys::{self, MAX_TRANSFER};

/// How often `kick` waits a millisecond for a kernel that is short of memory before it gives up.
const SUBMIT_RETRIES: usize = 10;

const NEEDED: [(u8, &str); 6] = [
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
];

/// One ring with a job for every operation in flight. The ring has at least as many submission entries as there
/// are jobs and twice as many completion entries, and a job has one entry at most: neither overflows.
pub(crate) struct UringQueue {
    ring: IoUring,
    disk: Arc<Disk>,
    counters: Arc<QueueMetrics>,
    /// Never grows past its first capacity: the kernel holds addresses inside jobs.
    jobs: Vec<Job>,
    idle: Vec<u32>,
    /// Jobs waiting for a bounce buffer, oldest first.
    waiting: VecDeque<u32>,
    bounce: BouncePool,
    finished: Finished,
    /// Jobs whose current action is with the kernel or in the submission queue.
    running: usize,
    depth: usize,
}

impl UringQueue {
    /// Makes a ring for up to `depth` operations and checks that the kernel knows all it is used for.
    pub(crate) fn new(disk: Arc<Disk>, counters: Arc<QueueMetrics>, depth: usize) -> Result<Self, QueueError> {
        let finished = Finished::new(depth).map_err(QueueError::EventFd)?;
        // `depth` is at most MAX_DEPTH, so the next power of two fits.
        let ring = IoUring::new((depth as u32).next_power_of_two()).map_err(QueueError::Refused)?;
        probe(&ring)?;
        ring.submitter()
            .register_eventfd(finished.fd().as_raw_fd())
            .map_err(QueueError::Refused)?;
        Ok(Self {
            ring,
            jobs: Vec::with_capacity(depth),
            idle: Vec::with_capacity(depth),
            waiting: VecDeque::with_capacity(depth),
            bounce: BouncePool::new(disk.bounce_alignment()),
            finished,
            running: 0,
            disk,
            counters,
            depth,
        })
    }

    /// Brings a job as far as it gets without the kernel: into the submission queue, into the
    /// queue for bounce buffers, or to its end.
    fn advance(&mut self, index: u32) {
        loop {
            let job = &mut self.jobs[index as usize];
            let action = job.next();
            match action {
                Action::Done(result) => return self.finish(index, result),
                Action::NeedBounce => match self.bounce.take() {
                    Bounce::Taken(buffer) => job.lend(buffer),
                    Bounce::Busy => return self.waiting.push_back(index),
                    Bounce::NoMemory => job.fail(libc::ENOMEM),
                },
                // No io_uring operation discards on kernels before 6.12, so the worker does it itself. The
                // device model bounds how much one request may discard.
                Action::DiscardDevice { .. } => {
                    // SAFETY: no memory is involved.
                    let result = unsafe { sys::perform(self.disk.fd(), &action) };
                    job.settle(&self.disk, result);
                }
                action => {
                    let entry = entry(self.disk.fd(), &action).user_data(index.into());
                    // SAFETY: the vectors belong to the job, which stays where it is and is not changed until
                    // the entry completes; the memory behind them is valid by the promise of `IoBuf::new`,
                    // or is a bounce buffer the job holds. `Drop` waits for all entries.
                    if unsafe { self.ring.submission().push(&entry) }.is_err() {
                        // Cannot be: see the type's description. Not worth a panic.
                        job.fail(libc::EBUSY);
                        continue;
                    }
                    self.running += 1;
                    return;
                }
            }
        }
    }

    fn finish(&mut self, index: u32, result: Result<u64, i32>) {
        let job = &mut self.jobs[index as usize];
        job.count(&self.counters, result);
        self.finished.push(job.tag(), result);
        let bounce = job.take_back();
        self.idle.push(index);
        if let Some(buffer) = bounce {
            self.pass_on(buffer);
        }
    }

    /// Gives a bounce buffer to the job that has waited longest, or back to the pool.
    fn pass_on(&mut self, buffer: AlignedBuf) {
        self.bounce.give(buffer);
        if let Some(index) = self.waiting.pop_front() {
            self.advance(index);
        }
    }

    /// Takes all entries the kernel has completed.
    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            self.running -= 1;
            let index = entry.user_data() as u32;
            self.jobs[index as usize].settle(&self.disk, entry.result());
            self.advance(index);
        }
    }

    fn enter(&mut self, wait_for: usize) -> io::Result<()> {
        let mut retries = 0;
        loop {
            let pending = !self.ring.submission().is_empty();
            if !pending && wait_for == 0 {
                return Ok(());
            }
            match self.ring.submit_and_wait(wait_for) {
                Ok(_) if wait_for > 0 || self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) && retries < SUBMIT_RETRIES => {
                    retries += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => return Err(e),
            }
        }
    }
}

/// Checks that every operation is supported (io_uring_register(2), IORING_REGISTER_PROBE).
fn probe(ring: &IoUring) -> Result<(), QueueError> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(QueueError::Refused)?;
    match NEEDED.iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => Err(QueueError::MissingOperation(name)),
        None => Ok(()),
    }
}

/// The submission entry for an action.
fn entry(fd: BorrowedFd<'_>, action: &Action) -> squeue::Entry {
    let fd = Fd(fd.as_raw_fd());
    match *action {
        // One buffer needs no vector, which saves the kernel a copy.
        Action::Read(v) if v.count == 1 => {
            // SAFETY: a job's vectors are valid until it is settled.
            let vec = unsafe { *v.vecs };
            let len = vec.iov_len.min(MAX_TRANSFER) as u32;
            opcode::Read::new(fd, vec.iov_base.cast(), len).offset(v.offset).build()
        }
        Action::Read(v) => opcode::Readv::new(fd, v.vecs, v.count).offset(v.offset).build(),
        Action::Write(v, durable) if v.count == 1 => {
            // SAFETY: as above.
            let vec = unsafe { *v.vecs };
            let len = vec.iov_len.min(MAX_TRANSFER) as u32;
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(fd, vec.iov_base.cast(), len)
                .offset(v.offset)
                .rw_flags(flags)
                .build()
        }
        Action::Write(v, durable) => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(fd, v.vecs, v.count)
                .offset(v.offset)
                .rw_flags(flags)
                .build()
        }
        Action::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Action::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build(),
        Action::DiscardDevice { .. } | Action::NeedBounce | Action::Done(_) => opcode::Nop::new().build(),
    }
}

impl IoQueue for UringQueue {
    fn submit(&mut self, op: &Op<'_>, tag: u64) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full);
        }
        let index = match self.idle.pop() {
            Some(index) => index,
            None => {
                self.jobs.push(Job::new());
                (self.jobs.len() - 1) as u32
            }
        };
        self.counters.submitted();
        self.jobs[index as usize].start(&self.disk, op, tag);
        self.advance(index);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        let entered = self.enter(0);
        if self.finished.len() > 0 || entered.is_err() {
            self.finished.signal();
        }
        entered
    }

    fn completions(&mut self, done: &mut OnCompletion<'_>) -> usize {
        self.finished.clear();
        self.reap();
        let mut count = 0;
        while let Some((tag, result)) = self.finished.pop() {
            self.counters.handed_out();
            count += 1;
            done(tag, result);
        }
        // Short transfers and jobs that got a bounce buffer go on.
        if let Err(error) = self.kick() {
            tracing::debug!(%error, "io_uring takes no operations now, trying again");
        }
        count
    }

    fn ready(&mut self) -> bool {
        // The kernel fills the ring without being entered.
        self.finished.len() > 0 || !self.ring.completion().is_empty()
    }

    fn drain(&mut self, done: &mut OnCompletion<'_>) -> io::Result<()> {
        self.completions(done);
        while self.in_flight() > 0 {
            if self.running > 0 {
                self.enter(1)?;
            }
            self.completions(done);
        }
        Ok(())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.finished.fd()
    }

    fn in_flight(&self) -> usize {
        self.running + self.waiting.len() + self.finished.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn backend(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        if let Err(error) = self.drain(&mut |_, _| {}) {
            // The kernel may still use what the jobs hold, so it must not be freed.
            tracing::error!(%error, "an io_uring could not be drained; its buffers are abandoned");
            std::mem::forget(std::mem::take(&mut self.jobs));
        }
    }
}
