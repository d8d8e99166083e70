//! Counters of one disk.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters that hang on a [`Disk`](crate::Disk) and are updated by all its queues. They only grow,
/// except `in_flight`. Each is exact by itself; together they are not one instant's picture.
#[derive(Debug, Default)]
pub struct DiskMetrics {
    pub(crate) reads: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) write_bytes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) discard_bytes: AtomicU64,
    pub(crate) write_zeroes: AtomicU64,
    pub(crate) write_zeroes_bytes: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) in_flight: AtomicU64,
}

/// The values of [`DiskMetrics`] as plain numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Reads completed without error.
    pub reads: u64,
    /// Bytes of those reads.
    pub read_bytes: u64,
    /// Writes completed without error.
    pub writes: u64,
    /// Bytes of those writes.
    pub write_bytes: u64,
    /// Flushes completed without error.
    pub flushes: u64,
    /// Discards completed without error.
    pub discards: u64,
    /// Bytes of those discards.
    pub discard_bytes: u64,
    /// Write-zeroes operations completed without error.
    pub write_zeroes: u64,
    /// Bytes of those write-zeroes operations.
    pub write_zeroes_bytes: u64,
    /// Operations of any kind that failed.
    pub errors: u64,
    /// Operations submitted whose completion has not been handed out yet.
    pub in_flight: u64,
}

impl DiskMetrics {
    /// Reads all counters.
    pub fn read(&self) -> DiskCounters {
        DiskCounters {
            reads: self.reads.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            writes: self.writes.load(Relaxed),
            write_bytes: self.write_bytes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            discards: self.discards.load(Relaxed),
            discard_bytes: self.discard_bytes.load(Relaxed),
            write_zeroes: self.write_zeroes.load(Relaxed),
            write_zeroes_bytes: self.write_zeroes_bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
            in_flight: self.in_flight.load(Relaxed),
        }
    }

    pub(crate) fn submitted(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    pub(crate) fn handed_out(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    pub(crate) fn count(&self, operations: &AtomicU64, volume: Option<&AtomicU64>, bytes: u64) {
        operations.fetch_add(1, Relaxed);
        if let Some(volume) = volume {
            volume.fetch_add(bytes, Relaxed);
        }
    }
}
