//! Snapshots and restores.

use super::super::text::Kind::{Counter, Histogram};
use super::super::text::Value::Number;
use super::{Entry, family};

pub(super) const FAMILIES: &[Entry] = &[
    (
        family(
            "triarch_snapshots_total",
            Counter,
            &["kind", "result"],
            "Snapshots of all of the VM (whole) and of what was written since another one (incremental), by what came of them: done, failed.",
        ),
        |s, out| {
            for one in &s.metrics.snapshots {
                out.add(&[&one.kind, &"done"], Number(one.done.count()));
                out.add(&[&one.kind, &"failed"], Number(one.failed));
            }
        },
    ),
    (
        family(
            "triarch_snapshot_seconds",
            Histogram,
            &["kind"],
            "For how long snapshots were written, while the guest stood still.",
        ),
        |s, out| {
            for one in &s.metrics.snapshots {
                out.histogram(&[&one.kind], &one.done);
            }
        },
    ),
    (
        family(
            "triarch_snapshot_memory_bytes_total",
            Counter,
            &["kind"],
            "Memory that was written into snapshots: pages of zeroes are not.",
        ),
        |s, out| {
            for one in &s.metrics.snapshots {
                out.add(&[&one.kind], Number(one.bytes));
            }
        },
    ),
    (
        family(
            "triarch_restores_total",
            Counter,
            &["mode", "result"],
            "Restores by how memory came back, and by what came of them: done, failed.",
        ),
        |s, out| {
            for one in &s.metrics.restores {
                out.add(&[&one.kind, &"done"], Number(one.done.count()));
                out.add(&[&one.kind, &"failed"], Number(one.failed));
            }
        },
    ),
    (
        family(
            "triarch_restore_seconds",
            Histogram,
            &["mode"],
            "How long restores took until the guest could go on.",
        ),
        |s, out| {
            for one in &s.metrics.restores {
                out.histogram(&[&one.kind], &one.done);
            }
        },
    ),
];
