//! `vm.counters`: figures of disks and network interfaces by the names Cloud Hypervisor's clients know, and of the balloon.

use std::collections::BTreeMap;

use super::{BalloonMetrics, DirectionMetrics, DiskMetrics, Metrics, NicMetrics, OperationMetrics};

type Counters = BTreeMap<&'static str, u64>;

/// Body of `vm.counters`: the counters of each device that has some, by the device's id.
pub fn counters(metrics: &Metrics) -> BTreeMap<&str, Counters> {
    let disks = metrics.disks.iter().map(|d| (d.id.as_str(), disk(d)));
    let nics = metrics.nics.iter().map(|n| (n.id.as_str(), nic(n)));
    let balloon = metrics.balloon.iter().map(|b| (b.id.as_str(), balloon(b)));
    disks.chain(nics).chain(balloon).collect()
}

fn balloon(balloon: &BalloonMetrics) -> Counters {
    Counters::from([
        ("target_bytes", balloon.target),
        ("actual_bytes", balloon.size),
        ("inflated_bytes", balloon.inflated),
        ("deflated_bytes", balloon.deflated),
        ("reported_bytes", balloon.reported),
        ("discarded_bytes", balloon.discarded),
    ])
}

fn disk(disk: &DiskMetrics) -> Counters {
    let mut counters = Counters::new();
    let [reads, writes] = [
        disk.queues.iter().map(|q| &q.reads).collect::<Vec<_>>(),
        disk.queues.iter().map(|q| &q.writes).collect(),
    ];
    operations(
        &mut counters,
        &reads,
        [
            "read_ops",
            "read_bytes",
            "read_latency_min",
            "read_latency_max",
            "read_latency_avg",
        ],
    );
    operations(
        &mut counters,
        &writes,
        [
            "write_ops",
            "write_bytes",
            "write_latency_min",
            "write_latency_max",
            "write_latency_avg",
        ],
    );
    counters
}

/// Latencies are microseconds, and 0 when there was no operation.
fn operations(counters: &mut Counters, queues: &[&OperationMetrics], names: [&'static str; 5]) {
    let used = || queues.iter().filter(|q| q.latency.count() > 0);
    let count: u64 = used().map(|q| q.latency.count()).sum();
    let sum: u128 = used().map(|q| u128::from(q.latency.sum)).sum();
    let average = sum.checked_div(count.into()).unwrap_or(0);
    let values = [
        queues.iter().map(|q| q.count).sum(),
        queues.iter().map(|q| q.bytes).sum(),
        used().map(|q| q.latency.min).min().unwrap_or(0) / 1000,
        used().map(|q| q.latency.max).max().unwrap_or(0) / 1000,
        u64::try_from(average / 1000).unwrap_or(u64::MAX),
    ];
    counters.extend(names.into_iter().zip(values));
}

fn nic(nic: &NicMetrics) -> Counters {
    let sum = |of: fn(&DirectionMetrics) -> u64, receive: bool| {
        let pairs = nic.pairs.iter();
        pairs.map(|p| of(if receive { &p.receive } else { &p.transmit })).sum()
    };
    Counters::from([
        ("rx_bytes", sum(|d| d.bytes, true)),
        ("rx_frames", sum(|d| d.packets, true)),
        ("tx_bytes", sum(|d| d.bytes, false)),
        ("tx_frames", sum(|d| d.packets, false)),
    ])
}
