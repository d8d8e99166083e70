//! What a socket device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters, written by the device's thread only.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) rx_packets: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) tx_packets: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) dropped: Counter,
    pub(super) opened: Counter,
    pub(super) refused: Counter,
    pub(super) open: Counter,
}

#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: usize) {
        self.0.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub(super) fn set(&self, n: usize) {
        self.0.store(n as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(super) fn snapshot(&self) -> VsockStats {
        VsockStats {
            rx_packets: self.rx_packets.get(),
            rx_bytes: self.rx_bytes.get(),
            tx_packets: self.tx_packets.get(),
            tx_bytes: self.tx_bytes.get(),
            dropped: self.dropped.get(),
            opened: self.opened.get(),
            refused: self.refused.get(),
            open: self.open.get(),
        }
    }
}

/// What a socket device counted since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VsockStats {
    /// Packets to the guest.
    pub rx_packets: u64,
    /// Bytes of data in them.
    pub rx_bytes: u64,
    /// Packets from the guest.
    pub tx_packets: u64,
    /// Bytes of data in them.
    pub tx_bytes: u64,
    /// Packets from the guest that were malformed or not addressed to the host.
    pub dropped: u64,
    /// Connections that came about.
    pub opened: u64,
    /// Connections refused: nobody listens, or there are too many.
    pub refused: u64,
    /// Connections there are now, those being made among them.
    pub open: u64,
}
