//! Helpers shared by the engine's tests.
#![allow(unsafe_code, dead_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use tempfile::NamedTempFile;
use triarch_block::{Backend, Disk, DiskOptions, IoBuf, IoQueue, Op};

/// Both backends: the same tests run on each.
pub const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Sync];

/// The backends that work here. Says so when io_uring is missing, rather than passing silently.
pub fn backends() -> Vec<Backend> {
    let file = image(4096);
    let works = |backend| {
        let options = DiskOptions {
            backend,
            ..DiskOptions::new(file.path())
        };
        Disk::open(&options)
            .inspect_err(|e| eprintln!("skipped {backend:?}: {e}"))
            .is_ok()
    };
    BACKENDS.into_iter().filter(|b| works(*b)).collect()
}

/// A sparse image of `len` bytes beside the build's output, which is on a real file system (direct I/O).
pub fn image(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

pub fn options(path: &Path, backend: Backend, direct: bool) -> DiskOptions {
    DiskOptions {
        backend,
        direct,
        ..DiskOptions::new(path)
    }
}

pub fn open(path: &Path, backend: Backend, direct: bool) -> Arc<Disk> {
    Disk::open(&options(path, backend, direct)).unwrap()
}

/// Memory with a chosen misalignment, cut into pieces.
pub struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    /// `len` bytes that begin `skew` bytes after a multiple of 4096.
    pub fn new(len: usize, skew: usize) -> Self {
        let bytes = vec![0xa5; len + 8192];
        let start = (bytes.as_ptr() as usize).next_multiple_of(4096) - bytes.as_ptr() as usize + skew;
        Self { bytes, start, len }
    }

    pub fn with(content: &[u8], skew: usize) -> Self {
        let mut memory = Self::new(content.len(), skew);
        memory.get_mut().copy_from_slice(content);
        memory
    }

    pub fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    /// Buffers of `piece` bytes each. Valid while this object lives and is not touched.
    pub fn bufs(&mut self, piece: usize) -> Vec<IoBuf> {
        // SAFETY: every test keeps the memory until its operations are complete.
        self.get_mut()
            .chunks_mut(piece)
            .map(|p| unsafe { IoBuf::new(p.as_mut_ptr(), p.len()) })
            .collect()
    }
}

/// Runs one operation to its end by waiting on the completion descriptor, as a device does.
pub fn run(queue: &mut dyn IoQueue, op: &Op<'_>) -> io::Result<u64> {
    queue.submit(op, 99).unwrap();
    queue.kick().unwrap();
    let mut results = wait(queue, 1);
    results.remove(&99).unwrap()
}

/// Waits for `count` completions.
pub fn wait(queue: &mut dyn IoQueue, count: usize) -> BTreeMap<u64, io::Result<u64>> {
    let mut results = BTreeMap::new();
    while results.len() < count {
        assert!(readable(queue, 10_000), "no completion within 10 s");
        queue.completions(&mut |tag, result| {
            assert!(results.insert(tag, result).is_none(), "tag {tag} completed twice");
        });
    }
    results
}

/// Whether the completion descriptor becomes readable within `timeout` ms.
pub fn readable(queue: &dyn IoQueue, timeout: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: queue.completion_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd structure.
    unsafe { libc::poll(&raw mut poll, 1, timeout) == 1 }
}

/// Content that differs from byte to byte and seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

pub fn is_root() -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::geteuid() == 0 }
}
