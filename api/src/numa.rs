//! NUMA nodes of the guest.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::validate::range;
use crate::{ConfigError, VmConfig};

/// Most nodes a guest can have: what Linux on x86 can number.
const MAX_NODES: usize = 64;
/// How far a node is from itself (ACPI 5.2.17).
const LOCAL: u8 = 10;
/// How far nodes are from each other of which nobody says it.
const REMOTE: u8 = 20;
/// Nodes that can have PCI roots, each of which has 32 of 256 buses.
const PCI_NODES: usize = 8;
/// 255 means that there is no way at all.
const MAX_DISTANCE: u8 = 254;

/// A NUMA node of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct NumaConfig {
    /// Its number; all from 0 on are there.
    #[cfg_attr(feature = "openapi", schemars(range(max = 63)))]
    pub guest_numa_id: u32,
    /// Its vCPUs. Those of no node are node 0's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(inner(range(max = 253))))]
    pub cpus: Option<Vec<u32>>,
    /// How far it is to others; 20 where nobody says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distances: Option<Vec<NumaDistance>>,
    /// Ids of its memory zones. Those of no node are node 0's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_zones: Option<Vec<String>>,
    /// It has a PCI root of its own, even if no device is there yet. Of nodes 1 to 7 alone; node 0 always has one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pci_root: bool,
}

/// How far it is from one node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct NumaDistance {
    /// The other node.
    #[cfg_attr(feature = "openapi", schemars(range(max = 63)))]
    pub destination: u32,
    /// 10 is the node itself, 20 takes twice as long. The way back is as far unless the other node says otherwise.
    #[cfg_attr(feature = "openapi", schemars(range(min = 11, max = 254)))]
    pub distance: u8,
}

impl FromStr for NumaDistance {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pair = text.split_once('@');
        let numbers = pair.and_then(|(node, far)| Some((node.parse().ok()?, far.parse().ok()?)));
        match numbers {
            Some((destination, distance)) => Ok(Self { destination, distance }),
            None => Err("write NODE@DISTANCE, like 1@20"),
        }
    }
}

impl VmConfig {
    /// The guest's NUMA nodes; none if it is not divided.
    pub fn numa(&self) -> &[NumaConfig] {
        self.numa.as_deref().unwrap_or_default()
    }

    /// The node of vCPU `index`.
    pub fn node_of_cpu(&self, index: u32) -> u32 {
        let has = |node: &&NumaConfig| node.cpus.iter().flatten().any(|cpu| *cpu == index);
        self.numa().iter().find(has).map_or(0, |node| node.guest_numa_id)
    }

    /// The node of the memory zone `id`.
    pub fn node_of_zone(&self, id: &str) -> u32 {
        let has = |node: &&NumaConfig| node.memory_zones.iter().flatten().any(|zone| zone == id);
        self.numa().iter().find(has).map_or(0, |node| node.guest_numa_id)
    }

    /// How far it is from node `from` to node `to`.
    pub fn numa_distance(&self, from: u32, to: u32) -> u8 {
        let told = |from, to| {
            let node = self.numa().iter().find(|node| node.guest_numa_id == from)?;
            let mut distances = node.distances.iter().flatten();
            distances.find(|distance| distance.destination == to)
        };
        match from == to {
            true => LOCAL,
            false => told(from, to).or(told(to, from)).map_or(REMOTE, |told| told.distance),
        }
    }

    /// The NUMA nodes that devices are in, each with the field that says so.
    fn nodes_of_devices(&self) -> impl Iterator<Item = (String, u32)> {
        let disks = self.disks.iter().flatten().map(|disk| disk.guest_numa_id).enumerate();
        let disks = disks.map(|(i, node)| (format!("disks[{i}].guest_numa_id"), node));
        let nets = self.net.iter().flatten().map(|net| net.guest_numa_id).enumerate();
        let nets = nets.map(|(i, node)| (format!("net[{i}].guest_numa_id"), node));
        let hosts = self
            .devices
            .iter()
            .flatten()
            .map(|device| device.guest_numa_id)
            .enumerate();
        let hosts = hosts.map(|(i, node)| (format!("devices[{i}].guest_numa_id"), node));
        let all = disks.chain(nets).chain(hosts);
        all.filter_map(|(field, node)| Some((field, node?)))
    }

    /// How many PCI roots the guest has: one for each node from 0 to the last that has devices, or is to have one.
    pub fn pci_roots(&self) -> usize {
        let of_nodes = self.numa().iter().filter(|node| node.pci_root);
        let of_nodes = of_nodes.map(|node| node.guest_numa_id);
        let last = of_nodes.chain(self.nodes_of_devices().map(|(_, node)| node)).max();
        last.map_or(1, |last| last as usize + 1)
    }

    /// Has node `id` keep its PCI root, whatever devices it has.
    pub fn keep_pci_root(&mut self, id: u32) {
        let nodes = self.numa.iter_mut().flatten();
        nodes
            .filter(|node| node.guest_numa_id == id && id != 0)
            .for_each(|node| node.pci_root = true);
    }

    /// Checks that the nodes that devices are in are there, and can have a PCI root.
    pub(crate) fn validate_pci_nodes(&self) -> Result<(), ConfigError> {
        let count = self.numa().len();
        for (field, node) in self.nodes_of_devices() {
            if count == 0 {
                return Err(ConfigError::Conflict(format!(
                    "{field} is {node}, and the guest has no NUMA nodes; give it some with numa, or leave {field} out"
                )));
            }
            if node as usize >= count.min(PCI_NODES) {
                let allowed = match count {
                    0..=PCI_NODES => format!("between 0 and {}, the last node in numa", count - 1),
                    _ => format!("between 0 and {}: nodes beyond that have no PCI devices", PCI_NODES - 1),
                };
                return Err(range(field, node, allowed));
            }
        }
        for (index, node) in self.numa().iter().enumerate() {
            if node.pci_root && node.guest_numa_id as usize >= PCI_NODES {
                return Err(ConfigError::Conflict(format!(
                    "numa[{index}].pci_root is on for node {}; nodes 0 to {} alone can have PCI devices",
                    node.guest_numa_id,
                    PCI_NODES - 1
                )));
            }
        }
        Ok(())
    }

    /// Checks the nodes, if there are any.
    pub(crate) fn validate_numa(&self) -> Result<(), ConfigError> {
        let nodes = self.numa();
        if nodes.is_empty() {
            return Ok(());
        }
        if nodes.len() > MAX_NODES {
            let value = format!("a list of {}", nodes.len());
            return Err(range("numa", value, format!("one of at most {MAX_NODES}")));
        }
        if self.platform.as_ref().is_some_and(|platform| platform.dtb) {
            return Err(ConfigError::Conflict(
                "numa is told by ACPI, which a guest with platform.dtb does not have; leave one of them out".into(),
            ));
        }
        let (mut cpus, mut zones) = (Vec::new(), Vec::new());
        for (index, node) in nodes.iter().enumerate() {
            let field = format!("numa[{index}]");
            let others = nodes.iter().take(index);
            if others
                .into_iter()
                .any(|other| other.guest_numa_id == node.guest_numa_id)
            {
                let id = node.guest_numa_id;
                return Err(ConfigError::Conflict(format!(
                    "two NUMA nodes have the number {id}; give each its own"
                )));
            }
            if node.guest_numa_id as usize >= nodes.len() {
                let allowed = format!("between 0 and {}: nodes are numbered without gaps", nodes.len() - 1);
                return Err(range(format!("{field}.guest_numa_id"), node.guest_numa_id, allowed));
            }
            self.validate_members(&field, node, &mut cpus, &mut zones)?;
            validate_distances(&field, node, nodes.len())?;
        }
        Ok(())
    }

    /// Checks that what `node` has is there, and no other node's.
    fn validate_members<'a>(
        &'a self,
        field: &str,
        node: &'a NumaConfig,
        cpus: &mut Vec<u32>,
        zones: &mut Vec<&'a String>,
    ) -> Result<(), ConfigError> {
        let twice = |what: String| {
            Err(ConfigError::Conflict(format!(
                "{what} is in two NUMA nodes, or twice in one; name it once"
            )))
        };
        for &cpu in node.cpus.iter().flatten() {
            if cpu >= self.cpus.max_vcpus {
                let allowed = format!("a list of vCPUs below max_vcpus ({})", self.cpus.max_vcpus);
                return Err(range(format!("{field}.cpus"), format!("a list with {cpu}"), allowed));
            }
            if cpus.contains(&cpu) {
                return twice(format!("vCPU {cpu}"));
            }
            cpus.push(cpu);
        }
        for zone in node.memory_zones.iter().flatten() {
            if !self.memory.zones().iter().any(|known| known.id == *zone) {
                return Err(ConfigError::Conflict(format!(
                    "{field}.memory_zones has '{zone}', and memory.zones does not; name a zone that is there"
                )));
            }
            if zones.contains(&zone) {
                return twice(format!("the memory zone '{zone}'"));
            }
            zones.push(zone);
        }
        // What nobody names is node 0's.
        if node.guest_numa_id != 0 && node.cpus.iter().flatten().next().is_none() && zones_of(node).is_none() {
            return Err(ConfigError::Missing(format!(
                "{field} has neither cpus nor memory_zones; give it some, or leave it out"
            )));
        }
        Ok(())
    }
}

fn zones_of(node: &NumaConfig) -> Option<&String> {
    node.memory_zones.iter().flatten().next()
}

fn validate_distances(field: &str, node: &NumaConfig, nodes: usize) -> Result<(), ConfigError> {
    let mut told = Vec::new();
    for distance in node.distances.iter().flatten() {
        let NumaDistance { destination, distance } = *distance;
        let field = format!("{field}.distances");
        if destination as usize >= nodes || destination == node.guest_numa_id {
            let allowed = format!("between 0 and {}, and not the node itself", nodes - 1);
            return Err(range(format!("{field}.destination"), destination, allowed));
        }
        if !(LOCAL + 1..=MAX_DISTANCE).contains(&distance) {
            let allowed = format!("between {} and {MAX_DISTANCE}", LOCAL + 1);
            return Err(range(format!("{field}.distance"), distance, allowed));
        }
        if told.contains(&destination) {
            return Err(ConfigError::Conflict(format!(
                "{field} has two to node {destination}; give one"
            )));
        }
        told.push(destination);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeviceConfig, MemoryZoneConfig, PlatformConfig};

    fn node(id: u32, cpus: &[u32], zones: &[&str], distances: &[&str]) -> NumaConfig {
        NumaConfig {
            guest_numa_id: id,
            cpus: Some(cpus.to_vec()),
            memory_zones: Some(zones.iter().map(|zone| (*zone).to_owned()).collect()),
            distances: Some(distances.iter().map(|text| text.parse().expect("a distance")).collect()),
            pci_root: false,
        }
    }

    fn config(nodes: Vec<NumaConfig>) -> VmConfig {
        let zone = |id: &str| MemoryZoneConfig {
            id: id.to_owned(),
            size: 1 << 20,
            ..MemoryZoneConfig::default()
        };
        let mut config = VmConfig::default();
        config.cpus.max_vcpus = 4;
        config.memory.size = 0;
        config.memory.zones = Some(vec![zone("a"), zone("b"), zone("c")]);
        config.numa = Some(nodes);
        config
    }

    #[test]
    fn what_no_node_has_is_the_first_nodes_and_ways_go_both_ways() {
        let nodes = vec![
            node(1, &[1, 3], &["b"], &["2@33"]),
            node(0, &[], &["a"], &["1@15"]),
            node(2, &[2], &[], &["1@40"]),
        ];
        let config = config(nodes);
        config.validate_numa().expect("valid");
        assert_eq!([0, 1, 2, 3].map(|cpu| config.node_of_cpu(cpu)), [0, 1, 2, 1]);
        assert_eq!(["a", "b", "c"].map(|zone| config.node_of_zone(zone)), [0, 1, 0]);
        let row = |from| [0, 1, 2].map(|to| config.numa_distance(from, to));
        assert_eq!([row(0), row(1), row(2)], [[10, 15, 20], [15, 10, 33], [20, 40, 10]]);
    }

    #[test]
    fn what_contradicts_itself_is_refused_in_one_sentence() {
        let refused = |nodes: Vec<NumaConfig>| config(nodes).validate_numa().expect_err("refused").to_string();
        let first = || node(0, &[0], &["a"], &[]);
        for (text, words) in [
            (
                refused(vec![first(), node(0, &[1], &["b"], &[])]),
                "two NUMA nodes have the number 0",
            ),
            (
                refused(vec![first(), node(2, &[1], &[], &[])]),
                "numa[1].guest_numa_id is 2; it must be between 0 and 1",
            ),
            (refused(vec![first(), node(1, &[4], &[], &[])]), "below max_vcpus (4)"),
            (
                refused(vec![first(), node(1, &[0], &[], &[])]),
                "vCPU 0 is in two NUMA nodes",
            ),
            (refused(vec![node(0, &[2, 2], &[], &[])]), "vCPU 2 is in two"),
            (
                refused(vec![first(), node(1, &[], &["d"], &[])]),
                "memory_zones has 'd'",
            ),
            (
                refused(vec![first(), node(1, &[], &["a"], &[])]),
                "memory zone 'a' is in two",
            ),
            (
                refused(vec![first(), node(1, &[], &[], &[])]),
                "numa[1] has neither cpus nor memory_zones",
            ),
            (
                refused(vec![node(0, &[], &[], &["1@20"])]),
                "numa[0].distances.destination is 1",
            ),
            (refused(vec![node(0, &[], &[], &["0@20"])]), "not the node itself"),
            (
                refused(vec![first(), node(1, &[1], &[], &["0@10"])]),
                "distance is 10; it must be between 11 and 254",
            ),
            (
                refused(vec![first(), node(1, &[1], &[], &["0@255"])]),
                "distance is 255",
            ),
            (
                refused(vec![first(), node(1, &[1], &[], &["0@20", "0@30"])]),
                "two to node 0",
            ),
            (refused(vec![first(); 65]), "numa is a list of 65"),
        ] {
            assert!(text.contains(words), "{text}");
        }
        let mut tree = config(vec![first()]);
        tree.platform = Some(PlatformConfig {
            dtb: true,
            ..PlatformConfig::default()
        });
        assert!(
            tree.validate_numa()
                .expect_err("refused")
                .to_string()
                .contains("platform.dtb")
        );
    }

    #[test]
    fn devices_are_in_nodes_that_there_are() {
        let nodes = |count: u32| (0..count).map(|id| node(id, &[], &[], &[])).collect::<Vec<_>>();
        let with = |count, node: u32| {
            let mut config = config(nodes(count));
            config.devices = Some(vec![DeviceConfig {
                guest_numa_id: Some(node),
                ..DeviceConfig::default()
            }]);
            config
        };
        assert_eq!(config(nodes(2)).pci_roots(), 1);
        for node in [0, 1, 7] {
            let config = with(9, node);
            assert_eq!(
                (config.validate_pci_nodes(), config.pci_roots()),
                (Ok(()), node as usize + 1)
            );
        }
        let refused = |count, node| with(count, node).validate_pci_nodes().expect_err("refused").to_string();
        assert!(
            refused(0, 0).starts_with("devices[0].guest_numa_id is 0, and the guest has no NUMA nodes; give it some")
        );
        assert_eq!(
            refused(2, 2),
            "devices[0].guest_numa_id is 2; it must be between 0 and 1, the last node in numa"
        );
        assert!(refused(9, 8).ends_with("between 0 and 7: nodes beyond that have no PCI devices"));
        let mut kept = with(9, 3);
        kept.keep_pci_root(3);
        kept.keep_pci_root(0);
        kept.devices = None;
        assert_eq!((kept.validate_pci_nodes(), kept.pci_roots()), (Ok(()), 4));
        kept.keep_pci_root(8);
        let text = kept.validate_pci_nodes().expect_err("refused").to_string();
        assert!(
            text.starts_with("numa[8].pci_root is on for node 8; nodes 0 to 7"),
            "{text}"
        );
        let disk = crate::flags::disk("path=/d,guest_numa_id=1").expect("a disk");
        let net = crate::flags::net("tap=t,guest_numa_id=2").expect("an interface");
        let mut both = config(nodes(3));
        (both.disks, both.net) = (Some(vec![disk]), Some(vec![net]));
        assert_eq!(both.pci_roots(), 3);
        both.numa = None;
        let text = both.validate_pci_nodes().expect_err("refused").to_string();
        assert!(text.starts_with("disks[0].guest_numa_id is 1"), "{text}");
        let host = crate::flags::device("path=/p,guest_numa_id=1").expect("a device");
        assert_eq!(host.node(), 1);
    }

    #[test]
    fn distances_are_written_with_their_node() {
        assert_eq!(
            "1@20".parse(),
            Ok(NumaDistance {
                destination: 1,
                distance: 20
            })
        );
        for text in ["", "1", "1@", "@20", "1@300", "a@20"] {
            assert!(text.parse::<NumaDistance>().is_err(), "{text}");
        }
    }
}
