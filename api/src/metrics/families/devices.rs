//! Disks, network interfaces, sockets, and the daemons that serve devices.

use super::super::text::Kind::{Counter, Gauge, Histogram};
use super::super::text::Samples;
use super::super::text::Value::Number;
use super::super::{DirectionMetrics, DiskQueueMetrics, HostDeviceMetrics};
use super::{Entry, Source, family};

/// Labels of what a queue of a disk counts.
const DISK: &[&str] = &["disk", "queue"];
/// Labels of what it counts by kind of operation.
const DISK_OPERATION: &[&str] = &["disk", "queue", "operation"];
/// Labels of what one direction of a queue pair counts.
const NIC: &[&str] = &["nic", "queue", "direction"];

pub(super) const FAMILIES: &[Entry] = &[
    (
        family(
            "triarch_disk_operations_total",
            Counter,
            DISK_OPERATION,
            "Operations that succeeded.",
        ),
        |s, out| {
            each_disk_queue(s, |disk, queue| {
                for (name, operation) in queue.operations() {
                    out.add(&[&disk, &queue.number, &name], Number(operation.count));
                }
            });
        },
    ),
    (
        family(
            "triarch_disk_bytes_total",
            Counter,
            DISK_OPERATION,
            "Bytes that operations which succeeded moved or affected.",
        ),
        |s, out| {
            each_disk_queue(s, |disk, queue| {
                let moving = queue.operations().into_iter().filter(|(name, _)| *name != "flush");
                for (name, operation) in moving {
                    out.add(&[&disk, &queue.number, &name], Number(operation.bytes));
                }
            });
        },
    ),
    (
        family(
            "triarch_disk_errors_total",
            Counter,
            DISK,
            "Operations that failed: the host had an error, or they do not fit the disk.",
        ),
        |s, out| each_disk_queue(s, |disk, queue| out.add(&[&disk, &queue.number], Number(queue.errors))),
    ),
    (
        family("triarch_disk_in_flight", Gauge, DISK, "Operations under way."),
        |s, out| {
            each_disk_queue(s, |disk, queue| {
                out.add(&[&disk, &queue.number], Number(queue.in_flight));
            });
        },
    ),
    (
        family(
            "triarch_disk_operation_seconds",
            Histogram,
            DISK_OPERATION,
            "How long operations that succeeded took, from their submission to their end.",
        ),
        |s, out| {
            each_disk_queue(s, |disk, queue| {
                for (name, operation) in queue.operations() {
                    out.histogram(&[&disk, &queue.number, &name], &operation.latency);
                }
            });
        },
    ),
    (
        family(
            "triarch_nic_packets_total",
            Counter,
            NIC,
            "Packets passed on to the guest (receive) or to the host (transmit).",
        ),
        |s, out| each_direction(s, out, |d| d.packets),
    ),
    (
        family("triarch_nic_bytes_total", Counter, NIC, "Bytes of their frames."),
        |s, out| each_direction(s, out, |d| d.bytes),
    ),
    (
        family(
            "triarch_nic_dropped_total",
            Counter,
            NIC,
            "Packets lost: malformed, too large for the guest's buffers, or refused by the host.",
        ),
        |s, out| each_direction(s, out, |d| d.dropped),
    ),
    (
        family(
            "triarch_vsock_packets_total",
            Counter,
            &["vsock", "direction"],
            "Packets to the guest (receive) and from it (transmit).",
        ),
        |s, out| {
            for vsock in &s.metrics.vsocks {
                out.add(&[&vsock.id, &RECEIVE], Number(vsock.receive.packets));
                out.add(&[&vsock.id, &TRANSMIT], Number(vsock.transmit.packets));
            }
        },
    ),
    (
        family(
            "triarch_vsock_bytes_total",
            Counter,
            &["vsock", "direction"],
            "Bytes of data in them.",
        ),
        |s, out| {
            for vsock in &s.metrics.vsocks {
                out.add(&[&vsock.id, &RECEIVE], Number(vsock.receive.bytes));
                out.add(&[&vsock.id, &TRANSMIT], Number(vsock.transmit.bytes));
            }
        },
    ),
    (
        family(
            "triarch_vsock_dropped_total",
            Counter,
            &["vsock"],
            "Packets from the guest that were malformed or not meant for the host.",
        ),
        |s, out| {
            for vsock in &s.metrics.vsocks {
                out.add(&[&vsock.id], Number(vsock.transmit.dropped));
            }
        },
    ),
    (
        family(
            "triarch_vsock_connections",
            Gauge,
            &["vsock"],
            "Streams there are, those being made among them.",
        ),
        |s, out| {
            for vsock in &s.metrics.vsocks {
                out.add(&[&vsock.id], Number(vsock.open));
            }
        },
    ),
    (
        family(
            "triarch_vsock_connections_total",
            Counter,
            &["vsock", "result"],
            "Streams that came about (opened) and that did not, as nobody listened or there were too many (refused).",
        ),
        |s, out| {
            for vsock in &s.metrics.vsocks {
                out.add(&[&vsock.id, &"opened"], Number(vsock.opened));
                out.add(&[&vsock.id, &"refused"], Number(vsock.refused));
            }
        },
    ),
    (
        family(
            "triarch_daemon_connected",
            Gauge,
            &["device"],
            "1 while a daemon serves the device, 0 while it has none (vhost-user).",
        ),
        |s, out| {
            for link in &s.metrics.links {
                out.add(&[&link.id], Number(link.connected.into()));
            }
        },
    ),
    (
        family(
            "triarch_daemon_reconnects_total",
            Counter,
            &["device"],
            "How often a daemon of the device came back.",
        ),
        |s, out| {
            for link in &s.metrics.links {
                out.add(&[&link.id], Number(link.reconnects));
            }
        },
    ),
    (
        family(
            "triarch_daemon_resubmitted_total",
            Counter,
            &["device"],
            "Requests that were given to a daemon again, because the one before did not answer them.",
        ),
        |s, out| {
            for link in &s.metrics.links {
                out.add(&[&link.id], Number(link.resubmitted));
            }
        },
    ),
    (
        family(
            "triarch_passthrough_memory_bytes",
            Gauge,
            &[],
            "Guest memory that devices of the host reach; all of it is locked.",
        ),
        |s, out| {
            if let Some(passthrough) = &s.metrics.passthrough {
                out.add(&[], Number(passthrough.memory));
            }
        },
    ),
    (
        family(
            "triarch_passthrough_memory_ranges",
            Gauge,
            &[],
            "Mappings of the host's IOMMU for that.",
        ),
        |s, out| {
            if let Some(passthrough) = &s.metrics.passthrough {
                out.add(&[], Number(passthrough.ranges));
            }
        },
    ),
    (
        family(
            "triarch_passthrough_interrupts",
            Gauge,
            &["device"],
            "Interrupts of the device of the host that ring the guest.",
        ),
        |s, out| each_host_device(s, |device| out.add(&[&device.id], Number(device.interrupts))),
    ),
    (
        family(
            "triarch_passthrough_register_accesses_total",
            Counter,
            &["device", "operation"],
            "Reads and writes of the device's registers that took the guest to the VMM; those of mapped pages do not.",
        ),
        |s, out| {
            each_host_device(s, |device| {
                out.add(&[&device.id, &"read"], Number(device.reads));
                out.add(&[&device.id, &"write"], Number(device.writes));
            });
        },
    ),
    (
        family(
            "triarch_passthrough_resets_total",
            Counter,
            &["device"],
            "Resets of the device of the host, the one with which the guest got it among them.",
        ),
        |s, out| each_host_device(s, |device| out.add(&[&device.id], Number(device.resets))),
    ),
];

const RECEIVE: &str = "receive";
const TRANSMIT: &str = "transmit";

fn each_disk_queue(source: &Source<'_>, mut visit: impl FnMut(&str, &DiskQueueMetrics)) {
    for disk in &source.metrics.disks {
        disk.queues.iter().for_each(|queue| visit(&disk.id, queue));
    }
}

fn each_host_device(source: &Source<'_>, visit: impl FnMut(&HostDeviceMetrics)) {
    let passthrough = source.metrics.passthrough.iter();
    passthrough.flat_map(|all| &all.devices).for_each(visit);
}

fn each_direction(source: &Source<'_>, out: &mut Samples<'_>, value: fn(&DirectionMetrics) -> u64) {
    for nic in &source.metrics.nics {
        for (number, pair) in nic.pairs.iter().enumerate() {
            out.add(&[&nic.id, &number, &RECEIVE], Number(value(&pair.receive)));
            out.add(&[&nic.id, &number, &TRANSMIT], Number(value(&pair.transmit)));
        }
    }
}
