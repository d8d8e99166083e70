//! Figures of the VM and of the VMM, and the two forms clients get them in: Prometheus text and the counters of Cloud Hypervisor's
//! API.
//!
//! A [`Handler`](crate::Handler) gathers [`Metrics`]; everything here is plain data and functions of it.

mod counters;
mod families;
mod requests;
mod text;

#[cfg(test)]
mod tests;

pub use counters::counters;
pub use families::{Source, render};
pub use requests::Requests;
pub use text::{CONTENT_TYPE, Family, Kind, Samples, Value};

/// What was counted, read at about one time. All durations are nanoseconds. What there is no VM for is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metrics {
    /// The vCPUs.
    pub vcpus: Vec<VcpuMetrics>,
    /// How many of them the guest has, and what came of resizes.
    pub hotplug: Option<CpuHotplugMetrics>,
    /// How many PCI devices the guest has, and what came of those that were added and asked back.
    pub devices: Option<DeviceHotplugMetrics>,
    /// Interrupts by message that are handed out to devices.
    pub interrupts: Option<u64>,
    /// Guest memory.
    pub memory: Option<MemoryMetrics>,
    /// How it changed, if it can.
    pub memory_hotplug: Option<MemoryHotplugMetrics>,
    /// The memory balloon.
    pub balloon: Option<BalloonMetrics>,
    /// Memory devices.
    pub memories: Vec<MemoryDeviceMetrics>,
    /// The zones that memory consists of.
    pub memory_zones: Vec<MemoryZoneMetrics>,
    /// The disks.
    pub disks: Vec<DiskMetrics>,
    /// The network interfaces.
    pub nics: Vec<NicMetrics>,
    /// The socket devices.
    pub vsocks: Vec<VsockMetrics>,
    /// Devices that daemons serve.
    pub links: Vec<LinkMetrics>,
    /// Devices of the host.
    pub passthrough: Option<PassthroughMetrics>,
    /// Snapshots, since the process began.
    pub snapshots: Vec<SnapshotMetrics>,
    /// Restores, since the process began.
    pub restores: Vec<SnapshotMetrics>,
    /// This process.
    pub process: Option<ProcessMetrics>,
}

/// Snapshots or restores of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMetrics {
    /// The kind.
    pub kind: &'static str,
    /// How many failed.
    pub failed: u64,
    /// Bytes of memory in those that were done.
    pub bytes: u64,
    /// How long those took that were done.
    pub done: Latencies,
}

/// How many vCPUs the guest has, and what came of resizes since the VM was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuHotplugMetrics {
    /// How many it has.
    pub counts: crate::VcpuCounts,
    /// vCPUs that came or went while it ran, or should have: direction, what came of it, how many.
    pub changes: Vec<(&'static str, &'static str, u64)>,
}

/// How many PCI devices the guest has, and what came of those that came or went while a guest ran, since the VM was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceHotplugMetrics {
    /// How many it has.
    pub count: u64,
    /// Devices that came or went while it ran, or should have: direction, what came of it, how many.
    pub changes: Vec<(&'static str, &'static str, u64)>,
}

/// How much memory the guest has, and what came of resizes since the VM was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryHotplugMetrics {
    /// How much it has.
    pub counts: crate::MemoryCounts,
    /// Memory devices that came or went while it ran, or should have: direction, what came of it, how many.
    pub changes: Vec<(&'static str, &'static str, u64)>,
}

/// A device that a daemon serves, since the boot or reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkMetrics {
    /// Its id.
    pub id: String,
    /// It has a daemon now.
    pub connected: bool,
    /// How often a daemon came back.
    pub reconnects: u64,
    /// Requests that were given to a daemon again.
    pub resubmitted: u64,
}

/// One vCPU since its thread started: at boot, and anew at each reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuMetrics {
    /// Its index.
    pub index: usize,
    /// Where its thread's time went, if the host tells.
    pub times: Option<CpuTimes>,
    /// How often it left the guest for the VMM, by reason.
    pub exits: Vec<(&'static str, u64)>,
}

/// Where a thread's time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTimes {
    /// In the VMM.
    pub user: u64,
    /// In the host's kernel.
    pub system: u64,
    /// In the guest.
    pub guest: u64,
    /// Ready to run while others had the CPU.
    pub wait: Option<u64>,
}

/// Guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryMetrics {
    /// Bytes the guest has.
    pub size: u64,
    /// Bytes of it that the host's memory holds, if the host tells. Private memory is told together with the few hundred KiB of the
    /// VMM's own.
    pub resident: Option<u64>,
    /// Memory slots of KVM it is in.
    pub slots: u64,
}

/// A memory balloon since it was made: at boot, and anew at each reset. Everything but ages is bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalloonMetrics {
    /// The device's id.
    pub id: String,
    /// What the host wants in it.
    pub target: u64,
    /// What is in it.
    pub size: u64,
    /// What was put in.
    pub inflated: u64,
    /// What was taken out.
    pub deflated: u64,
    /// What was reported as free.
    pub reported: u64,
    /// What was given back to the host.
    pub discarded: u64,
    /// What the guest told last of its memory, by kind.
    pub memory: Vec<(&'static str, u64)>,
    /// Events it told of, by kind.
    pub events: Vec<(&'static str, u64)>,
    /// How long ago that was.
    pub age: Option<u64>,
}

/// A memory device (virtio-mem) since it was made: at boot, and anew at each reset. Everything but requests is bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryDeviceMetrics {
    /// The device's id.
    pub id: String,
    /// What the host wants plugged.
    pub requested: u64,
    /// What is plugged.
    pub plugged: u64,
    /// What the guest can reach: parts of the region with something plugged.
    pub reachable: u64,
    /// What was plugged.
    pub plugged_total: u64,
    /// What was unplugged.
    pub unplugged_total: u64,
    /// Requests that were not granted, by answer.
    pub refused: Vec<(&'static str, u64)>,
}

/// A memory zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryZoneMetrics {
    /// Its id.
    pub id: String,
    /// Bytes it should have.
    pub target: u64,
    /// Bytes it has.
    pub actual: u64,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskMetrics {
    /// The device's id.
    pub id: String,
    /// The queues that were ever used.
    pub queues: Vec<DiskQueueMetrics>,
}

/// A queue of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskQueueMetrics {
    /// Its number.
    pub number: u16,
    /// Reads that succeeded.
    pub reads: OperationMetrics,
    /// Writes.
    pub writes: OperationMetrics,
    /// Flushes.
    pub flushes: OperationMetrics,
    /// Discards.
    pub discards: OperationMetrics,
    /// Requests to write zeroes.
    pub write_zeroes: OperationMetrics,
    /// Operations that failed.
    pub errors: u64,
    /// Operations under way.
    pub in_flight: u64,
}

impl DiskQueueMetrics {
    /// Every kind of operation with its name.
    fn operations(&self) -> [(&'static str, &OperationMetrics); 5] {
        [
            ("read", &self.reads),
            ("write", &self.writes),
            ("flush", &self.flushes),
            ("discard", &self.discards),
            ("write_zeroes", &self.write_zeroes),
        ]
    }
}

/// Operations of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationMetrics {
    /// How many.
    pub count: u64,
    /// Bytes they moved or affected.
    pub bytes: u64,
    /// How long they took.
    pub latency: Latencies,
}

/// A histogram of durations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latencies {
    /// Upper bounds of the buckets, rising.
    pub bounds: &'static [u64],
    /// How many fell into each bucket and not into the ones before; one more than there are bounds.
    pub buckets: Vec<u64>,
    /// All of them together.
    pub sum: u64,
    /// The shortest; meaningless while there are none.
    pub min: u64,
    /// The longest.
    pub max: u64,
}

impl Latencies {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicMetrics {
    /// The device's id.
    pub id: String,
    /// Its queue pairs, in their order.
    pub pairs: Vec<NicPairMetrics>,
}

/// A queue pair of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NicPairMetrics {
    /// To the guest.
    pub receive: DirectionMetrics,
    /// From the guest.
    pub transmit: DirectionMetrics,
}

/// What went one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DirectionMetrics {
    /// Packets passed on.
    pub packets: u64,
    /// Bytes of data in them.
    pub bytes: u64,
    /// Packets lost.
    pub dropped: u64,
}

/// A socket device since it was made: at boot, and anew at each reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockMetrics {
    /// The device's id.
    pub id: String,
    /// To the guest; none is dropped.
    pub receive: DirectionMetrics,
    /// From the guest.
    pub transmit: DirectionMetrics,
    /// Connections there are.
    pub open: u64,
    /// Connections that came about.
    pub opened: u64,
    /// Connections that were refused.
    pub refused: u64,
}

/// Devices of the host that the guest drives by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PassthroughMetrics {
    /// Bytes of guest memory that they reach, all of it locked.
    pub memory: u64,
    /// Mappings of the IOMMU for that.
    pub ranges: u64,
    /// Each of them.
    pub devices: Vec<HostDeviceMetrics>,
}

/// A device of the host since the guest has it: since boot or its coming, and anew at each reset of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDeviceMetrics {
    /// Its id.
    pub id: String,
    /// Interrupts that ring the guest.
    pub interrupts: u64,
    /// Reads of its registers by way of the VMM.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// How often it was reset.
    pub resets: u64,
}

/// The process, with the guest's memory in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessMetrics {
    /// Threads.
    pub threads: u64,
    /// Bytes of private memory that nothing on disk stands behind.
    pub resident_anonymous: u64,
    /// Bytes of mapped files: the program.
    pub resident_file: u64,
    /// Bytes of shared memory.
    pub resident_shared: u64,
    /// Bytes of explicit huge pages; they are in none of the others.
    pub huge_pages: u64,
}
