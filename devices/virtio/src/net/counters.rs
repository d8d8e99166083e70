//! What a network device counts.

use std::sync::Arc;

use triarch_device_core::metrics::{Counter, Padded};

/// One direction of a queue pair. Only the pair's worker writes, so nothing here is contended.
#[derive(Debug, Default)]
pub(super) struct Direction {
    packets: Counter,
    bytes: Counter,
    dropped: Counter,
}

impl Direction {
    /// Counts a packet whose frame had `bytes` bytes.
    pub(super) fn passed(&self, bytes: usize) {
        self.packets.add(1);
        self.bytes.add(bytes as u64);
    }

    pub(super) fn dropped(&self) {
        self.dropped.add(1);
    }

    fn read(&self) -> DirectionStats {
        DirectionStats {
            packets: self.packets.get(),
            bytes: self.bytes.get(),
            dropped: self.dropped.get(),
        }
    }
}

/// Counters of a queue pair.
#[derive(Debug, Default)]
pub(super) struct PairCounters {
    pub(super) rx: Direction,
    pub(super) tx: Direction,
}

/// Counters of a network interface, apart for each queue pair. They can outlive the device that counts in them, and be given to the
/// next.
#[derive(Debug, Clone, Default)]
pub struct NetCounters(Vec<Arc<Padded<PairCounters>>>);

impl NetCounters {
    /// Counters for `pairs` queue pairs, all zero.
    pub fn new(pairs: usize) -> Self {
        let mut counters = Self::default();
        counters.extend_to(pairs);
        counters
    }

    /// Makes sure that there are some for `pairs` pairs.
    pub(super) fn extend_to(&mut self, pairs: usize) {
        self.0.resize_with(pairs.max(self.0.len()), Arc::default);
    }

    pub(super) fn pair(&self, number: usize) -> Option<&Arc<Padded<PairCounters>>> {
        self.0.get(number)
    }

    /// Counts what somebody else moved: packets and bytes of their frames, to the guest or from it, by one queue pair. One thread at a
    /// time may count for a direction of a pair.
    pub fn passed(&self, pair: usize, to_guest: bool, packets: u64, bytes: u64) {
        let Some(pair) = self.pair(pair) else {
            return;
        };
        let direction = if to_guest { &pair.rx } else { &pair.tx };
        direction.packets.add(packets);
        direction.bytes.add(bytes);
    }

    /// What each pair counted.
    pub fn read(&self) -> Vec<NetStats> {
        let read = |pair: &Arc<Padded<PairCounters>>| NetStats {
            rx: pair.rx.read(),
            tx: pair.tx.read(),
        };
        self.0.iter().map(read).collect()
    }
}

/// What went one way since the counters were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DirectionStats {
    /// Packets passed on.
    pub packets: u64,
    /// Bytes of their frames, without headers.
    pub bytes: u64,
    /// Packets lost: malformed, too large for the guest's buffers, or refused by the host.
    pub dropped: u64,
}

/// What a queue pair, or all of a device together, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetStats {
    /// From the host to the guest.
    pub rx: DirectionStats,
    /// From the guest to the host.
    pub tx: DirectionStats,
}

impl NetStats {
    /// Adds what `other` counted.
    pub fn add(&mut self, other: &Self) {
        for (sum, other) in [(&mut self.rx, &other.rx), (&mut self.tx, &other.tx)] {
            sum.packets += other.packets;
            sum.bytes += other.bytes;
            sum.dropped += other.dropped;
        }
    }
}
