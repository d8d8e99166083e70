//! Where a guest's memory lies and how it is backed: in one piece, or in zones one behind the other.
//!
//! RAM fills the addresses that the architecture has for it. A zone that reaches the hole for devices goes on behind it. Behind RAM each
//! zone that can grow has a room of its own, in the order of the zones.

use std::fs::File;
use std::ops::Range;

use triarch_api::{HotplugMethod, MemoryZoneConfig, VmConfig};
use triarch_arch::{MemoryAffinity, Numa, NumaNode, layout};
use triarch_memory::{Backing, GuestMemory, HugePages, MemoryError, RamOptions, ZoneRam};
use vm_memory::GuestAddress;

/// Where rooms of zones start: at multiples of the largest block by which Linux takes memory, so that no block of it is in two zones.
const ROOM_ALIGN: u64 = 2 << 30;

/// The memory of a guest: what it starts with, and what may come.
pub(crate) struct MemoryPlan {
    /// Bytes it starts with.
    pub(crate) boot: u64,
    /// Bytes of addresses behind them for what may come.
    pub(crate) span: u64,
    /// How memory is backed that is in no zone.
    pub(crate) options: RamOptions,
    pub(crate) zones: Vec<ZonePlan>,
    /// It consists of zones that have names.
    zoned: bool,
}

/// A part of memory with a backing of its own.
#[derive(Debug, Clone)]
pub(crate) struct ZonePlan {
    /// Id of the device by which it grows.
    pub(crate) device: String,
    /// Its RAM.
    pub(crate) ram: ZoneRam,
    /// Where it grows by virtio-mem, if it does.
    pub(crate) room: Option<Range<u64>>,
    /// Bytes of that which the guest should have.
    pub(crate) requested: u64,
    /// The guest's NUMA node that it is in, if there are any.
    pub(crate) node: Option<u32>,
}

/// Id of the device by which the memory zone `zone` grows. Memory in one piece is the zone `mem0`.
pub(crate) fn device_id(zone: &str) -> String {
    format!("_virtio-mem-{zone}")
}

impl MemoryPlan {
    /// That of the guest `config` describes, whose private memory may begin as what a file has if it is `mapped`.
    pub(crate) fn new(config: &VmConfig, mapped: bool) -> Self {
        let (memory, numa) = (&config.memory, !config.numa().is_empty());
        let options = RamOptions {
            copy_on_write: mapped,
            ..options(config)
        };
        let boot = memory.boot_size();
        let ram = layout::ram_ranges(boot);
        let zoned = !memory.zones().is_empty();
        if !zoned {
            let span = memory.hotplug_room();
            let by_blocks = memory.hotplug_method == HotplugMethod::VirtioMem && span > 0;
            let zone = ZonePlan {
                device: device_id("mem0"),
                ram: ZoneRam {
                    id: "mem0".to_owned(),
                    ranges: ram,
                    options,
                },
                // Its end is checked with that of RAM.
                room: layout::hotplug(boot, span).filter(|_| by_blocks),
                requested: memory.hotplugged_size.unwrap_or(0),
                node: numa.then_some(0),
            };
            return Self {
                boot,
                span,
                options,
                zones: vec![zone],
                zoned,
            };
        }
        let sizes: Vec<_> = memory.zones().iter().map(|zone| zone.size).collect();
        let rooms: Vec<_> = memory.zones().iter().map(MemoryZoneConfig::hotplug_room).collect();
        let (rooms, span) = divide_room(&rooms);
        let start = layout::hotplug(boot, span).map_or(0, |room| room.start);
        let parts = memory.zones().iter().zip(divide(&ram, &sizes)).zip(rooms);
        let zones = parts.map(|((zone, ranges), room)| ZonePlan {
            device: device_id(&zone.id),
            ram: ZoneRam {
                id: zone.id.clone(),
                ranges,
                options: zone_options(&options, zone),
            },
            room: room.map(|room| start.saturating_add(room.start)..start.saturating_add(room.end)),
            requested: zone.hotplugged_size.unwrap_or(0),
            node: numa.then(|| config.node_of_zone(&zone.id)),
        });
        Self {
            boot,
            span,
            options,
            zones: zones.collect(),
            zoned,
        }
    }

    /// Makes what the guest starts with.
    pub(crate) fn allocate(&self) -> Result<GuestMemory, MemoryError> {
        match self.zones.as_slice() {
            [whole] if !self.zoned => triarch_memory::allocate(&whole.ram.ranges, &whole.ram.options),
            zones => {
                let ram: Vec<_> = zones.iter().map(|zone| zone.ram.clone()).collect();
                triarch_memory::allocate_zones(&ram)
            }
        }
    }

    /// The same of `files`, one of each zone, which have what the guest had.
    pub(crate) fn adopt(&self, files: &[File]) -> Result<GuestMemory, MemoryError> {
        let ram: Vec<_> = self.zones.iter().map(|zone| zone.ram.clone()).collect();
        triarch_memory::adopt_zones(&ram, files)
    }

    /// How it is backed, also where there is none yet.
    pub(crate) fn backing(&self) -> Backing {
        let zones = self.zones.iter().flat_map(|zone| {
            let all = zone
                .ram
                .ranges
                .iter()
                .map(|(at, size)| at.0..at.0.saturating_add(*size));
            all.chain(zone.room.clone()).map(|range| (range, zone.ram.options))
        });
        Backing::new(zones.collect(), self.options)
    }

    /// Whether other processes can map all of it.
    pub(crate) fn shared(&self) -> bool {
        self.zones.iter().all(|zone| zone.ram.options.shared)
    }

    /// What the guest is told of its NUMA nodes.
    pub(crate) fn numa(&self, config: &VmConfig) -> Numa {
        let count = config.numa().len() as u32;
        let node = |id| {
            let own = self.zones.iter().filter(|zone| zone.node == Some(id));
            let ram = own.clone().flat_map(|zone| &zone.ram.ranges);
            let ram = ram.map(|(at, size)| affinity(at.0, *size, false));
            let rooms = own.filter_map(|zone| zone.room.as_ref());
            let rooms = rooms.map(|room| affinity(room.start, room.end.saturating_sub(room.start), true));
            NumaNode {
                memory: ram.chain(rooms).collect(),
                distances: (0..count).map(|to| config.numa_distance(id, to)).collect(),
            }
        };
        Numa {
            nodes: (0..count).map(node).collect(),
            cpus: (0..config.cpus.max_vcpus)
                .map(|index| config.node_of_cpu(index))
                .collect(),
        }
    }
}

fn affinity(start: u64, size: u64, hotplug: bool) -> MemoryAffinity {
    MemoryAffinity { start, size, hotplug }
}

fn options(config: &VmConfig) -> RamOptions {
    let shared = config.memory.shared || config.needs_shared_memory();
    let config = &config.memory;
    RamOptions {
        shared,
        huge_pages: config.hugepages.then_some(HugePages {
            page_size: config.hugepage_size,
        }),
        thp: config.thp,
        prefault: config.prefault,
        mergeable: config.mergeable,
        copy_on_write: false,
        host_node: None,
    }
}

/// What `zone` has beside what `all` have.
fn zone_options(all: &RamOptions, zone: &MemoryZoneConfig) -> RamOptions {
    RamOptions {
        shared: all.shared || zone.shared,
        huge_pages: zone.hugepages.then_some(HugePages {
            page_size: zone.hugepage_size,
        }),
        // The pool of one node can be short when the guest comes to use a page, and that would be its end.
        prefault: all.prefault || zone.prefault || (zone.hugepages && zone.host_numa_node.is_some()),
        mergeable: zone.mergeable,
        host_node: zone.host_numa_node,
        ..*all
    }
}

/// Gives each of `sizes` its part of `ranges`, which are as large as all of them: one behind the other.
fn divide(ranges: &[(GuestAddress, u64)], sizes: &[u64]) -> Vec<Vec<(GuestAddress, u64)>> {
    let mut free = ranges.iter().copied();
    let mut left = free.next();
    let mut part = |mut size: u64| {
        let mut parts = Vec::new();
        while size > 0 {
            let Some((at, len)) = left else { break };
            let taken = size.min(len);
            parts.push((at, taken));
            size -= taken;
            left = match len - taken {
                0 => free.next(),
                rest => Some((GuestAddress(at.0 + taken), rest)),
            };
        }
        parts
    };
    sizes.iter().map(|size| part(*size)).collect()
}

/// Where rooms of these sizes lie from the start of all of them, and how many bytes all have. Too many are `u64::MAX`, which has no place.
fn divide_room(sizes: &[u64]) -> (Vec<Option<Range<u64>>>, u64) {
    let mut end = 0u64;
    let mut place = |size: u64| {
        if size == 0 {
            return None;
        }
        let start = end.checked_next_multiple_of(ROOM_ALIGN).unwrap_or(u64::MAX);
        end = start.saturating_add(size);
        Some(start..end)
    };
    let rooms = sizes.iter().map(|size| place(*size)).collect();
    (rooms, end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use triarch_api::NumaConfig;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn zone(id: usize, size: u64, room: u64) -> MemoryZoneConfig {
        MemoryZoneConfig {
            id: format!("z{id}"),
            size,
            hotplug_size: Some(room).filter(|room| *room > 0),
            ..MemoryZoneConfig::default()
        }
    }

    fn config(zones: Vec<MemoryZoneConfig>) -> VmConfig {
        let mut config = VmConfig::default();
        config.memory.size = 0;
        config.memory.hotplug_method = HotplugMethod::VirtioMem;
        config.memory.zones = Some(zones);
        config
    }

    #[test]
    fn memory_in_one_piece_is_as_it_was() {
        let mut config = VmConfig::default();
        config.memory.hotplug_size = Some(GIB);
        let plan = MemoryPlan::new(&config, false);
        assert_eq!((plan.boot, plan.span, plan.zones.len()), (512 * MIB, GIB, 1));
        assert_eq!(plan.zones[0].room, None, "memory devices");
        config.memory.hotplug_method = HotplugMethod::VirtioMem;
        config.memory.hotplugged_size = Some(2 * MIB);
        let plan = MemoryPlan::new(&config, false);
        assert_eq!(plan.zones[0].room, layout::hotplug(512 * MIB, GIB));
        assert_eq!((plan.zones[0].requested, plan.zones[0].node), (2 * MIB, None));
        assert_eq!(plan.zones[0].device, "_virtio-mem-mem0");
        config.memory.hotplug_size = None;
        assert_eq!(MemoryPlan::new(&config, false).zones[0].room, None);
    }

    #[test]
    fn zones_have_what_all_have_and_what_is_their_own() {
        let mut first = zone(0, GIB, 0);
        first.hugepages = true;
        first.host_numa_node = Some(3);
        let mut config = config(vec![first, zone(1, GIB, 0)]);
        config.memory.thp = false;
        let plan = MemoryPlan::new(&config, true);
        let options: Vec<_> = plan.zones.iter().map(|zone| zone.ram.options).collect();
        assert!(
            options
                .iter()
                .all(|options| !options.thp && options.copy_on_write && !options.shared)
        );
        assert!(options[0].huge_pages.is_some() && options[0].prefault && options[0].host_node == Some(3));
        assert!(options[1].huge_pages.is_none() && !options[1].prefault && options[1].host_node.is_none());
        config.memory.zones.as_mut().expect("zones")[1].shared = true;
        assert!(!MemoryPlan::new(&config, false).shared());
        config.memory.shared = true;
        assert!(MemoryPlan::new(&config, false).shared());
    }

    #[test]
    fn nodes_have_their_zones_and_what_nobody_names_is_in_the_first() {
        let mut config = config(vec![zone(0, GIB, 0), zone(1, GIB, 2 * MIB), zone(2, GIB, 4 * MIB)]);
        config.cpus.max_vcpus = 3;
        let node = |id, cpus: &[u32], zones: &[&str]| NumaConfig {
            guest_numa_id: id,
            pci_root: false,
            cpus: Some(cpus.to_vec()),
            memory_zones: Some(zones.iter().map(|zone| (*zone).to_owned()).collect()),
            distances: None,
        };
        config.numa = Some(vec![node(1, &[1], &["z1"]), node(0, &[0], &[])]);
        let plan = MemoryPlan::new(&config, false);
        let numa = plan.numa(&config);
        assert_eq!(numa.cpus, [0, 1, 0]);
        let memory = |node: usize| {
            let memory = &numa.nodes[node].memory;
            memory.iter().map(|m| (m.size, m.hotplug)).collect::<Vec<_>>()
        };
        assert_eq!(memory(0), [(GIB, false), (GIB, false), (4 * MIB, true)]);
        assert_eq!(memory(1), [(GIB, false), (2 * MIB, true)]);
        assert_eq!(numa.nodes[0].distances, [10, 20]);
        assert_eq!(plan.zones[1].node, Some(1));
        // Without zones all of it is the first node's.
        let mut flat = VmConfig {
            numa: Some(vec![node(0, &[0], &[])]),
            ..VmConfig::default()
        };
        let numa = MemoryPlan::new(&flat, false).numa(&flat);
        assert_eq!(
            numa.nodes[0].memory.iter().map(|m| m.size).sum::<u64>(),
            flat.memory.size
        );
        flat.numa = None;
        assert!(MemoryPlan::new(&flat, false).numa(&flat).nodes.is_empty());
    }

    #[test]
    fn too_much_room_has_no_place() {
        let (rooms, span) = divide_room(&[u64::MAX - GIB, GIB]);
        assert_eq!((rooms.len(), span), (2, u64::MAX));
        assert_eq!(layout::hotplug(GIB, span), None);
    }

    proptest! {
        /// Zones are in their order, without gaps but the architecture's hole, and never overlap; each has as much as it should. Their
        /// rooms begin behind all RAM, where no block of Linux's is in two of them.
        #[test]
        fn zones_divide_memory(zones in proptest::collection::vec((1u64..5000, 0u64..3000), 1..12)) {
            let zones: Vec<_> = zones.into_iter().enumerate().map(|(id, (size, room))| zone(id, size * MIB, room * 2 * MIB)).collect();
            let config = config(zones);
            let plan = MemoryPlan::new(&config, false);
            let of_zones = plan.zones.iter().zip(config.memory.zones());
            for (plan, zone) in of_zones {
                let bytes: u64 = plan.ram.ranges.iter().map(|(_, size)| size).sum();
                prop_assert_eq!(bytes, zone.size);
                let room = plan.room.as_ref().map_or(0, |room| room.end - room.start);
                prop_assert_eq!(room, zone.hotplug_room());
            }
            // Joined they are what there is without zones.
            let mut joined: Vec<(u64, u64)> = Vec::new();
            for (at, size) in plan.zones.iter().flat_map(|zone| &zone.ram.ranges) {
                prop_assert!(*size > 0);
                match joined.last_mut() {
                    Some((start, len)) if *start + *len == at.0 => *len += size,
                    _ => joined.push((at.0, *size)),
                }
            }
            let whole: Vec<_> = layout::ram_ranges(plan.boot).iter().map(|(at, size)| (at.0, *size)).collect();
            prop_assert_eq!(joined, whole);
            let mut end = plan.zones.iter().flat_map(|zone| &zone.ram.ranges).map(|(at, size)| at.0 + size).max().unwrap_or(0);
            for room in plan.zones.iter().filter_map(|zone| zone.room.as_ref()) {
                prop_assert!(room.start >= end && room.start.is_multiple_of(ROOM_ALIGN));
                end = room.end;
            }
            let all = layout::hotplug(plan.boot, plan.span).expect("addresses enough");
            prop_assert!(plan.span == 0 || all.end == end);
            // Whoever looks an address up finds the zone.
            let backing = plan.backing();
            for zone in &plan.zones {
                for (at, size) in &zone.ram.ranges {
                    prop_assert_eq!(backing.of(at.0 + size - 1), &zone.ram.options);
                }
            }
        }
    }
}
