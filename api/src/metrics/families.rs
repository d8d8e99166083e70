//! Every metric there is, in one table: docs/metrics.md is checked against it.

use super::requests::STATUSES;
use super::text::Kind::{Counter, Gauge, Histogram};
use super::text::Value::{Number, Time};
use super::text::{Family, Kind, Samples};
use super::{DirectionMetrics, DiskQueueMetrics, Metrics, Requests};
use crate::Phase;

/// What the text is made from.
#[derive(Debug)]
pub struct Source<'a> {
    /// What the owner of the VM gathered.
    pub metrics: &'a Metrics,
    /// Where the VM is in its life.
    pub phase: Phase,
    /// Version of this program.
    pub version: &'a str,
    /// How clients were served.
    pub requests: &'a Requests,
}

/// The Prometheus text.
pub fn render(source: &Source<'_>) -> String {
    let mut output = String::new();
    for (family, fill) in FAMILIES {
        fill(source, &mut Samples::new(&mut output, *family));
    }
    output
}

type Fill = fn(&Source<'_>, &mut Samples<'_>);

const fn family(name: &'static str, kind: Kind, labels: &'static [&'static str], help: &'static str) -> Family {
    Family {
        name,
        kind,
        labels,
        help,
    }
}

/// Labels of what a queue of a disk counts.
const DISK: &[&str] = &["disk", "queue"];
/// Labels of what it counts by kind of operation.
const DISK_OPERATION: &[&str] = &["disk", "queue", "operation"];
/// Labels of what one direction of a queue pair counts.
const NIC: &[&str] = &["nic", "queue", "direction"];

pub(super) const FAMILIES: &[(Family, Fill)] = &[
    (
        family("triarch_build_info", Gauge, &["version"], "This program; always 1."),
        |s, out| out.add(&[&s.version], Number(1)),
    ),
    (
        family(
            "triarch_vm_state",
            Gauge,
            &["state"],
            "1 for the phase the VM is in, 0 for the others.",
        ),
        |s, out| {
            for phase in Phase::ALL {
                out.add(&[&phase.name()], Number(u64::from(phase == s.phase)));
            }
        },
    ),
    (
        family(
            "triarch_vcpus",
            Gauge,
            &["count"],
            "vCPUs the guest should have (target), was given (present), and has started (started).",
        ),
        |s, out| {
            if let Some(hotplug) = &s.metrics.hotplug {
                let counts = hotplug.counts;
                for (name, count) in [
                    ("target", counts.target),
                    ("present", counts.present),
                    ("started", counts.started),
                ] {
                    out.add(&[&name], Number(count.into()));
                }
            }
        },
    ),
    (
        family(
            "triarch_vcpu_changes_total",
            Counter,
            &["direction", "result"],
            "vCPUs that a running guest was given (add) or asked for (remove), by what came of it: done, refused, timeout, replaced, reset.",
        ),
        |s, out| {
            for (direction, result, count) in s.metrics.hotplug.iter().flat_map(|hotplug| &hotplug.changes) {
                out.add(&[direction, result], Number(*count));
            }
        },
    ),
    (
        family("triarch_devices", Gauge, &[], "PCI devices that the guest has."),
        |s, out| {
            if let Some(devices) = &s.metrics.devices {
                out.add(&[], Number(devices.count));
            }
        },
    ),
    (
        family(
            "triarch_interrupt_routes",
            Gauge,
            &[],
            "Interrupts by message that devices of the guest have, of the 3840 that KVM can route.",
        ),
        |s, out| {
            if let Some(count) = s.metrics.interrupts {
                out.add(&[], Number(count));
            }
        },
    ),
    (
        family(
            "triarch_device_changes_total",
            Counter,
            &["direction", "result"],
            "Devices that a running guest was given (add) or asked for (remove), by what came of it: done, refused, timeout, forced, reset, failed.",
        ),
        |s, out| {
            for (direction, result, count) in s.metrics.devices.iter().flat_map(|devices| &devices.changes) {
                out.add(&[direction, result], Number(*count));
            }
        },
    ),
    (
        family(
            "triarch_vcpu_seconds_total",
            Counter,
            &["vcpu", "mode"],
            "Time of the vCPU's thread in the VMM (user), in the host's kernel (system) and in the guest (guest).",
        ),
        |s, out| {
            for vcpu in &s.metrics.vcpus {
                let Some(times) = vcpu.times else { continue };
                for (mode, time) in [("user", times.user), ("system", times.system), ("guest", times.guest)] {
                    out.add(&[&vcpu.index, &mode], Time(time));
                }
            }
        },
    ),
    (
        family(
            "triarch_vcpu_wait_seconds_total",
            Counter,
            &["vcpu"],
            "Time the vCPU was ready to run while others had the host's CPU.",
        ),
        |s, out| {
            for vcpu in &s.metrics.vcpus {
                if let Some(wait) = vcpu.times.and_then(|times| times.wait) {
                    out.add(&[&vcpu.index], Time(wait));
                }
            }
        },
    ),
    (
        family(
            "triarch_vcpu_exits_total",
            Counter,
            &["vcpu", "reason"],
            "Times the vCPU left the guest for the VMM; what KVM handles in the kernel is not among them.",
        ),
        |s, out| {
            for vcpu in &s.metrics.vcpus {
                for (reason, count) in &vcpu.exits {
                    out.add(&[&vcpu.index, reason], Number(*count));
                }
            }
        },
    ),
    (
        family("triarch_memory_size_bytes", Gauge, &[], "RAM the guest has."),
        |s, out| {
            if let Some(memory) = s.metrics.memory {
                out.add(&[], Number(memory.size));
            }
        },
    ),
    (
        family(
            "triarch_memory_bytes",
            Gauge,
            &["count"],
            "RAM the guest should have (target), was given (present), and uses (taken), if it can change while the guest runs.",
        ),
        |s, out| {
            if let Some(hotplug) = &s.metrics.memory_hotplug {
                let counts = hotplug.counts;
                for (name, count) in [
                    ("target", counts.target),
                    ("present", counts.present),
                    ("taken", counts.taken),
                ] {
                    out.add(&[&name], Number(count));
                }
            }
        },
    ),
    (
        family(
            "triarch_memory_changes_total",
            Counter,
            &["direction", "result"],
            "Memory devices that a running guest was given (add) or asked for (remove), by what came of it: done, refused, timeout, replaced, reset.",
        ),
        |s, out| {
            for (direction, result, count) in s.metrics.memory_hotplug.iter().flat_map(|hotplug| &hotplug.changes) {
                out.add(&[direction, result], Number(*count));
            }
        },
    ),
    (
        family(
            "triarch_memory_resident_bytes",
            Gauge,
            &[],
            "Guest RAM that the host's memory holds; unless it is shared, with the VMM's own private memory.",
        ),
        |s, out| {
            if let Some(resident) = s.metrics.memory.and_then(|memory| memory.resident) {
                out.add(&[], Number(resident));
            }
        },
    ),
    (
        family(
            "triarch_memory_slots",
            Gauge,
            &[],
            "Memory slots of KVM that the guest's RAM is in.",
        ),
        |s, out| {
            if let Some(memory) = s.metrics.memory {
                out.add(&[], Number(memory.slots));
            }
        },
    ),
    (
        family(
            "triarch_balloon_bytes",
            Gauge,
            &["balloon", "of"],
            "What the host wants in the balloon (target), and what the guest has put in (size).",
        ),
        |s, out| {
            if let Some(balloon) = &s.metrics.balloon {
                out.add(&[&balloon.id, &"target"], Number(balloon.target));
                out.add(&[&balloon.id, &"size"], Number(balloon.size));
            }
        },
    ),
    (
        family(
            "triarch_balloon_bytes_total",
            Counter,
            &["balloon", "operation"],
            "Memory put in (inflate), taken out (deflate), reported as free (report), and given back to the host (discard).",
        ),
        |s, out| {
            if let Some(balloon) = &s.metrics.balloon {
                for (operation, bytes) in [
                    ("inflate", balloon.inflated),
                    ("deflate", balloon.deflated),
                    ("report", balloon.reported),
                    ("discard", balloon.discarded),
                ] {
                    out.add(&[&balloon.id, &operation], Number(bytes));
                }
            }
        },
    ),
    (
        family(
            "triarch_guest_memory_bytes",
            Gauge,
            &["kind"],
            "What the guest told last of its memory, by way of the balloon.",
        ),
        |s, out| {
            for (kind, bytes) in s.metrics.balloon.iter().flat_map(|balloon| &balloon.memory) {
                out.add(&[kind], Number(*bytes));
            }
        },
    ),
    (
        family(
            "triarch_guest_memory_events_total",
            Counter,
            &["kind"],
            "Events of the guest's memory management since its boot, by way of the balloon.",
        ),
        |s, out| {
            for (kind, count) in s.metrics.balloon.iter().flat_map(|balloon| &balloon.events) {
                out.add(&[kind], Number(*count));
            }
        },
    ),
    (
        family(
            "triarch_guest_memory_age_seconds",
            Gauge,
            &[],
            "How long ago the guest told that; looking at it asks the guest for the next.",
        ),
        |s, out| {
            if let Some(age) = s.metrics.balloon.as_ref().and_then(|balloon| balloon.age) {
                out.add(&[], Time(age));
            }
        },
    ),
    (
        family(
            "triarch_memory_device_bytes",
            Gauge,
            &["device", "of"],
            "What the host wants plugged (requested), what the guest has plugged (plugged), and what it can reach (reachable).",
        ),
        |s, out| {
            for memory in &s.metrics.memories {
                for (of, bytes) in [
                    ("requested", memory.requested),
                    ("plugged", memory.plugged),
                    ("reachable", memory.reachable),
                ] {
                    out.add(&[&memory.id, &of], Number(bytes));
                }
            }
        },
    ),
    (
        family(
            "triarch_memory_device_bytes_total",
            Counter,
            &["device", "operation"],
            "Memory that the guest plugged (plug) and unplugged (unplug).",
        ),
        |s, out| {
            for memory in &s.metrics.memories {
                out.add(&[&memory.id, &"plug"], Number(memory.plugged_total));
                out.add(&[&memory.id, &"unplug"], Number(memory.unplugged_total));
            }
        },
    ),
    (
        family(
            "triarch_memory_device_refused_total",
            Counter,
            &["device", "answer"],
            "Requests of the guest's driver that were answered with NACK, BUSY or ERROR.",
        ),
        |s, out| {
            for memory in &s.metrics.memories {
                for (answer, count) in &memory.refused {
                    out.add(&[&memory.id, answer], Number(*count));
                }
            }
        },
    ),
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

const RECEIVE: &str = "receive";
const TRANSMIT: &str = "transmit";

fn each_disk_queue(source: &Source<'_>, mut visit: impl FnMut(&str, &DiskQueueMetrics)) {
    for disk in &source.metrics.disks {
        disk.queues.iter().for_each(|queue| visit(&disk.id, queue));
    }
}

fn each_direction(source: &Source<'_>, out: &mut Samples<'_>, value: fn(&DirectionMetrics) -> u64) {
    for nic in &source.metrics.nics {
        for (number, pair) in nic.pairs.iter().enumerate() {
            out.add(&[&nic.id, &number, &RECEIVE], Number(value(&pair.receive)));
            out.add(&[&nic.id, &number, &TRANSMIT], Number(value(&pair.transmit)));
        }
    }
}
