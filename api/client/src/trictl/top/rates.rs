//! What happened between two looks at the counters.

use std::time::Instant;

use triarch_client::{Client, Error, Samples};

/// One look.
#[derive(Debug, Clone)]
pub(super) struct Shot {
    at: Instant,
    samples: Samples,
}

impl Shot {
    pub(super) fn take(client: &mut Client) -> Result<Self, Error> {
        let samples = client.metrics()?;
        let at = Instant::now();
        Ok(Self { at, samples })
    }
}

/// What the VM did in a second, on average.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Rates {
    pub(super) state: String,
    pub(super) cpus: Vec<Cpu>,
    /// Bytes that the guest has and that the host's memory holds.
    pub(super) memory: Option<(f64, Option<f64>)>,
    pub(super) disks: Vec<Disk>,
    pub(super) nics: Vec<Nic>,
}

/// A vCPU's time, in percent of one CPU.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Cpu {
    pub(super) name: String,
    pub(super) guest: f64,
    pub(super) user: f64,
    pub(super) system: f64,
    pub(super) wait: f64,
    /// Exits a second.
    pub(super) exits: f64,
}

impl Cpu {
    /// All that it ran.
    pub(super) fn total(&self) -> f64 {
        self.guest + self.user + self.system
    }
}

/// A disk, by second.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) reads: f64,
    pub(super) writes: f64,
    pub(super) read_bytes: f64,
    pub(super) written_bytes: f64,
    /// Seconds that a read took; `None`: there was none.
    pub(super) read_latency: Option<f64>,
    pub(super) write_latency: Option<f64>,
    /// Operations under way now.
    pub(super) in_flight: f64,
    /// Errors there ever were.
    pub(super) errors: f64,
}

/// A network interface, by second.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Nic {
    pub(super) name: String,
    pub(super) received: f64,
    pub(super) sent: f64,
    pub(super) received_bits: f64,
    pub(super) sent_bits: f64,
    /// Packets lost, of both directions.
    pub(super) dropped: f64,
}

/// Two looks and the time between them.
struct Pair<'a> {
    old: &'a Samples,
    new: &'a Samples,
    seconds: f64,
}

impl Pair<'_> {
    /// How much a counter has risen. One that began anew, at a boot, has risen from 0.
    fn rise(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let new = self.new.sum(name, labels).unwrap_or(0.0);
        let old = self.old.sum(name, labels).unwrap_or(0.0);
        if new < old { new } else { new - old }
    }

    fn rate(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        if self.seconds > 0.0 {
            self.rise(name, labels) / self.seconds
        } else {
            0.0
        }
    }

    fn now(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.new.sum(name, labels).unwrap_or(0.0)
    }

    fn cpu(&self, name: &str) -> Cpu {
        let vcpu = ("vcpu", name);
        let percent = |mode| 100.0 * self.rate("triarch_vcpu_seconds_total", &[vcpu, ("mode", mode)]);
        Cpu {
            name: name.to_owned(),
            guest: percent("guest"),
            user: percent("user"),
            system: percent("system"),
            wait: 100.0 * self.rate("triarch_vcpu_wait_seconds_total", &[vcpu]),
            exits: self.rate("triarch_vcpu_exits_total", &[vcpu]),
        }
    }

    fn disk(&self, name: &str) -> Disk {
        let of = |operation| [("disk", name), ("operation", operation)];
        let rate = |family, operation| self.rate(family, &of(operation));
        let latency = |operation| {
            let count = self.rise("triarch_disk_operation_seconds_count", &of(operation));
            let sum = self.rise("triarch_disk_operation_seconds_sum", &of(operation));
            (count > 0.0).then(|| sum / count)
        };
        Disk {
            name: name.to_owned(),
            reads: rate("triarch_disk_operations_total", "read"),
            writes: rate("triarch_disk_operations_total", "write"),
            read_bytes: rate("triarch_disk_bytes_total", "read"),
            written_bytes: rate("triarch_disk_bytes_total", "write"),
            read_latency: latency("read"),
            write_latency: latency("write"),
            in_flight: self.now("triarch_disk_in_flight", &[("disk", name)]),
            errors: self.now("triarch_disk_errors_total", &[("disk", name)]),
        }
    }

    fn nic(&self, name: &str) -> Nic {
        let rate = |family, direction| self.rate(family, &[("nic", name), ("direction", direction)]);
        Nic {
            name: name.to_owned(),
            received: rate("triarch_nic_packets_total", "receive"),
            sent: rate("triarch_nic_packets_total", "transmit"),
            received_bits: 8.0 * rate("triarch_nic_bytes_total", "receive"),
            sent_bits: 8.0 * rate("triarch_nic_bytes_total", "transmit"),
            dropped: self.rate("triarch_nic_dropped_total", &[("nic", name)]),
        }
    }
}

/// What happened between two looks.
pub(super) fn between(old: &Shot, new: &Shot) -> Rates {
    let seconds = new.at.saturating_duration_since(old.at).as_secs_f64();
    let pair = Pair {
        old: &old.samples,
        new: &new.samples,
        seconds,
    };
    let now = &new.samples;
    let states = now.named("triarch_vm_state").filter(|sample| sample.value == 1.0);
    let state = states.filter_map(|sample| sample.label("state")).next();
    // A vCPU's times are told by hosts that have them, its exits always.
    let cpus = now.values("triarch_vcpu_exits_total", "vcpu");
    Rates {
        state: state.unwrap_or("unknown").to_owned(),
        cpus: cpus.into_iter().map(|name| pair.cpu(name)).collect(),
        memory: now
            .sum("triarch_memory_size_bytes", &[])
            .map(|size| (size, now.sum("triarch_memory_resident_bytes", &[]))),
        disks: now
            .values("triarch_disk_in_flight", "disk")
            .into_iter()
            .map(|name| pair.disk(name))
            .collect(),
        nics: now
            .values("triarch_nic_packets_total", "nic")
            .into_iter()
            .map(|name| pair.nic(name))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shots(old: &str, new: &str) -> (Shot, Shot) {
        let at = Instant::now();
        let shot = |at, text| Shot {
            at,
            samples: Samples::parse(text),
        };
        (shot(at, old), shot(at + Duration::from_secs(2), new))
    }

    const OLD: &str = "\
triarch_vcpu_seconds_total{vcpu=\"0\",mode=\"guest\"} 1
triarch_vcpu_exits_total{vcpu=\"0\",reason=\"halted\"} 100
triarch_disk_operations_total{disk=\"d\",queue=\"0\",operation=\"read\"} 10
triarch_disk_operations_total{disk=\"d\",queue=\"1\",operation=\"read\"} 10
triarch_disk_operation_seconds_sum{disk=\"d\",queue=\"0\",operation=\"read\"} 1
triarch_disk_operation_seconds_count{disk=\"d\",queue=\"0\",operation=\"read\"} 20
triarch_nic_packets_total{nic=\"n\",queue=\"0\",direction=\"receive\"} 1000
triarch_nic_bytes_total{nic=\"n\",queue=\"0\",direction=\"receive\"} 0
";
    const NEW: &str = "\
triarch_vm_state{state=\"Created\"} 0
triarch_vm_state{state=\"Running\"} 1
triarch_vcpu_seconds_total{vcpu=\"0\",mode=\"guest\"} 2.5
triarch_vcpu_seconds_total{vcpu=\"0\",mode=\"user\"} 0.25
triarch_vcpu_seconds_total{vcpu=\"0\",mode=\"system\"} 0.05
triarch_vcpu_wait_seconds_total{vcpu=\"0\"} 0.5
triarch_vcpu_exits_total{vcpu=\"0\",reason=\"halted\"} 150
triarch_vcpu_exits_total{vcpu=\"0\",reason=\"mmio_read\"} 50
triarch_memory_size_bytes 1048576
triarch_memory_resident_bytes 524288
triarch_disk_operations_total{disk=\"d\",queue=\"0\",operation=\"read\"} 30
triarch_disk_operations_total{disk=\"d\",queue=\"1\",operation=\"read\"} 10
triarch_disk_bytes_total{disk=\"d\",queue=\"0\",operation=\"write\"} 4096
triarch_disk_in_flight{disk=\"d\",queue=\"0\"} 2
triarch_disk_in_flight{disk=\"d\",queue=\"1\"} 1
triarch_disk_operation_seconds_sum{disk=\"d\",queue=\"0\",operation=\"read\"} 1.5
triarch_disk_operation_seconds_count{disk=\"d\",queue=\"0\",operation=\"read\"} 30
triarch_nic_packets_total{nic=\"n\",queue=\"0\",direction=\"receive\"} 10
triarch_nic_bytes_total{nic=\"n\",queue=\"0\",direction=\"receive\"} 1000
";

    #[test]
    fn rates_are_what_counters_rose_by_second() {
        let (old, new) = shots(OLD, NEW);
        let rates = between(&old, &new);
        assert_eq!(rates.state, "Running");
        let cpu = &rates.cpus[0];
        let all = [cpu.guest, cpu.user, cpu.system, cpu.wait, cpu.exits, cpu.total()];
        assert_eq!(
            all.map(|value| (value * 10.0).round() / 10.0),
            [75.0, 12.5, 2.5, 25.0, 50.0, 90.0]
        );
        assert_eq!(rates.memory, Some((1048576.0, Some(524288.0))));
        let disk = &rates.disks[0];
        assert_eq!((disk.reads, disk.written_bytes, disk.in_flight), (10.0, 2048.0, 3.0));
        assert_eq!((disk.read_latency, disk.write_latency), (Some(0.05), None));
        // The guest was booted again in between.
        assert_eq!((rates.nics[0].received, rates.nics[0].received_bits), (5.0, 4000.0));
    }

    #[test]
    fn a_vmm_without_a_guest_has_no_rates() {
        let (old, new) = shots("", "triarch_vm_state{state=\"none\"} 1\n");
        let rates = between(&old, &new);
        assert_eq!(rates.state, "none");
        assert!(rates.cpus.is_empty() && rates.disks.is_empty() && rates.memory.is_none());
        let zero = between(&new, &new);
        assert_eq!(zero.state, "none");
    }
}
