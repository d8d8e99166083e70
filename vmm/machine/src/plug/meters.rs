//! What came of devices that were added and asked back.

use std::sync::atomic::{AtomicU64, Ordering};

use triarch_api::metrics::DeviceHotplugMetrics;

/// Which way a device goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The guest gets it.
    Add,
    /// It should give it back.
    Remove,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    Timeout,
    Forced,
    Reset,
    Failed,
}

const DIRECTIONS: [(Direction, &str); 2] = [(Direction::Add, "add"), (Direction::Remove, "remove")];
const RESULTS: [&str; 6] = ["done", "refused", "timeout", "forced", "reset", "failed"];

/// How many devices there are, and what came of changes.
#[derive(Default)]
pub(crate) struct PlugMeters {
    changes: [[AtomicU64; RESULTS.len()]; DIRECTIONS.len()],
}

impl PlugMeters {
    pub(super) fn count(&self, direction: Direction, outcome: Outcome) {
        self.changes[direction as usize][outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// All of it, of a guest with `count` devices.
    pub(crate) fn read(&self, count: u64) -> DeviceHotplugMetrics {
        let mut changes = Vec::new();
        for (direction, name) in DIRECTIONS {
            let counted = RESULTS.iter().zip(&self.changes[direction as usize]);
            changes.extend(counted.map(|(result, count)| (name, *result, count.load(Ordering::Relaxed))));
        }
        DeviceHotplugMetrics { count, changes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_has_a_name_of_its_own() {
        let meters = PlugMeters::default();
        meters.count(Direction::Add, Outcome::Failed);
        meters.count(Direction::Remove, Outcome::Forced);
        let metrics = meters.read(3);
        let counted: Vec<_> = metrics.changes.iter().filter(|(.., count)| *count != 0).collect();
        assert_eq!(counted, [&("add", "failed", 1), &("remove", "forced", 1)]);
        assert_eq!((metrics.count, metrics.changes.len()), (3, 12));
    }
}
