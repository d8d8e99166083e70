//! What can go wrong when a disk is opened or a queue is made.

use std::io;
use std::path::PathBuf;

/// Why a disk could not be opened. Every message names the path, the cause and what to do about it;
/// the operating system's own reason, where there is one, is the error's source.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("disk {path:?} does not exist; create it or correct the path")]
    Missing {
        /// The path as it was given.
        path: PathBuf,
    },
    /// A directory, pipe, socket or character device.
    #[error("disk {path:?} is a {kind}; a disk must be a regular file or a block device")]
    NotADisk {
        /// The path as it was given.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The file's permissions (or a security module) forbid the access asked for.
    #[error("no permission to {access} disk {path:?}; change its owner or mode{hint}")]
    Permission {
        /// The path as it was given.
        path: PathBuf,
        /// `"read"` or `"read and write"`.
        access: &'static str,
        /// More advice when opening read-only may be enough.
        hint: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Writing was asked for on a file system or a device that is read-only.
    #[error(
        "disk {path:?} cannot be written: it is on a read-only file system or is a read-only device; open it with readonly=on"
    )]
    ReadOnly {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The file has no bytes, so there is no disk in it.
    #[error("disk {path:?} is empty; give it a size first (truncate -s 10G makes a sparse disk of 10 GiB)")]
    Empty {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The size is not a whole number of blocks.
    #[error(
        "disk {path:?} has {size} bytes, which is not a multiple of its block size of {block} bytes; \
         extend it (truncate -s %{block} does) or check that it is a raw image"
    )]
    Unaligned {
        /// The path as it was given.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes: 512, or more where direct I/O needs it.
        block: u32,
    },
    /// Someone else holds a lock on the file that excludes ours.
    #[error(
        "disk {path:?} is in use: another process holds a lock on it; stop that process, or have all its users open it with readonly=on"
    )]
    Locked {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The file system cannot lock.
    #[error(
        "disk {path:?} cannot be locked, so a second writer could destroy it; use a file system with working locks"
    )]
    NoLocks {
        /// The path as it was given.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The file system cannot do direct I/O.
    #[error("disk {path:?} cannot be opened with direct=on: its file system has no direct I/O; use direct=off")]
    NoDirect {
        /// The path as it was given.
        path: PathBuf,
    },
    /// The serial number does not fit the 20 bytes a guest is given.
    #[error("the serial number {serial:?} of disk {path:?} must be 1 to 20 printable ASCII characters")]
    Serial {
        /// The path as it was given.
        path: PathBuf,
        /// The serial number as it was given.
        serial: String,
    },
    /// io_uring was asked for by name and is not usable here.
    #[error("disk {path:?} cannot use the io_uring backend; leave the backend to be chosen automatically")]
    Backend {
        /// The path as it was given.
        path: PathBuf,
        /// What is missing.
        source: QueueError,
    },
    /// Another system call failed.
    #[error("disk {path:?}: {action} failed")]
    Io {
        /// The path as it was given.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// Why an I/O queue could not be made.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// `io_uring_setup` or `io_uring_register` failed.
    #[error("the kernel or a sandbox refuses io_uring")]
    Refused(#[source] io::Error),
    /// The kernel's io_uring is too old.
    #[error("the kernel's io_uring lacks the operation {0}")]
    MissingOperation(&'static str),
    /// No event file descriptor for completions.
    #[error("cannot create the event file descriptor for completions")]
    EventFd(#[source] io::Error),
}

impl QueueError {
    /// Whether the thread backend should be tried instead: io_uring is missing, forbidden, or there is
    /// not enough locked memory for its rings (kernels before 5.12 count it against RLIMIT_MEMLOCK).
    pub(crate) fn means_unsupported(&self) -> bool {
        match self {
            Self::MissingOperation(_) => true,
            Self::Refused(e) => matches!(
                e.raw_os_error(),
                Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::ENOMEM | libc::EINVAL)
            ),
            Self::EventFd(_) => false,
        }
    }
}

/// Why a disk could not be made larger. It keeps the size it had.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// Bytes would be lost.
    #[error("the disk has {now} bytes and would lose data at {wanted}; a disk can only grow")]
    Shrinks {
        /// Its size in bytes.
        now: u64,
        /// The size asked for.
        wanted: u64,
    },
    /// Not whole blocks.
    #[error("{wanted} bytes are not a multiple of the disk's block size of {block} bytes")]
    Unaligned {
        /// The size asked for.
        wanted: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// Opened for reading only.
    #[error("the disk is read-only; grow the image itself, its users see that when they open it again")]
    ReadOnly,
    /// A block device has the size its driver gives it.
    #[error("the disk is a block device of {now} bytes; make the device itself larger first")]
    Device {
        /// Its size in bytes.
        now: u64,
    },
    /// The file system does not let it grow.
    #[error("the file cannot be made larger")]
    File(#[source] std::io::Error),
}
