//! The text is taken apart again by rules of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::families::families;
use super::*;
use crate::Phase;

const BOUNDS: &[u64] = &[10_000, 1_000_000_000];

fn operation(count: u64) -> OperationMetrics {
    OperationMetrics {
        count,
        bytes: count * 512,
        latency: Latencies {
            bounds: BOUNDS,
            buckets: vec![count, 0, count / 2],
            sum: count * 1_500,
            min: 3_999,
            max: 20_000_000_000,
        },
    }
}

fn disk_queue(number: u16) -> DiskQueueMetrics {
    DiskQueueMetrics {
        number,
        reads: operation(4),
        writes: operation(2),
        flushes: operation(1),
        discards: operation(0),
        write_zeroes: operation(0),
        errors: 3,
        in_flight: 1,
    }
}

fn direction(packets: u64) -> DirectionMetrics {
    DirectionMetrics {
        packets,
        bytes: packets * 60,
        dropped: 1,
    }
}

fn saved(kind: &'static str) -> SnapshotMetrics {
    let done = operation(3).latency;
    SnapshotMetrics {
        kind,
        failed: 1,
        bytes: 4096,
        done,
    }
}

/// A VM that has everything, with devices called `id`.
fn full(id: &str) -> Metrics {
    let vcpu = |index, times| VcpuMetrics {
        index,
        times,
        exits: vec![("port_read", 7), ("halted", 0)],
    };
    let times = CpuTimes {
        user: 10_000_000,
        system: 0,
        guest: 61_000_000_001,
        wait: Some(5),
    };
    let pair = NicPairMetrics {
        receive: direction(1),
        transmit: direction(2),
    };
    Metrics {
        vcpus: vec![vcpu(0, Some(times)), vcpu(1, None)],
        hotplug: Some(CpuHotplugMetrics {
            counts: crate::VcpuCounts {
                target: 4,
                present: 3,
                started: 2,
            },
            changes: vec![("add", "done", 1), ("remove", "refused", 2)],
        }),
        devices: Some(DeviceHotplugMetrics {
            count: 5,
            changes: vec![("add", "done", 3), ("remove", "timeout", 4)],
        }),
        interrupts: Some(6),
        memory_hotplug: Some(MemoryHotplugMetrics {
            counts: crate::MemoryCounts {
                target: 3 << 30,
                present: 2 << 30,
                taken: 1 << 30,
            },
            changes: vec![("add", "done", 3), ("remove", "timeout", 1)],
        }),
        memory: Some(MemoryMetrics {
            size: 1 << 30,
            resident: Some(4096),
            slots: 2,
        }),
        balloon: Some(BalloonMetrics {
            id: id.into(),
            target: 8192,
            size: 4096,
            memory: vec![("free", 1), ("total", 2)],
            events: vec![("major_faults", 3)],
            age: Some(1_500_000_000),
            ..BalloonMetrics::default()
        }),
        memory_zones: vec![MemoryZoneMetrics {
            id: id.into(),
            target: 9,
            actual: 8,
        }],
        memories: vec![MemoryDeviceMetrics {
            id: id.into(),
            requested: 8192,
            plugged: 4096,
            reachable: 6,
            plugged_total: 7,
            unplugged_total: 8,
            refused: vec![("nack", 1), ("busy", 2)],
        }],
        disks: vec![DiskMetrics {
            id: id.into(),
            queues: vec![disk_queue(0), disk_queue(3)],
        }],
        nics: vec![NicMetrics {
            id: id.into(),
            pairs: vec![pair, pair],
        }],
        vsocks: vec![VsockMetrics {
            id: id.into(),
            receive: direction(5),
            transmit: direction(6),
            open: 1,
            opened: 2,
            refused: 3,
        }],
        links: vec![LinkMetrics {
            id: id.into(),
            connected: true,
            reconnects: 4,
            resubmitted: 5,
        }],
        passthrough: Some(PassthroughMetrics {
            memory: 1 << 30,
            ranges: 2,
            devices: vec![HostDeviceMetrics {
                id: id.into(),
                interrupts: 2,
                reads: 3,
                writes: 4,
                resets: 1,
            }],
        }),
        snapshots: vec![saved("whole")],
        restores: vec![saved("Mapped")],
        process: Some(ProcessMetrics {
            threads: 9,
            ..ProcessMetrics::default()
        }),
    }
}

fn text(metrics: &Metrics, requests: &Requests) -> String {
    render(&Source {
        metrics,
        phase: Phase::Running,
        version: "1.2.3",
        requests,
    })
}

fn some_requests() -> Requests {
    let requests = Requests::default();
    requests.answered("vm.info", 200, Duration::from_micros(20));
    requests.answered("vm.info", 404, Duration::from_micros(21));
    requests.answered("vm.boot", 500, Duration::from_secs(11));
    requests
}

type Labels = BTreeMap<String, String>;

/// A parsed text: type by family, and value by name and labels.
#[derive(Default)]
struct Parsed {
    types: BTreeMap<String, String>,
    samples: BTreeMap<(String, Labels), String>,
}

impl Parsed {
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<&str> {
        let labels = labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        self.samples.get(&(name.to_owned(), labels)).map(String::as_str)
    }
}

/// Takes a text apart. Panics at whatever a scraper would refuse: no help or type before the samples, families that are not in one
/// piece, the same sample twice, bad quoting.
fn parse(text: &str) -> Parsed {
    assert!(text.is_empty() || text.ends_with('\n'));
    let mut parsed = Parsed::default();
    let mut family = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').expect("help");
            assert!(!words.is_empty() && !words.contains('\\'), "{line}");
            let kind = lines.next().and_then(|l| l.strip_prefix("# TYPE ")).expect("a type");
            let (of, kind) = kind.split_once(' ').expect("a type");
            assert_eq!(of, name);
            assert!(["counter", "gauge", "histogram"].contains(&kind));
            let before = parsed.types.insert(name.into(), kind.into());
            assert!(before.is_none(), "{name} comes twice");
            family = name.into();
            continue;
        }
        let (name, labels, value) = sample(line);
        let suffix = name.strip_prefix(&family).expect("a sample of the family above it");
        let suffixes: &[&str] = match parsed.types[&family].as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        assert!(suffixes.contains(&suffix), "{line}");
        assert!(value.parse::<f64>().expect("a number") >= 0.0);
        let before = parsed.samples.insert((name, labels), value);
        assert!(before.is_none(), "the same sample twice: {line}");
    }
    parsed
}

fn sample(line: &str) -> (String, Labels, String) {
    let (name, rest) = line.split_at(line.find(['{', ' ']).expect("a name's end"));
    let mut labels = Labels::new();
    let mut chars = rest.chars().peekable();
    while matches!(chars.peek(), Some('{' | ',')) {
        chars.next();
        let label: String = chars.by_ref().take_while(|c| *c != '=').collect();
        assert!(label.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
        assert_eq!(chars.next(), Some('"'), "{line}");
        let mut value = String::new();
        loop {
            match chars.next().expect("a closing quote") {
                '"' => break,
                '\\' => value.push(match chars.next() {
                    Some('n') => '\n',
                    Some(c @ ('\\' | '"')) => c,
                    other => panic!("{other:?} escaped in {line}"),
                }),
                c => value.push(c),
            }
        }
        assert!(labels.insert(label, value).is_none(), "{line}");
    }
    if !labels.is_empty() {
        assert_eq!(chars.next(), Some('}'), "{line}");
    }
    assert_eq!(chars.next(), Some(' '), "{line}");
    (name.into(), labels, chars.collect())
}

#[test]
fn a_full_vm_has_every_family_and_each_sample_once() {
    let parsed = parse(&text(&full("_disk0"), &some_requests()));
    let names: BTreeSet<_> = parsed.types.keys().map(String::as_str).collect();
    let expected: BTreeSet<_> = families().map(|(family, _)| family.name).collect();
    assert_eq!(names, expected);
    assert_eq!(expected.len(), families().count(), "a name is used twice");
}

#[test]
fn values_are_where_they_belong() {
    let parsed = parse(&text(&full("_disk0"), &some_requests()));
    let vcpu = |mode| parsed.value("triarch_vcpu_seconds_total", &[("vcpu", "0"), ("mode", mode)]);
    assert_eq!(vcpu("guest"), Some("61.000000001"));
    assert_eq!(vcpu("user"), Some("0.01"));
    assert_eq!(vcpu("system"), Some("0"));
    assert_eq!(
        parsed.value("triarch_vcpu_wait_seconds_total", &[("vcpu", "0")]),
        Some("0.000000005")
    );
    assert_eq!(parsed.value("triarch_vcpu_wait_seconds_total", &[("vcpu", "1")]), None);
    assert_eq!(parsed.value("triarch_vm_state", &[("state", "Running")]), Some("1"));
    assert_eq!(parsed.value("triarch_vm_state", &[("state", "none")]), Some("0"));
    let read = [("disk", "_disk0"), ("queue", "3"), ("operation", "read")];
    assert_eq!(parsed.value("triarch_disk_operations_total", &read), Some("4"));
    assert_eq!(parsed.value("triarch_disk_bytes_total", &read), Some("2048"));
    let sent = [("nic", "_disk0"), ("queue", "1"), ("direction", "transmit")];
    assert_eq!(parsed.value("triarch_nic_bytes_total", &sent), Some("120"));
    let failed = [("route", "vm.info"), ("status", "4xx")];
    assert_eq!(parsed.value("triarch_api_requests_total", &failed), Some("1"));
    assert_eq!(parsed.value("triarch_process_threads", &[]), Some("9"));
    let of = |of| parsed.value("triarch_balloon_bytes", &[("balloon", "_disk0"), ("of", of)]);
    assert_eq!((of("target"), of("size")), (Some("8192"), Some("4096")));
    let kind = |kind| parsed.value("triarch_guest_memory_bytes", &[("kind", kind)]);
    assert_eq!((kind("free"), kind("total")), (Some("1"), Some("2")));
    assert_eq!(parsed.value("triarch_guest_memory_age_seconds", &[]), Some("1.5"));
}

#[test]
fn buckets_are_cumulative_and_empty_histograms_left_out() {
    let parsed = parse(&text(&full("d"), &some_requests()));
    let bucket = |operation, le| {
        let labels = [("disk", "d"), ("queue", "0"), ("operation", operation), ("le", le)];
        parsed.value("triarch_disk_operation_seconds_bucket", &labels)
    };
    let read = ["0.00001", "1", "+Inf"].map(|le| bucket("read", le));
    assert_eq!(read, [Some("4"), Some("4"), Some("6")]);
    let labels = [("disk", "d"), ("queue", "0"), ("operation", "read")];
    assert_eq!(parsed.value("triarch_disk_operation_seconds_count", &labels), Some("6"));
    assert_eq!(
        parsed.value("triarch_disk_operation_seconds_sum", &labels),
        Some("0.000006")
    );
    assert_eq!(bucket("discard", "+Inf"), None);
    // A duration that equals a bound belongs below it.
    let info = |le| {
        parsed.value(
            "triarch_api_request_seconds_bucket",
            &[("route", "vm.info"), ("le", le)],
        )
    };
    assert_eq!((info("0.00002"), info("0.00005")), (Some("1"), Some("2")));
    let boot = [("route", "vm.boot"), ("le", "10")];
    assert_eq!(parsed.value("triarch_api_request_seconds_bucket", &boot), Some("0"));
}

#[test]
fn nothing_at_all_is_a_text_too() {
    let parsed = parse(&text(&Metrics::default(), &Requests::default()));
    let names: Vec<_> = parsed.types.keys().map(String::as_str).collect();
    assert_eq!(names, ["triarch_build_info", "triarch_vm_state"]);
}

#[test]
fn every_name_tells_its_unit() {
    for (family, _) in families() {
        let name = family.name;
        assert!(name.starts_with("triarch_"), "{name}");
        assert_eq!(
            name.ends_with("_total"),
            family.kind == super::text::Kind::Counter,
            "{name}"
        );
        assert!(
            family.help.ends_with('.') && !family.help.contains(['\n', '\\']),
            "{name}"
        );
        assert!(!family.labels.contains(&"le"), "{name}");
    }
}

#[test]
fn the_documentation_has_every_metric() {
    let documentation = include_str!("../../../docs/metrics.md");
    let mut expected = String::from("| name | type | labels | meaning |\n|---|---|---|---|\n");
    for (family, _) in families() {
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, kind, help) = (family.name, family.kind.name(), family.help);
        expected += &format!("| `{name}` | {kind} | {} | {help} |\n", labels.join(" "));
    }
    assert!(
        documentation.contains(&expected),
        "docs/metrics.md does not have this table:\n{expected}"
    );
}

#[test]
fn counters_have_the_names_clients_know() {
    let mut metrics = full("_disk0");
    metrics.nics[0].id = "_net1".into();
    metrics.balloon.as_mut().expect("a balloon").id = "_balloon2".into();
    metrics.disks[0].queues[1].reads.latency.min = 1_999;
    let json = serde_json::to_value(counters(&metrics)).expect("JSON");
    let disk = serde_json::json!({
        "read_ops": 8, "read_bytes": 4096,
        "read_latency_min": 1, "read_latency_max": 20_000_000, "read_latency_avg": 1,
        "write_ops": 4, "write_bytes": 2048,
        "write_latency_min": 3, "write_latency_max": 20_000_000, "write_latency_avg": 1,
    });
    let net = serde_json::json!({ "rx_bytes": 120, "rx_frames": 2, "tx_bytes": 240, "tx_frames": 4 });
    let balloon = serde_json::json!({
        "target_bytes": 8192, "actual_bytes": 4096, "inflated_bytes": 0, "deflated_bytes": 0, "reported_bytes": 0, "discarded_bytes": 0,
    });
    assert_eq!(
        json,
        serde_json::json!({ "_disk0": disk, "_net1": net, "_balloon2": balloon })
    );
}

#[test]
fn counters_of_an_idle_disk_are_zero() {
    let mut metrics = full("d");
    metrics.disks[0].queues.clear();
    metrics.nics.clear();
    metrics.balloon = None;
    let json = counters(&metrics);
    assert_eq!(json["d"]["read_latency_min"], 0);
    assert!(Metrics::default().disks.is_empty() && counters(&Metrics::default()).is_empty());
}

proptest! {
    #[test]
    fn any_name_of_a_device_comes_back(id in any::<String>(), number: u64) {
        let mut metrics = full(&id);
        metrics.disks[0].queues[0].errors = number;
        let parsed = parse(&text(&metrics, &Requests::default()));
        let number = number.to_string();
        let errors = parsed.value("triarch_disk_errors_total", &[("disk", &id), ("queue", "0")]);
        prop_assert_eq!(errors, Some(number.as_str()));
    }

    #[test]
    fn any_time_comes_back(nanos: u64) {
        let mut metrics = full("d");
        metrics.vcpus[0].times = Some(CpuTimes { user: nanos, system: 0, guest: 0, wait: None });
        let parsed = parse(&text(&metrics, &Requests::default()));
        let text = parsed.value("triarch_vcpu_seconds_total", &[("vcpu", "0"), ("mode", "user")]).expect("a time");
        let (seconds, rest) = text.split_once('.').unwrap_or((text, ""));
        prop_assert!(!rest.ends_with('0'));
        let back: u64 = format!("{seconds}{rest:0<9}").parse().expect("a number");
        prop_assert_eq!(back, nanos);
    }

    #[test]
    fn any_request_is_counted_once(status in 100u16..1000, nanos: u64) {
        let requests = Requests::default();
        requests.answered("vm.info", status, Duration::from_nanos(nanos));
        let parsed = parse(&text(&Metrics::default(), &requests));
        let counted: Vec<_> = parsed.samples.iter().filter(|((n, _), _)| n == "triarch_api_requests_total").collect();
        prop_assert_eq!(counted.len(), 1);
        prop_assert_eq!(counted[0].1, "1");
    }
}
