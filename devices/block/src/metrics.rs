//! Counters of one disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use triarch_device_core::metrics::{Counter, Gauge, Histogram, Latencies, Padded};

/// Counters of a [`Disk`](crate::Disk), apart for each of its queues. They outlive the disk for whoever still holds them, but keep
/// nothing else of it open.
#[derive(Debug, Default)]
pub struct DiskMetrics {
    /// Locked to make a queue and to read, never by operations.
    queues: Mutex<BTreeMap<u16, Arc<QueueMetrics>>>,
}

/// Counters of one queue.
pub(crate) type QueueMetrics = Padded<Counters>;

/// Written by the one thread that uses the queue.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    reads: Kind,
    writes: Kind,
    flushes: Kind,
    discards: Kind,
    write_zeroes: Kind,
    errors: Counter,
    in_flight: Gauge,
}

/// Counters of one kind of operation.
#[derive(Debug, Default)]
struct Kind {
    bytes: Counter,
    latency: Histogram,
}

impl Kind {
    fn read(&self) -> OpCounters {
        let latency = self.latency.read();
        OpCounters {
            count: latency.count(),
            bytes: self.bytes.get(),
            latency,
        }
    }
}

/// What an operation is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpKind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// Operations of one kind that completed without error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpCounters {
    /// How many.
    pub count: u64,
    /// Bytes they moved or affected.
    pub bytes: u64,
    /// How long they took, from submission to the end of their last step.
    pub latency: Latencies,
}

impl OpCounters {
    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.latency.add(&other.latency);
    }
}

/// Counters as plain numbers: those of a queue, or of all queues of a disk. They only grow, except `in_flight`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Reads.
    pub reads: OpCounters,
    /// Writes.
    pub writes: OpCounters,
    /// Flushes.
    pub flushes: OpCounters,
    /// Discards.
    pub discards: OpCounters,
    /// Write-zeroes operations.
    pub write_zeroes: OpCounters,
    /// Operations of any kind that failed.
    pub errors: u64,
    /// Operations submitted whose completion has not been handed out yet.
    pub in_flight: u64,
}

impl DiskCounters {
    /// Adds what `other` counted.
    pub fn add(&mut self, other: &Self) {
        self.reads.add(&other.reads);
        self.writes.add(&other.writes);
        self.flushes.add(&other.flushes);
        self.discards.add(&other.discards);
        self.write_zeroes.add(&other.write_zeroes);
        self.errors += other.errors;
        self.in_flight += other.in_flight;
    }
}

impl DiskMetrics {
    /// Counters of all queues together.
    pub fn read(&self) -> DiskCounters {
        let mut sum = DiskCounters::default();
        for (_, queue) in self.read_queues() {
            sum.add(&queue);
        }
        sum
    }

    /// Counters of each queue that was ever used, by its number.
    pub fn read_queues(&self) -> Vec<(u16, DiskCounters)> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.iter().map(|(number, queue)| (*number, queue.read())).collect()
    }

    /// The counters of queue `number`.
    pub(crate) fn queue(&self, number: u16) -> Arc<QueueMetrics> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.entry(number).or_default().clone()
    }
}

impl Counters {
    fn read(&self) -> DiskCounters {
        DiskCounters {
            reads: self.reads.read(),
            writes: self.writes.read(),
            flushes: self.flushes.read(),
            discards: self.discards.read(),
            write_zeroes: self.write_zeroes.read(),
            errors: self.errors.get(),
            in_flight: self.in_flight.get(),
        }
    }

    pub(crate) fn submitted(&self) {
        self.in_flight.up();
    }

    pub(crate) fn handed_out(&self) {
        self.in_flight.down();
    }

    pub(crate) fn failed(&self) {
        self.errors.add(1);
    }

    /// Counts an operation that affected `bytes` in `time`.
    pub(crate) fn completed(&self, kind: OpKind, bytes: u64, time: Duration) {
        let kind = match kind {
            OpKind::Read => &self.reads,
            OpKind::Write => &self.writes,
            OpKind::Flush => &self.flushes,
            OpKind::Discard => &self.discards,
            OpKind::WriteZeroes => &self.write_zeroes,
        };
        kind.bytes.add(bytes);
        kind.latency.observe(time);
    }
}
