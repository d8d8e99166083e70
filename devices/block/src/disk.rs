//! An opened disk: the file, what is known about it, and its queues.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use crate::error::{GrowError, OpenError, QueueError};
use crate::geometry::{self, DirectAlign, Geometry};
use crate::metrics::DiskMetrics;
use crate::queue::IoQueue;
use crate::sync::SyncQueue;
use crate::sys;
use crate::throttle::{Limits, Throttle, ThrottledQueue};
use crate::uring::UringQueue;

/// Most operations one queue can have in flight.
pub const MAX_DEPTH: usize = 1024;

/// Bytes of a serial number that a guest can see (virtio 1.2 §5.2.6, `VIRTIO_BLK_T_GET_ID`).
pub const SERIAL_LEN: usize = 20;

/// How operations are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// io_uring where it works, else [`Backend::Sync`]. Decided when the first queue is made.
    #[default]
    Auto,
    /// io_uring; opening fails where it does not work.
    IoUring,
    /// Plain system calls on the thread that submits.
    Sync,
}

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Refuse writes. Any number of read-only users may share a disk.
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// How operations are carried out.
    pub backend: Backend,
    /// Serial number, 1 to [`SERIAL_LEN`] printable ASCII characters. Without one the disk gets a
    /// number made from the file's identity, the same every time it is opened on this host.
    pub serial: Option<String>,
    /// How much it may do. Limits can be changed later only if there are some here, be they empty ones.
    pub limits: Option<Limits>,
}

impl DiskOptions {
    /// Options for a writable disk, through the page cache, with a backend chosen automatically.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            direct: false,
            backend: Backend::Auto,
            serial: None,
            limits: None,
        }
    }
}

/// An opened, locked disk. Its queues share it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    device: bool,
    readonly: bool,
    size: AtomicU64,
    geometry: Geometry,
    direct: Option<DirectAlign>,
    serial: String,
    backend: Backend,
    uring_works: OnceLock<bool>,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_durable_writes: AtomicBool,
    throttle: Option<Arc<Throttle>>,
    metrics: Arc<DiskMetrics>,
}

impl Disk {
    /// Opens and locks a disk and finds out its size and block sizes.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing stays open or locked.
    pub fn open(options: &DiskOptions) -> Result<Arc<Self>, OpenError> {
        let file = Self::open_file(options)?;
        Self::from_file(file, options)
    }

    /// The same without the lock, for a disk that another host's VMM still uses: nothing may be written before
    /// [`take_lock`](Self::take_lock).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_unlocked(options: &DiskOptions) -> Result<Arc<Self>, OpenError> {
        let file = Self::open_file(options)?;
        Self::with_file(file, options, false)
    }

    fn open_file(options: &DiskOptions) -> Result<File, OpenError> {
        let path = &options.path;
        // Looked at before it is opened: opening a pipe would wait for its other end, and opening some
        // character devices does things.
        let metadata = std::fs::metadata(path).map_err(|e| open_error(options, e))?;
        check_kind(path, &metadata)?;
        let mut how = OpenOptions::new();
        how.read(true)
            .write(!options.readonly)
            .custom_flags(if options.direct { libc::O_DIRECT } else { 0 });
        how.open(path).map_err(|e| open_error(options, e))
    }

    /// Makes a disk from a file that was opened elsewhere (received from a supervisor, for
    /// example). The file must be open for reading, and for writing unless `readonly` is set, and with `O_DIRECT` if
    /// and only if `direct` is set; the path is used in messages only.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn from_file(file: File, options: &DiskOptions) -> Result<Arc<Self>, OpenError> {
        Self::with_file(file, options, true)
    }

    fn with_file(file: File, options: &DiskOptions, locked: bool) -> Result<Arc<Self>, OpenError> {
        let path = &options.path;
        let io = |action| {
            move |source| OpenError::Io {
                path: path.clone(),
                action,
                source,
            }
        };
        let metadata = file.metadata().map_err(io("reading its attributes"))?;
        check_kind(path, &metadata)?;
        let device = metadata.file_type().is_block_device();
        if device
            && !options.readonly
            && sys::device_is_readonly(file.as_fd()).map_err(io("asking whether it is read-only"))?
        {
            return Err(OpenError::ReadOnly { path: path.clone() });
        }
        if locked {
            lock(&file, path, options.readonly)?;
        }
        let direct = match options.direct {
            true => Some(geometry::direct(&file, device, path)?),
            false => None,
        };
        let geometry = geometry::probe(&file, &metadata, direct).map_err(io("reading its block sizes"))?;
        let size = size_of(&file, device).map_err(io("reading its size"))?;
        check_size(path, size, geometry.logical_block)?;
        let disk = Arc::new(Self {
            serial: serial(options, &metadata)?,
            path: path.clone(),
            device,
            readonly: options.readonly,
            size: AtomicU64::new(size),
            geometry,
            direct,
            backend: options.backend,
            uring_works: OnceLock::new(),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_durable_writes: AtomicBool::new(false),
            throttle: options.limits.as_ref().map(Throttle::new),
            metrics: Arc::default(),
            file,
        });
        if options.backend == Backend::IoUring {
            // A small trial, so that the error shows now and not when a guest starts the device.
            UringQueue::new(Arc::clone(&disk), Arc::default(), 1).map_err(|source| OpenError::Backend {
                path: path.clone(),
                source,
            })?;
        }
        Ok(disk)
    }

    /// Makes a queue for up to `depth` operations in flight, at least 1 and at most [`MAX_DEPTH`]. What it does is counted as done by
    /// the disk's queue `number`.
    ///
    /// # Errors
    /// [`QueueError`]: no file descriptors left, or io_uring was asked for by name and has stopped working.
    pub fn queue(self: &Arc<Self>, number: u16, depth: usize) -> Result<Box<dyn IoQueue>, QueueError> {
        let queue = self.engine(number, depth)?;
        Ok(match &self.throttle {
            Some(throttle) => Box::new(ThrottledQueue::new(queue, throttle.clone()).map_err(QueueError::EventFd)?),
            None => queue,
        })
    }

    /// A queue without limits.
    fn engine(self: &Arc<Self>, number: u16, depth: usize) -> Result<Box<dyn IoQueue>, QueueError> {
        let depth = depth.clamp(1, MAX_DEPTH);
        let counters = self.metrics.queue(number);
        let uring = match self.backend {
            Backend::Auto => self.uring_works.get().copied().unwrap_or(true),
            Backend::IoUring => true,
            Backend::Sync => false,
        };
        if uring {
            match UringQueue::new(Arc::clone(self), Arc::clone(&counters), depth) {
                Ok(queue) => {
                    let _ = self.uring_works.set(true);
                    return Ok(Box::new(queue));
                }
                // Falls back only while no queue of this disk has a ring: later failures are shortages.
                Err(error)
                    if self.backend == Backend::Auto
                        && self.uring_works.get().is_none()
                        && error.means_unsupported() =>
                {
                    let reason: &dyn std::error::Error = &error;
                    tracing::info!(disk = %self.path.display(), reason, "no io_uring, using plain system calls");
                    let _ = self.uring_works.set(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Box::new(SyncQueue::new(Arc::clone(self), counters, depth)?))
    }

    /// The limits on what it may do; `None` if it was opened without.
    pub fn limits(&self) -> Option<Limits> {
        self.throttle.as_ref().map(|throttle| throttle.limits())
    }

    /// Changes the limits, also for operations that wait already. A disk that was opened without limits keeps having none.
    pub fn set_limits(&self, limits: &Limits) {
        if let Some(throttle) = &self.throttle {
            throttle.set(limits);
        }
    }

    /// Operations that had to wait for the limits so far.
    pub fn held_back(&self) -> u64 {
        self.throttle.as_ref().map_or(0, |throttle| throttle.held())
    }

    /// Another handle of the file, with the same lock.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn share_file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Takes the lock that [`open`](Self::open) takes, after [`release_lock`](Self::release_lock) or
    /// [`open_unlocked`](Self::open_unlocked). Harmless if it is there already.
    ///
    /// # Errors
    /// Another process has a lock, or the file system has none.
    pub fn take_lock(&self) -> Result<(), OpenError> {
        lock(&self.file, &self.path, self.readonly)
    }

    /// Whether somebody else has a lock that keeps [`take_lock`](Self::take_lock) from succeeding now.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn is_locked_elsewhere(&self) -> Result<bool, OpenError> {
        sys::is_locked(self.file.as_fd(), !self.readonly).map_err(|source| lock_error(&self.path, source))
    }

    /// Where the file is on this host, the same for whoever opened it: the numbers of its file system and its own.
    ///
    /// # Errors
    /// The host's.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok(match metadata.file_type().is_block_device() {
            true => (0, metadata.rdev()),
            false => (metadata.dev(), metadata.ino()),
        })
    }

    /// Lets others lock the disk. Nothing may be written any more.
    ///
    /// # Errors
    /// The host's; then the lock is still there.
    pub fn release_lock(&self) -> io::Result<()> {
        sys::unlock(self.file.as_fd())
    }

    /// Waits until all that was written is where a loss of power does not harm it, and other hosts see it.
    ///
    /// # Errors
    /// The host's; what was written may be lost.
    pub fn sync(&self) -> io::Result<()> {
        match self.readonly {
            true => Ok(()),
            false => self.file.sync_data(),
        }
    }

    /// Size in bytes as last read from the file, a multiple of the logical block size.
    pub fn size(&self) -> u64 {
        self.size.load(Relaxed)
    }

    /// Reads the size again, for disks that are resized while in use. Returns the new size in bytes if
    /// it changed; a partial block at the end is left out.
    ///
    /// # Errors
    /// The size could not be read; the old one stays.
    pub fn refresh_size(&self) -> io::Result<Option<u64>> {
        let size = size_of(&self.file, self.device)?;
        let size = size - size % u64::from(self.geometry.logical_block);
        Ok((self.size.swap(size, Relaxed) != size).then_some(size))
    }

    /// Makes the file `size` bytes long; the new bytes read as zeroes. A block device has to have that size already. The size guests
    /// see changes with [`refresh_size`](Self::refresh_size).
    ///
    /// # Errors
    /// See [`GrowError`]; the disk keeps its size.
    pub fn grow(&self, size: u64) -> Result<(), GrowError> {
        let block = self.geometry.logical_block;
        if !size.is_multiple_of(block.into()) {
            return Err(GrowError::Unaligned { wanted: size, block });
        }
        let now = size_of(&self.file, self.device).map_err(GrowError::File)?;
        if size < now {
            return Err(GrowError::Shrinks { now, wanted: size });
        }
        if size == now {
            return Ok(());
        }
        if self.device {
            return Err(GrowError::Device { now });
        }
        if self.readonly {
            return Err(GrowError::ReadOnly);
        }
        self.file.set_len(size).map_err(GrowError::File)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether writes are refused.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// Block sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Serial number, 1 to [`SERIAL_LEN`] ASCII characters.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Counters of its queues. They go on when queues are dropped and made again.
    pub fn counters(&self) -> &Arc<DiskMetrics> {
        &self.metrics
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn direct_alignment(&self) -> Option<DirectAlign> {
        self.direct
    }

    /// Alignment of bounce buffers in bytes, a power of two.
    pub(crate) fn bounce_alignment(&self) -> usize {
        self.direct.map_or(4096, |d| d.memory.max(4096)) as usize
    }

    pub(crate) fn can_punch(&self) -> bool {
        !self.no_punch.load(Relaxed)
    }

    pub(crate) fn forget_punch(&self) {
        self.no_punch.store(true, Relaxed);
    }

    pub(crate) fn can_zero_range(&self) -> bool {
        !self.no_zero_range.load(Relaxed)
    }

    pub(crate) fn forget_zero_range(&self) {
        self.no_zero_range.store(true, Relaxed);
    }

    pub(crate) fn can_write_durably(&self) -> bool {
        !self.no_durable_writes.load(Relaxed)
    }

    pub(crate) fn forget_durable_writes(&self) {
        self.no_durable_writes.store(true, Relaxed);
    }
}

fn size_of(file: &File, device: bool) -> io::Result<u64> {
    if device {
        sys::device_size(file.as_fd())
    } else {
        Ok(file.metadata()?.len())
    }
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), OpenError> {
    let kind = metadata.file_type();
    let kind = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "directory"
    } else if kind.is_char_device() {
        "character device"
    } else if kind.is_fifo() {
        "pipe"
    } else {
        "socket"
    };
    Err(OpenError::NotADisk {
        path: path.to_owned(),
        kind,
    })
}

fn check_size(path: &Path, size: u64, block: u32) -> Result<(), OpenError> {
    let path = path.to_owned();
    if size == 0 {
        Err(OpenError::Empty { path })
    } else if !size.is_multiple_of(u64::from(block)) {
        Err(OpenError::Unaligned { path, size, block })
    } else {
        Ok(())
    }
}

fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), OpenError> {
    sys::lock(file.as_fd(), !readonly).map_err(|source| lock_error(path, source))
}

fn lock_error(path: &Path, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => OpenError::Locked { path },
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => OpenError::NoLocks { path, source },
        _ => OpenError::Io {
            path,
            action: "locking it",
            source,
        },
    }
}

fn serial(options: &DiskOptions, metadata: &Metadata) -> Result<String, OpenError> {
    let Some(serial) = &options.serial else {
        // A device is known by its number: its node may be another one next time.
        let (high, low) = match metadata.file_type().is_block_device() {
            true => (0, metadata.rdev()),
            false => (metadata.dev(), metadata.ino()),
        };
        return Ok(format!("{:08x}{:012x}", high & 0xffff_ffff, low & 0xffff_ffff_ffff));
    };
    let fits = (1..=SERIAL_LEN).contains(&serial.len()) && serial.bytes().all(|b| (b' '..=b'~').contains(&b));
    match fits {
        true => Ok(serial.clone()),
        false => Err(OpenError::Serial {
            path: options.path.clone(),
            serial: serial.clone(),
        }),
    }
}

/// Turns the system's refusal to open into a cause and a remedy.
fn open_error(options: &DiskOptions, source: io::Error) -> OpenError {
    let path = options.path.clone();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path },
        Some(libc::EISDIR) => OpenError::NotADisk {
            path,
            kind: "directory",
        },
        Some(libc::EROFS) => OpenError::ReadOnly { path },
        Some(libc::EACCES | libc::EPERM) if !options.readonly && is_readonly_device(&path) => {
            OpenError::ReadOnly { path }
        }
        Some(libc::EACCES | libc::EPERM) => OpenError::Permission {
            path,
            access: if options.readonly { "read" } else { "read and write" },
            hint: if options.readonly {
                ""
            } else {
                ", or use readonly=on if the guest only reads"
            },
            source,
        },
        Some(libc::EINVAL) if options.direct => OpenError::NoDirect { path },
        _ => OpenError::Io {
            path,
            action: "opening it",
            source,
        },
    }
}

/// Whether `path` is a block device that cannot be opened for writing because it is set read-only.
fn is_readonly_device(path: &Path) -> bool {
    let device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    device && File::open(path).is_ok_and(|file| sys::device_is_readonly(file.as_fd()).unwrap_or(false))
}
