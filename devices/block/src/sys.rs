//! The system calls of the engine, each wrapped once.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::job::{Action, Vecs};

// linux/fs.h; libc has no names for these.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKROGET: libc::Ioctl = 0x125e;
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Most bytes one read or write call is asked for: below the kernel's own limit (`MAX_RW_COUNT`), and
/// a multiple of every block size.
pub(crate) const MAX_TRANSFER: usize = 1 << 30;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn ioctl_u32(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: the requests used here write one int to a pointer that is valid for it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// The size of a block device in bytes.
pub(crate) fn device_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut value: u64 = 0;
    // SAFETY: BLKGETSIZE64 writes one u64 to a pointer that is valid for it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut value) })?;
    Ok(value)
}

/// The logical block size of a block device in bytes.
pub(crate) fn device_logical_block(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_u32(fd, libc::BLKSSZGET)
}

/// The physical block size of a block device in bytes.
pub(crate) fn device_physical_block(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_u32(fd, libc::BLKPBSZGET)
}

/// The smallest I/O a block device likes, in bytes.
pub(crate) fn device_minimum_io(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_u32(fd, libc::BLKIOMIN)
}

/// The I/O size a block device likes best, in bytes; 0 if it has no preference.
pub(crate) fn device_optimal_io(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_u32(fd, libc::BLKIOOPT)
}

/// Whether a block device is set read-only.
pub(crate) fn device_is_readonly(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ioctl_u32(fd, BLKROGET)? != 0)
}

/// What `statx` says about direct I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirectAlignment {
    /// Supported with this alignment of memory and of file offsets and lengths, in bytes.
    Known { memory: u32, offset: u32 },
    /// Not supported on this file.
    Unsupported,
    /// The kernel (before 6.1) or the file system does not say.
    Unknown,
}

/// Asks the kernel which alignment direct I/O needs (statx(2), `STATX_DIOALIGN`).
pub(crate) fn direct_alignment(fd: BorrowedFd<'_>) -> DirectAlignment {
    let Ok(stat) = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return DirectAlignment::Unknown;
    };
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        DirectAlignment::Unknown
    } else if stat.stx_dio_offset_align == 0 || stat.stx_dio_mem_align == 0 {
        DirectAlignment::Unsupported
    } else {
        DirectAlignment::Known {
            memory: stat.stx_dio_mem_align,
            offset: stat.stx_dio_offset_align,
        }
    }
}

/// Takes a lock on the whole file that belongs to the open file description (fcntl(2),
/// `F_OFD_SETLK`): exclusive or shared. It goes when the last copy of the descriptor is closed.
pub(crate) fn lock(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<()> {
    set_lock(fd, if exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Whether somebody else has a lock that keeps such a one from being taken (fcntl(2), `F_OFD_GETLK`).
pub(crate) fn is_locked(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    let mut range = whole(if exclusive { libc::F_WRLCK } else { libc::F_RDLCK });
    // SAFETY: F_OFD_GETLK reads and writes one flock structure.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) })?;
    Ok(range.l_type != libc::F_UNLCK as libc::c_short)
}

/// Gives that lock up.
pub(crate) fn unlock(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_lock(fd, libc::F_UNLCK)
}

fn set_lock(fd: BorrowedFd<'_>, kind: libc::c_int) -> io::Result<()> {
    let range = whole(kind);
    // SAFETY: F_OFD_SETLK reads one flock structure.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) })
}

/// A lock of this kind on all of a file.
fn whole(kind: libc::c_int) -> libc::flock {
    // SAFETY: all-zero is a valid flock structure; length 0 means to the end, however far it moves,
    // and OFD locks need l_pid to be 0.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    range
}

fn result_of(result: isize) -> i32 {
    if result < 0 {
        -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    } else {
        // One call moves at most MAX_RW_COUNT bytes, which fits.
        i32::try_from(result).unwrap_or(i32::MAX)
    }
}

/// Runs an action to its end on the calling thread. Returns what io_uring would: a byte count or 0, or a
/// negative errno value. [`Action::Done`] and [`Action::NeedBounce`] are no system calls and return 0.
///
/// # Safety
/// The buffers an [`Action::Read`] or [`Action::Write`] points to must be valid for it.
pub(crate) unsafe fn perform(fd: BorrowedFd<'_>, action: &Action) -> i32 {
    let raw = fd.as_raw_fd();
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    match *action {
        Action::Read(Vecs { vecs, count, offset }) => {
            // SAFETY: the caller vouches for the vectors and their buffers.
            result_of(unsafe { libc::preadv(raw, vecs, count as libc::c_int, signed(offset)) })
        }
        Action::Write(Vecs { vecs, count, offset }, durable) => {
            let count = count as libc::c_int;
            // Plain pwritev where that is enough: old kernels and file systems lack RWF_DSYNC.
            // SAFETY: the caller vouches for the vectors and their buffers.
            result_of(unsafe {
                if durable {
                    libc::pwritev2(raw, vecs, count, signed(offset), libc::RWF_DSYNC)
                } else {
                    libc::pwritev(raw, vecs, count, signed(offset))
                }
            })
        }
        Action::Sync => {
            // SAFETY: no memory is involved.
            result_of(unsafe { libc::fdatasync(raw) } as isize)
        }
        Action::Allocate { mode, offset, len } => {
            // SAFETY: no memory is involved.
            result_of(unsafe { libc::fallocate(raw, mode, signed(offset), signed(len)) } as isize)
        }
        Action::DiscardDevice { offset, len } => {
            let range = [offset, len];
            // SAFETY: BLKDISCARD reads two u64 values.
            result_of(unsafe { libc::ioctl(raw, BLKDISCARD, &raw const range) } as isize)
        }
        Action::NeedBounce | Action::Done(_) => 0,
    }
}

/// A new eventfd that does not block, as a file to read and write eight bytes at a time.
pub(crate) fn event_file() -> io::Result<File> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    check(fd)?;
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// A new timerfd that does not block, as a file; it is off.
pub(crate) fn alarm_file() -> io::Result<File> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
    check(fd)?;
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Whether there is something to read, without waiting.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the one record and the time live as long as the call.
    let ready = unsafe { libc::ppoll(&mut poll, 1, &now, std::ptr::null()) };
    ready > 0
}

/// Makes an [`alarm_file`] readable in `nanos` nanoseconds, which are not zero.
pub(crate) fn set_alarm(alarm: &File, nanos: u64) {
    let seconds = libc::time_t::try_from(nanos / 1_000_000_000).unwrap_or(libc::time_t::MAX);
    let value = libc::itimerspec {
        it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: libc::timespec {
            tv_sec: seconds,
            tv_nsec: (nanos % 1_000_000_000) as libc::c_long,
        },
    };
    // SAFETY: the value lives; the old one is not asked for. Such a value is not refused.
    unsafe { libc::timerfd_settime(alarm.as_raw_fd(), 0, &value, std::ptr::null_mut()) };
}
