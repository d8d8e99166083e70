//! Gathers what the parts of the guest and of the process count, on the thread of whoever asks. Nothing here waits for the controller,
//! a vCPU or a device; while the guest is built or ended, what there was before can still be read.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use arc_swap::ArcSwapOption;
use triarch_api::MemoryConfig;
use triarch_api::metrics as api;
use triarch_block::{DiskCounters, DiskMetrics, OpCounters};
use triarch_device_core::metrics::{BUCKET_BOUNDS, Latencies, Padded};
use triarch_vcpu::VcpuMetrics;
use triarch_vfio::{Counters, Reached};
use triarch_vhost_user::{LinkState, VhostUserHandle};
use triarch_virtio::balloon::BalloonHandle;
use triarch_virtio::mem::MemHandle;
use triarch_virtio::net::{DirectionStats, NetCounters};
use triarch_virtio::vsock::VsockHandle;

use crate::cpus::CpuMeters;
use crate::memory::MemoryMeters;
use crate::memory::plan::device_id;
use crate::plug::PlugMeters;
use crate::snapshot::SnapshotMeters;

/// What devices count, by their ids.
#[derive(Default)]
pub(crate) struct DeviceMeters {
    pub(crate) disks: Vec<(String, Arc<DiskMetrics>)>,
    pub(crate) nics: Vec<(String, NetCounters)>,
    pub(crate) vsocks: Vec<(String, VsockHandle)>,
    pub(crate) daemons: Vec<(String, VhostUserHandle)>,
    pub(crate) balloon: Option<(String, BalloonHandle)>,
    pub(crate) memories: Vec<(String, MemHandle)>,
    pub(crate) hosts: Vec<(String, Arc<Counters>)>,
}

/// What one guest counts. It holds counters only: a disk or tap is not kept open by it.
pub(crate) struct GuestMeters {
    pub(crate) memory: MemoryConfig,
    pub(crate) vcpus: Vec<Arc<Padded<VcpuMetrics>>>,
    pub(crate) cpus: Arc<CpuMeters>,
    pub(crate) ram: Arc<MemoryMeters>,
    /// What came of PCI devices, and how many there are.
    pub(crate) plug: (Arc<PlugMeters>, usize),
    pub(crate) devices: DeviceMeters,
    /// Interrupts by message that are handed out.
    pub(crate) interrupts: Arc<AtomicU64>,
    /// Memory slots of KVM.
    pub(crate) slots: Arc<AtomicU64>,
    /// What of its memory devices of the host reach.
    pub(crate) reached: Arc<Reached>,
}

/// What can be read at any time.
pub(crate) struct Meters {
    /// Opened before the first thread is confined; `None` without /proc.
    status: Option<File>,
    guest: ArcSwapOption<GuestMeters>,
    /// What came of snapshots and restores, of whatever guest.
    pub(crate) snapshots: SnapshotMeters,
}

impl Meters {
    /// Those of a process without a guest.
    pub(crate) fn new() -> Self {
        Self {
            status: File::open("/proc/self/status").ok(),
            guest: ArcSwapOption::empty(),
            snapshots: SnapshotMeters::default(),
        }
    }

    /// Shows this guest from now on, or none.
    pub(crate) fn show(&self, guest: Option<GuestMeters>) {
        self.guest.store(guest.map(Arc::new));
    }

    /// Reads everything.
    pub(crate) fn gather(&self) -> api::Metrics {
        let process = self.status.as_ref().and_then(read_status);
        let mut metrics = match self.guest.load_full() {
            Some(guest) => guest.gather(process.as_ref()),
            None => api::Metrics::default(),
        };
        metrics.process = process;
        metrics.snapshots = self.snapshots.read_saved();
        metrics.restores = self.snapshots.read_restored();
        metrics
    }
}

impl GuestMeters {
    fn gather(&self, process: Option<&api::ProcessMetrics>) -> api::Metrics {
        let devices = &self.devices;
        let ram = self.ram.read();
        api::Metrics {
            vcpus: self.vcpus.iter().enumerate().map(|(i, v)| vcpu(i, v)).collect(),
            hotplug: self
                .cpus
                .read()
                .map(|(counts, changes)| api::CpuHotplugMetrics { counts, changes }),
            interrupts: Some(self.interrupts.load(Relaxed)),
            devices: Some(api::DeviceHotplugMetrics {
                count: self.plug.1 as u64,
                changes: self.plug.0.changes(),
            }),
            memory: Some(api::MemoryMetrics {
                size: ram.as_ref().map_or(self.memory.boot_size(), |(counts, _)| counts.taken)
                    + devices.memories.iter().map(|(_, m)| m.plugged()).sum::<u64>(),
                resident: process.map(|process| resident(&self.memory, process)),
                slots: self.slots.load(Relaxed),
            }),
            memory_zones: zones(&self.memory, &devices.memories),
            memory_hotplug: ram.map(|(counts, changes)| api::MemoryHotplugMetrics { counts, changes }),
            balloon: devices.balloon.as_ref().map(|(id, b)| balloon(id, b)),
            memories: devices.memories.iter().map(|(id, m)| memory(id, m)).collect(),
            disks: devices.disks.iter().map(|(id, disk)| self::disk(id, disk)).collect(),
            nics: devices.nics.iter().map(|(id, nic)| self::nic(id, nic)).collect(),
            vsocks: devices.vsocks.iter().map(|(id, v)| vsock(id, v)).collect(),
            links: devices.daemons.iter().map(|(id, v)| link(id, v)).collect(),
            passthrough: Some(api::PassthroughMetrics {
                memory: self.reached.bytes(),
                ranges: self.reached.ranges(),
                devices: devices.hosts.iter().map(|(id, counters)| host(id, counters)).collect(),
            }),
            ..api::Metrics::default()
        }
    }
}

/// What of guest RAM is in the host's memory, as the kernel books it.
fn resident(memory: &MemoryConfig, process: &api::ProcessMetrics) -> u64 {
    let kind = |hugepages, shared| match (hugepages, shared) {
        (true, _) => 0,
        (false, true) => 1,
        (false, false) => 2,
    };
    let zones = memory
        .zones()
        .iter()
        .map(|zone| kind(zone.hugepages, memory.shared || zone.shared));
    let kinds: BTreeSet<usize> = match memory.zones() {
        [] => [kind(memory.hugepages, memory.shared)].into(),
        _ => zones.collect(),
    };
    let booked = [process.huge_pages, process.resident_shared, process.resident_anonymous];
    kinds.into_iter().filter_map(|kind| booked.get(kind)).sum()
}

/// How much each of the guest's zones has.
fn zones(memory: &MemoryConfig, devices: &[(String, MemHandle)]) -> Vec<api::MemoryZoneMetrics> {
    let zones = memory.zones().iter().map(|zone| {
        let name = device_id(&zone.id);
        let device = devices.iter().find(|(device, _)| *device == name);
        api::MemoryZoneMetrics {
            id: zone.id.clone(),
            target: zone.size + device.map_or(0, |(_, memory)| memory.requested()),
            actual: zone.size + device.map_or(0, |(_, memory)| memory.plugged()),
        }
    });
    zones.collect()
}

fn vcpu(index: usize, vcpu: &VcpuMetrics) -> api::VcpuMetrics {
    let times = vcpu.times().map(|times| api::CpuTimes {
        user: times.user,
        system: times.system,
        guest: times.guest,
        wait: times.wait,
    });
    api::VcpuMetrics {
        index,
        times,
        exits: vcpu.exits().to_vec(),
    }
}

fn balloon(id: &str, balloon: &BalloonHandle) -> api::BalloonMetrics {
    let counters = balloon.counters();
    let statistics = balloon.statistics();
    let told = statistics.as_ref();
    let age = |at: Instant| u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX);
    api::BalloonMetrics {
        id: id.to_owned(),
        target: balloon.target(),
        size: balloon.actual(),
        inflated: counters.inflated,
        deflated: counters.deflated,
        reported: counters.reported,
        discarded: counters.discarded,
        memory: told.map(|told| told.bytes().collect()).unwrap_or_default(),
        events: told.map(|told| told.events().collect()).unwrap_or_default(),
        age: told.map(|told| age(told.at)),
    }
}

fn memory(id: &str, memory: &MemHandle) -> api::MemoryDeviceMetrics {
    let counters = memory.counters();
    api::MemoryDeviceMetrics {
        id: id.to_owned(),
        requested: memory.requested(),
        plugged: memory.plugged(),
        reachable: memory.open(),
        plugged_total: counters.plugged,
        unplugged_total: counters.unplugged,
        refused: vec![
            ("nack", counters.nack),
            ("busy", counters.busy),
            ("error", counters.error),
        ],
    }
}

fn disk(id: &str, disk: &DiskMetrics) -> api::DiskMetrics {
    let queues = disk.read_queues().into_iter();
    api::DiskMetrics {
        id: id.to_owned(),
        queues: queues.map(|(number, counters)| disk_queue(number, &counters)).collect(),
    }
}

fn disk_queue(number: u16, counters: &DiskCounters) -> api::DiskQueueMetrics {
    api::DiskQueueMetrics {
        number,
        reads: operation(&counters.reads),
        writes: operation(&counters.writes),
        flushes: operation(&counters.flushes),
        discards: operation(&counters.discards),
        write_zeroes: operation(&counters.write_zeroes),
        errors: counters.errors,
        in_flight: counters.in_flight,
    }
}

fn operation(counters: &OpCounters) -> api::OperationMetrics {
    api::OperationMetrics {
        count: counters.count,
        bytes: counters.bytes,
        latency: latencies(counters.latency),
    }
}

/// A histogram as it is told.
pub(crate) fn latencies(read: Latencies) -> api::Latencies {
    let Latencies { buckets, sum, min, max } = read;
    api::Latencies {
        bounds: &BUCKET_BOUNDS,
        buckets: buckets.to_vec(),
        sum,
        min,
        max,
    }
}

fn nic(id: &str, counters: &NetCounters) -> api::NicMetrics {
    let pair = |pair: triarch_virtio::net::NetStats| api::NicPairMetrics {
        receive: direction(&pair.rx),
        transmit: direction(&pair.tx),
    };
    api::NicMetrics {
        id: id.to_owned(),
        pairs: counters.read().into_iter().map(pair).collect(),
    }
}

fn direction(stats: &DirectionStats) -> api::DirectionMetrics {
    api::DirectionMetrics {
        packets: stats.packets,
        bytes: stats.bytes,
        dropped: stats.dropped,
    }
}

fn host(id: &str, counters: &Counters) -> api::HostDeviceMetrics {
    let (reads, writes) = counters.accesses();
    api::HostDeviceMetrics {
        id: id.to_owned(),
        interrupts: counters.vectors(),
        reads,
        writes,
        resets: counters.resets(),
    }
}

fn link(id: &str, device: &VhostUserHandle) -> api::LinkMetrics {
    let status = device.status();
    api::LinkMetrics {
        id: id.to_owned(),
        connected: status.state == LinkState::Connected,
        reconnects: status.reconnects,
        resubmitted: status.resubmitted,
    }
}

fn vsock(id: &str, vsock: &VsockHandle) -> api::VsockMetrics {
    let stats = vsock.stats();
    api::VsockMetrics {
        id: id.to_owned(),
        receive: api::DirectionMetrics {
            packets: stats.rx_packets,
            bytes: stats.rx_bytes,
            dropped: 0,
        },
        transmit: api::DirectionMetrics {
            packets: stats.tx_packets,
            bytes: stats.tx_bytes,
            dropped: stats.dropped,
        },
        open: stats.open,
        opened: stats.opened,
        refused: stats.refused,
    }
}

/// Reads /proc/self/status: the kernel's own counters, no walk over page tables.
fn read_status(file: &File) -> Option<api::ProcessMetrics> {
    let mut buffer = [0; 8192];
    let len = file.read_at(&mut buffer, 0).ok()?;
    Some(parse_status(&String::from_utf8_lossy(buffer.get(..len)?)))
}

/// Fields of proc_pid_status(5); what the kernel does not tell is 0.
fn parse_status(text: &str) -> api::ProcessMetrics {
    let mut process = api::ProcessMetrics::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once(':')) {
        let field = match key {
            "Threads" => &mut process.threads,
            "RssAnon" => &mut process.resident_anonymous,
            "RssFile" => &mut process.resident_file,
            "RssShmem" => &mut process.resident_shared,
            "HugetlbPages" => &mut process.huge_pages,
            _ => continue,
        };
        let mut words = value.split_whitespace();
        let number: Option<u64> = words.next().and_then(|word| word.parse().ok());
        let unit = if words.next() == Some("kB") { 1024 } else { 1 };
        *field = number.unwrap_or(0).saturating_mul(unit);
    }
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_a_process_is_understood() {
        let text = "Name:\tRssAnon: 7\nVmRSS:\t 9 kB\nRssAnon:\t     300 kB\nRssFile:\t  2 kB\nRssShmem:\t 1 kB\n\
                    HugetlbPages:\t 2048 kB\nThreads:\t12\nSigQ:\t0/1\n";
        let expected = api::ProcessMetrics {
            threads: 12,
            resident_anonymous: 300 << 10,
            resident_file: 2 << 10,
            resident_shared: 1 << 10,
            huge_pages: 2 << 20,
        };
        assert_eq!(parse_status(text), expected);
        assert_eq!(parse_status("Threads:\nRssAnon: x kB"), api::ProcessMetrics::default());
    }

    #[test]
    fn resident_memory_is_where_the_guest_has_its_own() {
        let process = api::ProcessMetrics {
            resident_anonymous: 1,
            resident_shared: 2,
            huge_pages: 3,
            ..api::ProcessMetrics::default()
        };
        let memory = |shared, hugepages| MemoryConfig {
            shared,
            hugepages,
            ..MemoryConfig::default()
        };
        assert_eq!(resident(&memory(false, false), &process), 1);
        assert_eq!(resident(&memory(true, false), &process), 2);
        assert_eq!(resident(&memory(true, true), &process), 3);
    }

    #[test]
    fn this_process_has_memory_and_threads_and_no_guest() {
        let metrics = Meters::new().gather();
        let process = metrics.process.expect("/proc");
        assert!(process.threads >= 1 && process.resident_anonymous > 0);
        assert_eq!((metrics.memory, metrics.vcpus.len()), (None, 0));
    }

    #[test]
    fn a_guest_is_shown_until_it_is_gone() {
        let meters = Meters::new();
        let nics = vec![("n".to_owned(), NetCounters::new(2))];
        meters.show(Some(GuestMeters {
            memory: MemoryConfig {
                size: 5,
                ..MemoryConfig::default()
            },
            vcpus: vec![Arc::default()],
            cpus: Arc::default(),
            interrupts: Arc::default(),
            slots: Arc::default(),
            reached: Arc::default(),
            ram: Arc::default(),
            plug: (Arc::default(), 1),
            devices: DeviceMeters {
                disks: vec![("d".into(), Arc::default())],
                nics,
                vsocks: Vec::new(),
                daemons: Vec::new(),
                balloon: None,
                memories: Vec::new(),
                hosts: vec![("h".into(), Arc::default())],
            },
        }));
        let metrics = meters.gather();
        assert_eq!(metrics.memory.map(|memory| memory.size), Some(5));
        assert_eq!((metrics.vcpus.len(), metrics.vcpus[0].times), (1, None));
        let passthrough = metrics.passthrough.expect("there is a guest");
        assert_eq!((passthrough.memory, &passthrough.devices[0].id[..]), (0, "h"));
        assert_eq!((metrics.nics[0].pairs.len(), metrics.disks[0].queues.len()), (2, 0));
        meters.show(None);
        assert_eq!(meters.gather().memory, None);
    }
}
