//! The API and the process of the VMM.

use super::super::requests::STATUSES;
use super::super::text::Kind::{Counter, Gauge, Histogram};
use super::super::text::Value::Number;
use super::{Entry, family};

pub(super) const FAMILIES: &[Entry] = &[
    (
        family(
            "triarch_api_requests_total",
            Counter,
            &["route", "status"],
            "Requests answered, by the first digit of the status; `other` are paths the API does not have.",
        ),
        |s, out| {
            for (route, metrics) in s.requests.read() {
                for (status, count) in STATUSES.iter().zip(metrics.statuses) {
                    if count > 0 {
                        out.add(&[&route, status], Number(count));
                    }
                }
            }
        },
    ),
    (
        family(
            "triarch_api_request_seconds",
            Histogram,
            &["route"],
            "Time from a whole request to its answer.",
        ),
        |s, out| {
            for (route, metrics) in s.requests.read() {
                out.histogram(&[&route], &metrics.latency);
            }
        },
    ),
    (
        family(
            "triarch_process_resident_bytes",
            Gauge,
            &["kind"],
            "Memory of the process that the host's memory holds, guest RAM included: anonymous, file (the program), shared, huge_pages.",
        ),
        |s, out| {
            if let Some(process) = s.metrics.process {
                for (kind, bytes) in [
                    ("anonymous", process.resident_anonymous),
                    ("file", process.resident_file),
                    ("shared", process.resident_shared),
                    ("huge_pages", process.huge_pages),
                ] {
                    out.add(&[&kind], Number(bytes));
                }
            }
        },
    ),
    (
        family("triarch_process_threads", Gauge, &[], "Threads of the process."),
        |s, out| {
            if let Some(process) = s.metrics.process {
                out.add(&[], Number(process.threads));
            }
        },
    ),
];
