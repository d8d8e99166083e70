//! Flags of memory zones and NUMA nodes.

use super::{FlagError, KeyValues, set};
use crate::{MemoryZoneConfig, NumaConfig};

/// `--memory-zone id=NAME,size=SIZE,...`
pub fn memory_zone(text: &str) -> Result<MemoryZoneConfig, FlagError> {
    let known = [
        "id",
        "size",
        "file",
        "shared",
        "hugepages",
        "hugepage_size",
        "host_numa_node",
        "hotplug_size",
        "hotplugged_size",
        "prefault",
        "mergeable",
    ];
    let kv = KeyValues::parse("--memory-zone", text, &known, &["reserve"])?;
    let Some(id) = kv.text("id") else {
        return kv.refuse("it needs a name; write id=NAME".to_owned());
    };
    let Some(size) = kv.size("size")? else {
        return kv.refuse("it needs the memory the guest starts with there; write size=SIZE".to_owned());
    };
    let mut config = MemoryZoneConfig {
        id: id.to_owned(),
        size,
        file: kv.text("file").map(Into::into),
        hugepage_size: kv.size("hugepage_size")?,
        host_numa_node: kv.number("host_numa_node")?,
        hotplug_size: kv.size("hotplug_size")?,
        hotplugged_size: kv.size("hotplugged_size")?,
        ..MemoryZoneConfig::default()
    };
    set(&mut config.shared, kv.switch("shared")?);
    set(&mut config.hugepages, kv.switch("hugepages")?);
    set(&mut config.prefault, kv.switch("prefault")?);
    set(&mut config.mergeable, kv.switch("mergeable")?);
    Ok(config)
}

/// `--numa guest_numa_id=N,cpus=[0-3],memory_zones=[NAME],distances=[1@20],pci_root=on`
pub fn numa(text: &str) -> Result<NumaConfig, FlagError> {
    let known = ["guest_numa_id", "cpus", "memory_zones", "distances", "pci_root"];
    let kv = KeyValues::parse("--numa", text, &known, &["pci_segments"])?;
    let Some(guest_numa_id) = kv.number("guest_numa_id")? else {
        return kv.refuse("it needs a number; write guest_numa_id=0".to_owned());
    };
    let cpus = kv.list("cpus")?.map(|list| vcpus(&kv, &list)).transpose()?;
    let distances = match kv.list("distances")? {
        None => None,
        Some(list) => {
            let distances = list.iter().map(|text| {
                text.parse()
                    .or_else(|problem| kv.refuse(format!("distances={text} is invalid: {problem}")))
            });
            Some(distances.collect::<Result<Vec<_>, _>>()?)
        }
    };
    let zones = kv.list("memory_zones")?;
    Ok(NumaConfig {
        guest_numa_id,
        cpus,
        distances,
        memory_zones: zones.map(|zones| zones.into_iter().map(str::to_owned).collect()),
        pci_root: kv.switch("pci_root")?.unwrap_or(false),
    })
}

/// Numbers and ranges of them, like `0-3` and `5`.
fn vcpus(kv: &KeyValues<'_>, list: &[&str]) -> Result<Vec<u32>, FlagError> {
    let mut all = Vec::new();
    for text in list {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let bounds = first.parse::<u8>().ok().zip(last.parse::<u8>().ok());
        match bounds.filter(|(first, last)| first <= last) {
            // There are fewer vCPUs than that.
            Some((first, last)) => all.extend(u32::from(first)..=u32::from(last)),
            None => {
                return kv.refuse(format!(
                    "cpus={text} are no vCPUs; write numbers up to 253, like cpus=[0-3,5]"
                ));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NumaDistance;

    #[test]
    fn flags_become_configuration() {
        let zone = memory_zone(
            "id=a,size=1G,shared=on,hugepages=on,hugepage_size=2M,host_numa_node=1,hotplug_size=4G,prefault=on",
        );
        let zone = zone.expect("a zone");
        let expected = MemoryZoneConfig {
            id: "a".to_owned(),
            size: 1 << 30,
            shared: true,
            hugepages: true,
            hugepage_size: Some(2 << 20),
            host_numa_node: Some(1),
            hotplug_size: Some(4 << 30),
            prefault: true,
            ..MemoryZoneConfig::default()
        };
        assert_eq!(zone, expected);
        let zone = memory_zone("id=b,size=1M,mergeable=on,hotplugged_size=2M").expect("a zone");
        assert!(zone.mergeable && !zone.shared && zone.hotplugged_size == Some(2 << 20));
        let node = numa("guest_numa_id=1,cpus=[0-2,5],memory_zones=[a,b],distances=[0@20,2@40]").expect("a node");
        assert_eq!((node.guest_numa_id, node.cpus), (1, Some(vec![0, 1, 2, 5])));
        assert_eq!(node.memory_zones, Some(vec!["a".to_owned(), "b".to_owned()]));
        let far = |destination, distance| NumaDistance { destination, distance };
        assert_eq!(node.distances, Some(vec![far(0, 20), far(2, 40)]));
        let node = numa("guest_numa_id=0,cpus=3,memory_zones=a,distances=1@11,pci_root=on").expect("a node");
        assert!(node.pci_root);
        assert_eq!((node.cpus, node.distances), (Some(vec![3]), Some(vec![far(1, 11)])));
    }

    #[test]
    fn nonsense_is_refused_with_the_fix() {
        let zone = |text| memory_zone(text).expect_err("refused").to_string();
        assert_eq!(zone("size=1G"), "--memory-zone: it needs a name; write id=NAME");
        assert!(zone("id=a").contains("write size=SIZE"));
        assert!(zone("id=a,size=1G,host_numa_node=x").contains("no whole number"));
        let node = |text| numa(text).expect_err("refused").to_string();
        assert!(node("cpus=[0]").contains("write guest_numa_id=0"));
        for cpus in ["3-1", "a", "0-", "0-300", "-1"] {
            let text = format!("guest_numa_id=0,cpus=[{cpus}]");
            let problem = numa(&text).expect_err("refused").to_string();
            assert!(problem.contains("like cpus=[0-3,5]"), "{problem}");
        }
        assert!(node("guest_numa_id=0,distances=[1]").contains("like 1@20"));
    }
}
