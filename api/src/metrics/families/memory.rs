//! Guest memory, and the devices that give and take it.

use super::super::text::Kind::{Counter, Gauge};
use super::super::text::Value::{Number, Time};
use super::{Entry, family};

pub(super) const FAMILIES: &[Entry] = &[
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
            "triarch_memory_zone_bytes",
            Gauge,
            &["zone", "of"],
            "RAM of each memory zone: what the guest should have there (target), and what it has (actual).",
        ),
        |s, out| {
            for zone in &s.metrics.memory_zones {
                out.add(&[&zone.id, &"target"], Number(zone.target));
                out.add(&[&zone.id, &"actual"], Number(zone.actual));
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
];
