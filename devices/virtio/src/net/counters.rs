//! What a network device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// One direction of a queue pair. Only the pair's worker writes, so nothing here is contended.
#[derive(Default)]
pub(super) struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

impl Direction {
    /// Counts a packet whose frame had `bytes` bytes.
    pub(super) fn passed(&self, bytes: usize) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn add_to(&self, sum: &mut DirectionStats) {
        sum.packets += self.packets.load(Ordering::Relaxed);
        sum.bytes += self.bytes.load(Ordering::Relaxed);
        sum.dropped += self.dropped.load(Ordering::Relaxed);
    }
}

/// Counters of a queue pair.
#[derive(Default)]
pub(super) struct PairCounters {
    pub(super) rx: Direction,
    pub(super) tx: Direction,
}

impl PairCounters {
    pub(super) fn add_to(&self, sum: &mut NetStats) {
        self.rx.add_to(&mut sum.rx);
        self.tx.add_to(&mut sum.tx);
    }
}

/// What went one way since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DirectionStats {
    /// Packets passed on.
    pub packets: u64,
    /// Bytes of their frames, without headers.
    pub bytes: u64,
    /// Packets lost: malformed, too large for the guest's buffers, or refused by the host.
    pub dropped: u64,
}

/// What a network device counted since it was made, over all its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetStats {
    /// From the host to the guest.
    pub rx: DirectionStats,
    /// From the guest to the host.
    pub tx: DirectionStats,
}
