//! What is counted of devices of the host. All of it can be read at any time, by any thread.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// What one device counts since the guest has it, or since the guest's last reset.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    resets: AtomicU64,
    vectors: AtomicU64,
}

impl Counters {
    /// Reads and writes of its registers that took the guest to the VMM: those of the configuration space, of I/O ports, and of pages that
    /// the guest does not reach by itself.
    pub fn accesses(&self) -> (u64, u64) {
        (self.reads.load(Relaxed), self.writes.load(Relaxed))
    }

    /// Resets, the one with which the guest got it among them.
    pub fn resets(&self) -> u64 {
        self.resets.load(Relaxed)
    }

    /// Interrupts of the device that ring the guest now.
    pub fn vectors(&self) -> u64 {
        self.vectors.load(Relaxed)
    }

    pub(crate) fn read(&self) {
        self.reads.fetch_add(1, Relaxed);
    }

    pub(crate) fn write(&self) {
        self.writes.fetch_add(1, Relaxed);
    }

    pub(crate) fn reset(&self) {
        self.resets.fetch_add(1, Relaxed);
    }

    pub(crate) fn set_vectors(&self, count: usize) {
        self.vectors.store(count as u64, Relaxed);
    }
}

/// How much of the guest's memory devices of the host reach now: all of it is locked.
#[derive(Debug, Default)]
pub struct Reached {
    bytes: AtomicU64,
    ranges: AtomicU64,
}

impl Reached {
    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Ranges, each of which is one mapping of the IOMMU.
    pub fn ranges(&self) -> u64 {
        self.ranges.load(Relaxed)
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        self.ranges.fetch_add(1, Relaxed);
    }

    pub(crate) fn remove(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.ranges.fetch_sub(1, Relaxed);
    }

    /// What `others` count is reached no more.
    pub(crate) fn subtract(&self, others: &Self) {
        self.bytes.fetch_sub(others.bytes(), Relaxed);
        self.ranges.fetch_sub(others.ranges(), Relaxed);
    }
}
