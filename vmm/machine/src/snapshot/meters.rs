//! What came of snapshots and restores, since the process began.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use triarch_api::RestoreMode;
use triarch_api::metrics as api;
use triarch_device_core::metrics::Histogram;

use crate::metrics::latencies;

/// How many of a kind were done and how many failed, and how long those took that were done.
#[derive(Default)]
struct Counted {
    done: Histogram,
    failed: AtomicU64,
    bytes: AtomicU64,
}

/// What came of snapshots and restores.
#[derive(Default)]
pub(crate) struct SnapshotMeters {
    /// As a whole, and what was written.
    saved: [Counted; 2],
    restored: [Counted; 3],
}

const SAVED: [&str; 2] = ["whole", "incremental"];
const RESTORED: [&str; 3] = ["Copy", "Mapped", "OnDemand"];

impl Counted {
    fn count(&self, took: Duration, bytes: Option<u64>) {
        match bytes {
            Some(bytes) => {
                self.done.observe(took);
                self.bytes.fetch_add(bytes, Relaxed);
            }
            None => {
                self.failed.fetch_add(1, Relaxed);
            }
        }
    }

    fn read(&self, kind: &'static str) -> api::SnapshotMetrics {
        api::SnapshotMetrics {
            kind,
            failed: self.failed.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            done: latencies(self.done.read()),
        }
    }
}

impl SnapshotMeters {
    /// A snapshot took so long, and has so many `bytes` of memory; none if it failed.
    pub(super) fn saved(&self, incremental: bool, took: Duration, bytes: Option<u64>) {
        self.saved[usize::from(incremental)].count(took, bytes);
    }

    /// A restore took so long.
    pub(super) fn restored(&self, mode: RestoreMode, took: Duration, succeeded: bool) {
        self.restored[mode as usize].count(took, succeeded.then_some(0));
    }

    /// What was counted of snapshots.
    pub(crate) fn read_saved(&self) -> Vec<api::SnapshotMetrics> {
        let all = self.saved.iter().zip(SAVED);
        all.map(|(counted, kind)| counted.read(kind)).collect()
    }

    /// What was counted of restores.
    pub(crate) fn read_restored(&self) -> Vec<api::SnapshotMetrics> {
        let all = self.restored.iter().zip(RESTORED);
        all.map(|(counted, kind)| counted.read(kind)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_counted_as_what_it_was() {
        let meters = SnapshotMeters::default();
        meters.saved(true, Duration::from_millis(2), Some(4096));
        meters.saved(false, Duration::from_millis(2), None);
        let modes = [RestoreMode::Copy, RestoreMode::Mapped, RestoreMode::OnDemand];
        for (mode, name) in modes.into_iter().zip(RESTORED) {
            assert_eq!(format!("{mode:?}"), name);
            meters.restored(mode, Duration::from_millis(1), mode != RestoreMode::Mapped);
        }
        let told = |all: Vec<api::SnapshotMetrics>| {
            let one = |one: api::SnapshotMetrics| (one.kind, one.done.count(), one.failed, one.bytes);
            all.into_iter().map(one).collect::<Vec<_>>()
        };
        assert_eq!(
            told(meters.read_saved()),
            [("whole", 0, 1, 0), ("incremental", 1, 0, 4096)]
        );
        assert_eq!(
            told(meters.read_restored()),
            [("Copy", 1, 0, 0), ("Mapped", 0, 1, 0), ("OnDemand", 1, 0, 0)]
        );
    }
}
