//! The VM itself, its vCPUs, and the devices it has.

use super::super::text::Kind::{Counter, Gauge};
use super::super::text::Value::{Number, Time};
use super::{Entry, family};
use crate::Phase;

pub(super) const FAMILIES: &[Entry] = &[
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
];
