//! What the exports did, for Prometheus.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use triarch_api::metrics::{Family, Kind, Samples, Value};
use triarch_block::{DiskCounters, OpCounters};

use crate::Export;

const EXPORT: &[&str] = &["export"];
const OPERATION: &[&str] = &["export", "queue", "operation"];

const fn family(name: &'static str, kind: Kind, labels: &'static [&'static str], help: &'static str) -> Family {
    Family {
        name,
        kind,
        labels,
        help,
    }
}

const OPERATIONS: Family = family(
    "triarch_blkd_operations_total",
    Kind::Counter,
    OPERATION,
    "Operations that were done.",
);
const BYTES: Family = family(
    "triarch_blkd_bytes_total",
    Kind::Counter,
    OPERATION,
    "Bytes that operations moved or affected.",
);
const ERRORS: Family = family(
    "triarch_blkd_errors_total",
    Kind::Counter,
    EXPORT,
    "Operations that failed.",
);
const IN_FLIGHT: Family = family(
    "triarch_blkd_in_flight",
    Kind::Gauge,
    EXPORT,
    "Operations that were begun and not finished.",
);
const HELD_BACK: Family = family(
    "triarch_blkd_held_back_total",
    Kind::Counter,
    EXPORT,
    "Operations that had to wait for the export's limits.",
);
const SIZE: Family = family("triarch_blkd_size_bytes", Kind::Gauge, EXPORT, "Size of the disk.");
const CONNECTED: Family = family(
    "triarch_blkd_connected",
    Kind::Gauge,
    EXPORT,
    "Whether a front end is connected.",
);
const CONNECTIONS: Family = family(
    "triarch_blkd_connections_total",
    Kind::Counter,
    EXPORT,
    "Connections that were served.",
);
const REFUSED: Family = family(
    "triarch_blkd_refused_total",
    Kind::Counter,
    EXPORT,
    "Connections that were refused, since there was one.",
);
const BROKEN: Family = family(
    "triarch_blkd_broken_total",
    Kind::Counter,
    EXPORT,
    "Connections that ended because of what the front end sent.",
);
const RESUBMITTED: Family = family(
    "triarch_blkd_resubmitted_total",
    Kind::Counter,
    EXPORT,
    "Requests that an earlier process had not finished, done again.",
);
const POLLS: Family = family(
    "triarch_blkd_polls_total",
    Kind::Counter,
    &["export", "outcome"],
    "Times that a queue of an export with poll_us looked for work before it slept.",
);

/// The text for a scrape.
pub(crate) fn render(exports: &[Arc<Export>]) -> String {
    let mut text = String::new();
    let queues: Vec<_> = exports
        .iter()
        .flat_map(|export| {
            let queues = export.handle().disk().counters().read_queues();
            queues
                .into_iter()
                .map(move |(number, counters)| (export, number, counters))
        })
        .collect();
    for (family, value) in [
        (OPERATIONS, (|counters| counters.count) as fn(&OpCounters) -> u64),
        (BYTES, |counters| counters.bytes),
    ] {
        let mut samples = Samples::new(&mut text, family);
        for (export, number, counters) in &queues {
            let name = export.name();
            for (operation, counters) in operations(counters) {
                samples.add(
                    &[&name as &dyn Display, number, &operation],
                    Value::Number(value(counters)),
                );
            }
        }
    }
    let get = |counter: &AtomicU64| counter.load(Relaxed);
    let mut each = |family, value: &dyn Fn(&Export) -> u64| {
        let mut samples = Samples::new(&mut text, family);
        for export in exports {
            samples.add(&[&export.name()], Value::Number(value(export)));
        }
    };
    each(ERRORS, &|export| export.handle().counters().errors);
    each(IN_FLIGHT, &|export| export.handle().counters().in_flight);
    each(HELD_BACK, &|export| export.handle().disk().held_back());
    each(SIZE, &|export| export.handle().disk().size());
    each(CONNECTED, &|export| export.connected().into());
    each(CONNECTIONS, &|export| get(&export.counters().connections));
    each(REFUSED, &|export| get(&export.counters().refused));
    each(BROKEN, &|export| get(&export.counters().broken));
    each(RESUBMITTED, &|export| get(&export.counters().resubmitted));
    let mut samples = Samples::new(&mut text, POLLS);
    for export in exports {
        let looks = export.handle().looks();
        for (outcome, count) in [("found", looks.found), ("vain", looks.vain)] {
            samples.add(&[&export.name(), &outcome], Value::Number(count));
        }
    }
    text
}

fn operations(counters: &DiskCounters) -> [(&'static str, &OpCounters); 5] {
    [
        ("read", &counters.reads),
        ("write", &counters.writes),
        ("flush", &counters.flushes),
        ("discard", &counters.discards),
        ("write_zeroes", &counters.write_zeroes),
    ]
}
