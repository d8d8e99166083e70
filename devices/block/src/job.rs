//! One operation on its way: what to ask the kernel next, and what its answer means.
//!
//! Both backends drive the same state machine, so short transfers, retries, bounce buffers, fall-backs and
//! write-through behave alike whichever runs. A backend asks [`Job::next`] for an action, has it carried
//! out, tells [`Job::settle`] the result, and repeats until the action is [`Action::Done`].

use std::time::Instant;

use crate::buffer::{self, AlignedBuf, BOUNCE_SIZE};
use crate::disk::Disk;
use crate::metrics::{Counters, OpKind as Kind};
use crate::queue::Op;

/// Vectors one call may have (`UIO_MAXIOV`).
const MAX_VECS: usize = 1024;
/// EINTR and EAGAIN in a row, without progress, after which an operation fails.
const MAX_RETRIES: u16 = 1000;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Where a transfer's vectors are. They stay in place until the action is settled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vecs {
    pub(crate) vecs: *const libc::iovec,
    pub(crate) count: u32,
    /// Position on the disk in bytes.
    pub(crate) offset: u64,
}

/// What a backend is to do next for a job.
#[derive(Debug)]
pub(crate) enum Action {
    /// Read into the vectors.
    Read(Vecs),
    /// Write from the vectors; `true`: it must be on stable storage when the call returns.
    Write(Vecs, bool),
    /// fdatasync.
    Sync,
    /// fallocate.
    Allocate { mode: i32, offset: u64, len: u64 },
    /// BLKDISCARD.
    DiscardDevice { offset: u64, len: u64 },
    /// Provide a bounce buffer by [`Job::lend`] and ask again.
    NeedBounce,
    /// Finished: the number of bytes, or a positive errno value.
    Done(Result<u64, i32>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Move,
    Punch,
    ZeroRange,
    WriteZeroes,
    DiscardDevice,
    Sync,
    End(Result<(), i32>),
}

/// State of one operation. Jobs are reused, so that the vector list is allocated only while it grows.
#[derive(Debug)]
pub(crate) struct Job {
    tag: u64,
    kind: Kind,
    /// When it was submitted.
    since: Option<Instant>,
    step: Step,
    /// Writes carry RWF_DSYNC.
    durable: bool,
    /// A flush follows the data.
    sync_after: bool,
    /// The vectors do not suit direct I/O: data goes through a bounce buffer.
    staged: bool,
    retries: u16,
    offset: u64,
    left: u64,
    total: u64,
    vecs: Vec<libc::iovec>,
    first: usize,
    bounce: Option<AlignedBuf>,
    bounce_vec: libc::iovec,
}

// SAFETY: the raw pointers in `vecs` and `bounce_vec` come from `IoBuf`s, which may move between threads,
// and from this job's own allocations.
#[allow(unsafe_code)]
unsafe impl Send for Job {}

impl Job {
    pub(crate) fn new() -> Self {
        Self {
            tag: 0,
            kind: Kind::Flush,
            since: None,
            step: Step::End(Ok(())),
            durable: false,
            sync_after: false,
            staged: false,
            retries: 0,
            offset: 0,
            left: 0,
            total: 0,
            vecs: Vec::new(),
            first: 0,
            bounce: None,
            bounce_vec: libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            },
        }
    }

    /// The caller's name for the operation.
    pub(crate) fn tag(&self) -> u64 {
        self.tag
    }

    /// Takes up an operation. What is wrong with it shows as its result.
    pub(crate) fn start(&mut self, disk: &Disk, op: &Op<'_>, tag: u64) {
        debug_assert!(self.bounce.is_none());
        self.tag = tag;
        self.since = Some(Instant::now());
        self.retries = 0;
        self.durable = false;
        self.sync_after = false;
        self.staged = false;
        self.first = 0;
        self.vecs.clear();
        (self.offset, self.left) = (0, 0);
        let checked = match *op {
            Op::Read { offset, bufs } => {
                self.kind = Kind::Read;
                self.take_bufs(disk, offset, bufs)
            }
            Op::Write { offset, bufs, durable } => {
                self.kind = Kind::Write;
                self.durable = durable && disk.can_write_durably();
                self.sync_after = durable && !self.durable;
                self.take_bufs(disk, offset, bufs)
            }
            Op::Flush => {
                self.kind = Kind::Flush;
                Ok(Step::Sync)
            }
            Op::Discard { offset, len, durable } => {
                self.kind = Kind::Discard;
                self.sync_after = durable;
                self.take_range(disk, offset, len).map(|()| match disk.is_device() {
                    true => Step::DiscardDevice,
                    false => Step::Punch,
                })
            }
            Op::WriteZeroes {
                offset,
                len,
                unmap,
                durable,
            } => {
                self.kind = Kind::WriteZeroes;
                self.sync_after = durable;
                self.take_range(disk, offset, len).map(|()| zeroing_step(disk, unmap))
            }
        };
        self.total = self.left;
        self.step = match checked {
            Ok(Step::Sync) if disk.readonly() => Step::End(Ok(())),
            Ok(step) if self.left > 0 || step == Step::Sync => step,
            Ok(_) => Step::End(Ok(())),
            Err(errno) => Step::End(Err(errno)),
        };
    }

    fn take_bufs(&mut self, disk: &Disk, offset: u64, bufs: &[crate::IoBuf]) -> Result<Step, i32> {
        let mut len = 0u64;
        let direct = disk.direct_alignment();
        for buf in bufs.iter().filter(|buf| !buf.is_empty()) {
            len = len.checked_add(buf.len() as u64).ok_or(libc::EINVAL)?;
            self.staged |= direct.is_some_and(|align| !align.fits(buf));
            self.vecs.push(buf.iovec());
        }
        self.take_range(disk, offset, len)?;
        Ok(Step::Move)
    }

    fn take_range(&mut self, disk: &Disk, offset: u64, len: u64) -> Result<(), i32> {
        if self.kind != Kind::Read && disk.readonly() {
            return Err(libc::EROFS);
        }
        let end = offset.checked_add(len).ok_or(libc::EINVAL)?;
        let block = u64::from(disk.geometry().logical_block);
        if end > disk.size() || !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(libc::EINVAL);
        }
        (self.offset, self.left) = (offset, len);
        Ok(())
    }

    /// What to do next. Asking again without settling gives the same action.
    pub(crate) fn next(&mut self) -> Action {
        match self.step {
            Step::Move => self.next_move(),
            Step::WriteZeroes => {
                self.vecs.clear();
                self.first = 0;
                buffer::push_zeroes(&mut self.vecs, self.left);
                Action::Write(self.all_vecs(), false)
            }
            Step::Punch => Action::Allocate {
                mode: PUNCH,
                offset: self.offset,
                len: self.left,
            },
            Step::ZeroRange => Action::Allocate {
                mode: ZERO,
                offset: self.offset,
                len: self.left,
            },
            Step::DiscardDevice => Action::DiscardDevice {
                offset: self.offset,
                len: self.left,
            },
            Step::Sync => Action::Sync,
            Step::End(result) => Action::Done(result.map(|()| self.total)),
        }
    }

    fn all_vecs(&self) -> Vecs {
        let rest = &self.vecs[self.first..];
        Vecs {
            vecs: rest.as_ptr(),
            count: rest.len().min(MAX_VECS) as u32,
            offset: self.offset,
        }
    }

    fn next_move(&mut self) -> Action {
        let vecs = if self.staged {
            let Some(bounce) = self.bounce.as_mut() else {
                return Action::NeedBounce;
            };
            let len = self.left.min(BOUNCE_SIZE as u64) as usize;
            if self.kind == Kind::Write {
                bounce.gather(&self.vecs[self.first..], len);
            }
            self.bounce_vec = bounce.iovec(len);
            Vecs {
                vecs: &raw const self.bounce_vec,
                count: 1,
                offset: self.offset,
            }
        } else {
            self.all_vecs()
        };
        match self.kind {
            Kind::Read => Action::Read(vecs),
            _ => Action::Write(vecs, self.durable),
        }
    }

    /// Lends a bounce buffer, which [`Job::take_back`] returns when the job is done.
    pub(crate) fn lend(&mut self, bounce: AlignedBuf) {
        self.bounce = Some(bounce);
    }

    /// Returns the bounce buffer, if one was lent.
    pub(crate) fn take_back(&mut self) -> Option<AlignedBuf> {
        self.bounce.take()
    }

    /// Ends the job with an error.
    pub(crate) fn fail(&mut self, errno: i32) {
        self.step = Step::End(Err(errno));
    }

    /// Takes the result of the last action: bytes moved or 0, or a negative errno value.
    pub(crate) fn settle(&mut self, disk: &Disk, result: i32) {
        if matches!(result.wrapping_neg(), libc::EINTR | libc::EAGAIN) {
            self.retries += 1;
            if self.retries > MAX_RETRIES {
                self.fail(libc::EIO);
            }
            return;
        }
        self.retries = 0;
        match self.step {
            Step::Move | Step::WriteZeroes => self.moved(disk, result),
            Step::Punch if lacks_operation(result) => {
                disk.forget_punch();
                // A discard is a hint: a file system that cannot punch holes keeps the data.
                self.step = match self.kind {
                    Kind::Discard => self.after_data(),
                    _ => zeroing_step(disk, false),
                };
            }
            Step::ZeroRange if lacks_operation(result) => {
                disk.forget_zero_range();
                self.step = Step::WriteZeroes;
            }
            Step::DiscardDevice if lacks_operation(result) => self.step = self.after_data(),
            _ if result < 0 => self.fail(result.wrapping_neg()),
            Step::Punch | Step::ZeroRange | Step::DiscardDevice => self.step = self.after_data(),
            Step::Sync | Step::End(_) => self.step = Step::End(Ok(())),
        }
    }

    fn after_data(&self) -> Step {
        if self.sync_after { Step::Sync } else { Step::End(Ok(())) }
    }

    fn moved(&mut self, disk: &Disk, result: i32) {
        if self.durable && lacks_operation(result) {
            // No RWF_DSYNC on this kernel or file system: write, then flush.
            disk.forget_durable_writes();
            self.durable = false;
            self.sync_after = true;
            return;
        }
        let mut moved = match u64::try_from(result) {
            Ok(moved) => moved.min(self.left),
            Err(_) => return self.fail(result.wrapping_neg()),
        };
        if moved < self.left
            && let Some(align) = disk.direct_alignment()
        {
            // Go on from an address that direct I/O accepts.
            moved -= moved % u64::from(align.offset);
        }
        if moved == 0 {
            // The file ends before the disk does: someone truncated it.
            return self.fail(libc::EIO);
        }
        if self.step == Step::Move {
            if self.kind == Kind::Read
                && let Some(bounce) = self.bounce.as_ref()
            {
                bounce.scatter(&self.vecs[self.first..], moved as usize);
            }
            self.consume(moved as usize);
        }
        self.offset += moved;
        self.left -= moved;
        if self.left == 0 {
            self.step = self.after_data();
        }
    }

    /// Drops the first `len` bytes of the vectors.
    fn consume(&mut self, mut len: usize) {
        while len > 0 {
            let Some(vec) = self.vecs.get_mut(self.first) else {
                return;
            };
            let part = len.min(vec.iov_len);
            buffer::advance(vec, part);
            if vec.iov_len == 0 {
                self.first += 1;
            }
            len -= part;
        }
    }

    /// Counts the finished job.
    pub(crate) fn count(&self, counters: &Counters, result: Result<u64, i32>) {
        match result {
            Ok(bytes) => {
                let time = self.since.map(|since| since.elapsed()).unwrap_or_default();
                counters.completed(self.kind, bytes, time);
            }
            Err(_) => counters.failed(),
        }
    }
}

/// The first way to make a range read as zeroes that has not failed on this disk before.
fn zeroing_step(disk: &Disk, unmap: bool) -> Step {
    if unmap && disk.can_punch() {
        Step::Punch
    } else if disk.can_zero_range() {
        Step::ZeroRange
    } else {
        Step::WriteZeroes
    }
}

/// Whether a result says that the file system, device or kernel does not know the operation.
fn lacks_operation(result: i32) -> bool {
    matches!(result.wrapping_neg(), libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{DiskOptions, IoBuf};

    const NOT_SUPPORTED: i32 = -libc::EOPNOTSUPP;

    fn disk() -> (tempfile::NamedTempFile, Arc<Disk>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = Disk::open(&DiskOptions::new(file.path())).unwrap();
        (file, disk)
    }

    #[allow(unsafe_code)]
    fn buf(memory: &mut [u8]) -> IoBuf {
        // SAFETY: these tests never carry an action out, so nothing is accessed.
        unsafe { IoBuf::new(memory.as_mut_ptr(), memory.len()) }
    }

    fn started(disk: &Disk, op: &Op<'_>) -> Job {
        let mut job = Job::new();
        job.start(disk, op, 1);
        job
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let (_file, disk) = disk();
        let (mut a, mut b) = ([0u8; 1024], [0u8; 512]);
        let mut job = started(
            &disk,
            &Op::Read {
                offset: 4096,
                bufs: &[buf(&mut a), buf(&mut b)],
            },
        );
        assert!(matches!(job.next(), Action::Read(v) if v.count == 2 && v.offset == 4096));
        job.settle(&disk, 1030);
        assert!(matches!(job.next(), Action::Read(v) if v.count == 1 && v.offset == 4096 + 1030));
        assert_eq!(job.vecs[job.first].iov_len, 506);
        assert_eq!(job.vecs[job.first].iov_base as usize, b.as_ptr() as usize + 6);
        job.settle(&disk, 506);
        assert!(matches!(job.next(), Action::Done(Ok(1536))));
    }

    #[test]
    fn nothing_moved_is_an_error_not_a_loop() {
        let (_file, disk) = disk();
        let mut a = [0u8; 512];
        let mut job = started(
            &disk,
            &Op::Read {
                offset: 0,
                bufs: &[buf(&mut a)],
            },
        );
        job.settle(&disk, 0);
        assert!(matches!(job.next(), Action::Done(Err(libc::EIO))));
    }

    #[test]
    fn interruptions_are_retried_but_not_for_ever() {
        let (_file, disk) = disk();
        for errno in [libc::EINTR, libc::EAGAIN] {
            let mut job = started(&disk, &Op::Flush);
            for _ in 0..MAX_RETRIES {
                job.settle(&disk, -errno);
                assert!(matches!(job.next(), Action::Sync));
            }
            job.settle(&disk, -errno);
            assert!(matches!(job.next(), Action::Done(Err(libc::EIO))));
        }
    }

    #[test]
    fn a_durable_write_without_the_flag_ends_with_a_flush() {
        let (_file, disk) = disk();
        let mut a = [0u8; 512];
        let bufs = [buf(&mut a)];
        let op = Op::Write {
            offset: 0,
            bufs: &bufs,
            durable: true,
        };
        let mut job = started(&disk, &op);
        assert!(matches!(job.next(), Action::Write(_, true)));
        job.settle(&disk, NOT_SUPPORTED);
        for mut job in [job, started(&disk, &op)] {
            assert!(matches!(job.next(), Action::Write(_, false)));
            job.settle(&disk, 512);
            assert!(matches!(job.next(), Action::Sync));
            job.settle(&disk, 0);
            assert!(matches!(job.next(), Action::Done(Ok(512))));
        }
    }

    #[test]
    fn zeroing_falls_back_step_by_step_and_remembers() {
        let (_file, disk) = disk();
        let op = Op::WriteZeroes {
            offset: 0,
            len: 4096,
            unmap: true,
            durable: true,
        };
        let mut job = started(&disk, &op);
        assert!(matches!(
            job.next(),
            Action::Allocate {
                mode: PUNCH,
                offset: 0,
                len: 4096
            }
        ));
        job.settle(&disk, NOT_SUPPORTED);
        assert!(matches!(job.next(), Action::Allocate { mode: ZERO, .. }));
        job.settle(&disk, NOT_SUPPORTED);
        for mut job in [job, started(&disk, &op)] {
            assert!(matches!(job.next(), Action::Write(v, false) if v.count == 1));
            job.settle(&disk, 4000);
            assert!(matches!(job.next(), Action::Write(v, false) if v.offset == 4000));
            job.settle(&disk, 96);
            assert!(matches!(job.next(), Action::Sync));
            job.settle(&disk, 0);
            assert!(matches!(job.next(), Action::Done(Ok(4096))));
        }
    }

    #[test]
    fn a_discard_that_cannot_be_done_succeeds_and_other_errors_count() {
        let (_file, disk) = disk();
        let op = Op::Discard {
            offset: 512,
            len: 1024,
            durable: false,
        };
        let mut job = started(&disk, &op);
        job.settle(&disk, -libc::ENOSPC);
        assert!(matches!(job.next(), Action::Done(Err(libc::ENOSPC))));
        let mut job = started(&disk, &op);
        job.settle(&disk, NOT_SUPPORTED);
        assert!(matches!(job.next(), Action::Done(Ok(1024))));
    }
}
