//! A parser that is not ours reads the text: that of Prometheus' client for Python.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use triarch_api::Phase;
use triarch_api::metrics::{
    BalloonMetrics, CpuTimes, DirectionMetrics, DiskMetrics, DiskQueueMetrics, HostDeviceMetrics, Latencies,
    LinkMetrics, MemoryDeviceMetrics, MemoryMetrics, Metrics, NicMetrics, NicPairMetrics, OperationMetrics,
    PassthroughMetrics, ProcessMetrics, Requests, SnapshotMetrics, Source, VcpuMetrics, VsockMetrics, render,
};

/// Prints each family as `TYPE NAME SAMPLES`, and the value of one disk's label.
const SCRIPT: &str = r#"
import sys
from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    assert family.documentation, family.name
    print(family.type, family.name, len(family.samples))
    if family.name == "triarch_disk_errors":
        print(ascii(family.samples[0].labels["disk"]), family.samples[0].value)
"#;

/// Debian's package puts the parser where only Debian's interpreter finds it.
const PYTHON: &str = "/usr/bin/python3";

/// A device's name that needs every escape there is.
const ID: &str = "a\\n\"b\n=,{}é";

fn operation() -> OperationMetrics {
    OperationMetrics {
        count: 3,
        bytes: u64::MAX,
        latency: Latencies {
            bounds: &[10_000, 25_000],
            buckets: vec![1, 0, 2],
            sum: 7_000_000_001,
            min: 1,
            max: 5_000_000_000,
        },
    }
}

fn everything() -> Metrics {
    let direction = DirectionMetrics {
        packets: 1,
        bytes: 2,
        dropped: 3,
    };
    Metrics {
        vcpus: vec![VcpuMetrics {
            index: 0,
            times: Some(CpuTimes {
                user: 1,
                system: 20_000_000,
                guest: 3_000_000_000,
                wait: Some(4),
            }),
            exits: vec![("port_read", 9)],
        }],
        balloon: Some(BalloonMetrics::default()),
        interrupts: Some(6),
        memory: Some(MemoryMetrics {
            size: 1 << 40,
            resident: Some(1 << 39),
            slots: 3,
        }),
        memory_zones: Vec::new(),
        memories: vec![MemoryDeviceMetrics {
            id: ID.into(),
            plugged: u64::MAX,
            refused: vec![("nack", 1)],
            ..MemoryDeviceMetrics::default()
        }],
        disks: vec![DiskMetrics {
            id: ID.into(),
            queues: vec![DiskQueueMetrics {
                number: 0,
                reads: operation(),
                writes: operation(),
                flushes: operation(),
                discards: operation(),
                write_zeroes: operation(),
                errors: 42,
                in_flight: 1,
            }],
        }],
        nics: vec![NicMetrics {
            id: ID.into(),
            pairs: vec![NicPairMetrics {
                receive: direction,
                transmit: direction,
            }],
        }],
        hotplug: None,
        devices: None,
        memory_hotplug: None,
        links: vec![LinkMetrics {
            id: ID.into(),
            connected: false,
            reconnects: 1,
            resubmitted: 2,
        }],
        vsocks: vec![VsockMetrics {
            id: ID.into(),
            receive: direction,
            transmit: direction,
            open: 1,
            opened: 2,
            refused: 3,
        }],
        passthrough: Some(PassthroughMetrics {
            memory: 1 << 40,
            ranges: 2,
            devices: vec![HostDeviceMetrics {
                id: ID.into(),
                interrupts: 1,
                reads: 2,
                writes: u64::MAX,
                resets: 3,
            }],
        }),
        snapshots: vec![SnapshotMetrics {
            kind: "whole",
            failed: 1,
            bytes: 4096,
            done: operation().latency,
        }],
        restores: Vec::new(),
        process: Some(ProcessMetrics::default()),
    }
}

#[test]
fn a_parser_of_prometheus_reads_what_was_written() {
    let there = Command::new(PYTHON).args(["-c", "import prometheus_client"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: the parser (package python3-prometheus-client) is not installed");
        return;
    }
    let requests = Requests::default();
    requests.answered("vm.boot", 204, Duration::from_millis(9));
    let text = render(&Source {
        metrics: &everything(),
        phase: Phase::Paused,
        version: "1.0",
        requests: &requests,
    });
    let mut parser = Command::new(PYTHON)
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("an interpreter");
    parser
        .stdin
        .take()
        .expect("a pipe")
        .write_all(text.as_bytes())
        .expect("written");
    let output = parser.wait_with_output().expect("it ended");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}\n{text}");
    let said = String::from_utf8(output.stdout).expect("text");
    // The parser takes `_total` off the names of counters.
    let ours = |line: &str| line.strip_prefix("# TYPE ").map(str::to_owned);
    let families: Vec<String> = text.lines().filter_map(ours).collect();
    for family in &families {
        let (name, kind) = family.split_once(' ').expect("a type");
        let begin = format!("{kind} {} ", name.trim_end_matches("_total"));
        assert!(said.lines().any(|line| line.starts_with(&begin)), "{begin} in\n{said}");
    }
    let samples: usize = said
        .lines()
        .filter_map(|line| line.split(' ').nth(2)?.parse::<usize>().ok())
        .sum();
    let written = text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(samples, written, "{said}");
    assert!(said.contains("'a\\\\n\"b\\n=,{}\\xe9' 42.0"), "{said}");
}
