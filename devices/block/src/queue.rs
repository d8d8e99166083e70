//! The interface of a disk's I/O queues.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use crate::{IoBuf, sys};

/// One operation on a disk. Positions and lengths are bytes and must be multiples of the
/// disk's logical block size; what does not fit or lies outside the disk completes with `EINVAL`.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// Fill the buffers from the disk.
    Read {
        /// Position on the disk.
        offset: u64,
        /// Where to put the data, in order.
        bufs: &'a [IoBuf],
    },
    /// Write the buffers to the disk.
    Write {
        /// Position on the disk.
        offset: u64,
        /// The data, in order.
        bufs: &'a [IoBuf],
        /// Complete only when the data is on stable storage (write-through).
        durable: bool,
    },
    /// Bring all writes that completed before this was submitted to stable storage.
    Flush,
    /// Say that a range's content is not needed any more. It may read as anything afterwards.
    Discard {
        /// Position on the disk.
        offset: u64,
        /// Length of the range.
        len: u64,
        /// Complete only when the change is on stable storage.
        durable: bool,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Position on the disk.
        offset: u64,
        /// Length of the range.
        len: u64,
        /// Whether its storage may be released, as long as zeroes are read.
        unmap: bool,
        /// Complete only when the change is on stable storage.
        durable: bool,
    },
}

/// As many operations are in flight as the queue holds; take completions and submit again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the I/O queue is full")]
pub struct Full;

/// Receives completions: the tag given at submission and the number of bytes moved or affected.
pub type OnCompletion<'a> = dyn FnMut(u64, io::Result<u64>) + 'a;

/// A queue of operations on one disk, used by one thread at a time. Operations run in any order and
/// complete in any order.
///
/// ```text
/// submit*  ->  kick  ->  (completion_fd becomes readable)  ->  completions  ->  submit* ...
/// ```
///
/// Dropping a queue waits for its operations and discards their results. A rate limiter is a decorator:
/// it implements this trait around another queue and holds operations back.
pub trait IoQueue: Send {
    /// Takes up an operation under the caller's `tag`. The buffer list is copied; the buffers
    /// themselves must stay valid as [`IoBuf::new`] says. Nothing may happen before [`IoQueue::kick`].
    ///
    /// # Errors
    /// [`Full`]; everything else that is wrong arrives as a completion.
    fn submit(&mut self, op: &Op<'_>, tag: u64) -> Result<(), Full>;

    /// Starts what was submitted since the last call.
    ///
    /// # Errors
    /// The kernel would not take operations now. None is lost: `completion_fd` is readable, and the next
    /// call of `kick` or `completions` tries again.
    fn kick(&mut self) -> io::Result<()>;

    /// Hands out all completions there are, without waiting, and makes `completion_fd` unreadable.
    /// Returns how many there were.
    fn completions(&mut self, done: &mut OnCompletion<'_>) -> usize;

    /// Whether [`IoQueue::completions`] has something to do: for whoever looks again and again instead of waiting.
    fn ready(&mut self) -> bool {
        sys::is_readable(self.completion_fd()) || self.alarm_fd().is_some_and(sys::is_readable)
    }

    /// Waits until every operation is complete and hands the completions out.
    ///
    /// # Errors
    /// Waiting itself failed; operations may still be in flight.
    fn drain(&mut self, done: &mut OnCompletion<'_>) -> io::Result<()>;

    /// Readable when [`IoQueue::completions`] has something to do. Level-triggered.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Readable when operations that waited for the disk's limits may go: [`IoQueue::completions`] lets them. `None` if none ever wait.
    fn alarm_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Operations submitted whose completions were not handed out yet.
    fn in_flight(&self) -> usize;

    /// Most operations that can be in flight.
    fn depth(&self) -> usize;

    /// `"io_uring"` or `"sync"`, for logs and metrics.
    fn backend(&self) -> &'static str;
}

/// Completions waiting to be handed out, and the event that says so.
#[derive(Debug)]
pub(crate) struct Finished {
    results: VecDeque<(u64, Result<u64, i32>)>,
    event: File,
}

impl Finished {
    pub(crate) fn new(depth: usize) -> io::Result<Self> {
        Ok(Self {
            results: VecDeque::with_capacity(depth),
            event: sys::event_file()?,
        })
    }

    pub(crate) fn push(&mut self, tag: u64, result: Result<u64, i32>) {
        self.results.push_back((tag, result));
    }

    pub(crate) fn len(&self) -> usize {
        self.results.len()
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, io::Result<u64>)> {
        let (tag, result) = self.results.pop_front()?;
        Some((tag, result.map_err(io::Error::from_raw_os_error)))
    }

    /// Makes the event readable.
    pub(crate) fn signal(&self) {
        // Fails only when the counter is at its maximum, and then it is readable already.
        let _ = (&self.event).write(&1u64.to_ne_bytes());
    }

    /// Makes the event unreadable.
    pub(crate) fn clear(&self) {
        // Fails only when it is unreadable already: the event does not block.
        let _ = (&self.event).read(&mut [0; 8]);
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
