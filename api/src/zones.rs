//! Memory in zones, each with a backing of its own.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{HugePageSize, MemoryConfig};
use crate::memory::BLOCK;
use crate::validate::range;
use crate::{ConfigError, HotplugMethod};

const MIB: u64 = 1 << 20;
/// Most zones a guest can have.
const MAX_ZONES: usize = 64;
/// Most bytes of an id.
const MAX_ID: usize = 64;

/// A part of the guest's RAM with a backing of its own. Zones lie one behind the other, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", schemars(extend("required" = ["id", "size"])))]
pub struct MemoryZoneConfig {
    /// Name in the API.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1, max = 64)))]
    pub id: String,
    /// Bytes the guest starts with.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1_048_576), extend("multipleOf" = 1_048_576)))]
    pub size: u64,
    /// A file that backs it: not in this version.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(skip))]
    pub file: Option<PathBuf>,
    /// Other processes may map it (vhost-user devices need that).
    pub shared: bool,
    /// Take it from the host's huge page pool.
    pub hugepages: bool,
    /// Which pool; the host's default when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<HugePageSize>,
    /// NUMA node of the host whose memory it has, and no other's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Bytes that may be added while the guest runs, by virtio-mem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Bytes of them that the guest has, or should have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Touch every page at start.
    pub prefault: bool,
    /// Let the kernel merge equal pages of several guests (KSM).
    pub mergeable: bool,
}

impl MemoryZoneConfig {
    /// Bytes of the room for memory that comes while the guest runs.
    pub fn hotplug_room(&self) -> u64 {
        self.hotplug_size.unwrap_or(0)
    }
}

/// Body of `vm.resize-zone`: a target, as that of `vm.resize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ResizeZone {
    /// The zone's id.
    pub id: String,
    /// Bytes of RAM it should have: from what it started with to its `hotplug_size` more.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1_048_576), extend("multipleOf" = 1_048_576)))]
    pub desired_ram: u64,
}

/// How much memory a zone has. Where the two differ, the guest has not done yet what it was asked for, or will not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ZoneCounts {
    /// Its id.
    pub id: String,
    /// Bytes it should have.
    pub target: u64,
    /// Bytes it has: what it started with, and what the guest has plugged since.
    pub actual: u64,
}

impl MemoryConfig {
    /// The zones that its memory consists of; none if it is in one piece.
    pub fn zones(&self) -> &[MemoryZoneConfig] {
        self.zones.as_deref().unwrap_or_default()
    }

    /// Bytes of RAM the guest starts with, in zones or in one piece.
    pub fn boot_size(&self) -> u64 {
        match self.zones() {
            [] => self.size,
            zones => zones.iter().fold(0, |sum, zone| sum.saturating_add(zone.size)),
        }
    }

    /// Whether other processes may map any of it.
    pub fn any_shared(&self) -> bool {
        self.shared || self.zones().iter().any(|zone| zone.shared)
    }

    /// Whether any of it is of explicit huge pages.
    pub fn any_hugepages(&self) -> bool {
        self.hugepages || self.zones().iter().any(|zone| zone.hugepages)
    }

    /// Whether every page of any of it is touched at the start.
    pub fn any_prefault(&self) -> bool {
        self.prefault || self.zones().iter().any(|zone| zone.prefault)
    }

    /// Whether the kernel may merge equal pages of any of it.
    pub(crate) fn any_mergeable(&self) -> bool {
        self.mergeable || self.zones().iter().any(|zone| zone.mergeable)
    }

    /// Checks the zones, if there are any.
    pub(crate) fn validate_zones(&self) -> Result<(), ConfigError> {
        let zones = self.zones();
        if zones.is_empty() {
            return Ok(());
        }
        if self.size != 0 {
            return Err(ConfigError::Conflict(format!(
                "memory.size is {} bytes, and memory.zones have the guest's memory; set memory.size to 0",
                self.size
            )));
        }
        let of_each = [
            ("hugepages", self.hugepages),
            ("hugepage_size", self.hugepage_size.is_some()),
            ("mergeable", self.mergeable),
            ("hotplug_size", self.hotplug_size.is_some_and(|bytes| bytes != 0)),
            ("hotplugged_size", self.hotplugged_size.is_some_and(|bytes| bytes != 0)),
        ];
        if let Some((name, _)) = of_each.iter().find(|(_, given)| *given) {
            return Err(ConfigError::Conflict(format!(
                "memory.{name} is for memory in one piece; give it to those of memory.zones that should have it"
            )));
        }
        if zones.len() > MAX_ZONES {
            let value = format!("a list of {}", zones.len());
            return Err(range("memory.zones", value, format!("one of at most {MAX_ZONES}")));
        }
        let mut total = 0u64;
        for (index, zone) in zones.iter().enumerate() {
            self.validate_zone(&format!("memory.zones[{index}]"), zone)?;
            if zones.iter().take(index).any(|other| other.id == zone.id) {
                return Err(ConfigError::Conflict(format!(
                    "two memory zones have the id '{}'; give each its own",
                    zone.id
                )));
            }
            let all = total.checked_add(zone.size);
            let Some(sum) = all.and_then(|all| all.checked_add(zone.hotplug_room())) else {
                let allowed = "less than 2^64 bytes together with hotplug_size and the other zones";
                let field = format!("memory.zones[{index}].size");
                return Err(range(field, format!("{} bytes", zone.size), allowed));
            };
            total = sum;
        }
        Ok(())
    }

    fn validate_zone(&self, field: &str, zone: &MemoryZoneConfig) -> Result<(), ConfigError> {
        let bytes = |name: &str, bytes: u64, allowed: String| {
            Err(range(format!("{field}.{name}"), format!("{bytes} bytes"), allowed))
        };
        if zone.id.is_empty() || zone.id.len() > MAX_ID {
            let allowed = format!("1 to {MAX_ID} bytes long");
            return Err(range(format!("{field}.id"), format!("'{}'", zone.id), allowed));
        }
        if zone.size == 0 || !zone.size.is_multiple_of(MIB) {
            return bytes("size", zone.size, "a whole number of MiB, at least 1".to_owned());
        }
        if zone.file.is_some() {
            return Err(ConfigError::Conflict(format!(
                "{field}.file is not supported by this version; leave it out, and give shared to memory that others map"
            )));
        }
        if zone.hugepage_size.is_some() && !zone.hugepages {
            return Err(ConfigError::Conflict(format!(
                "{field}.hugepage_size needs {field}.hugepages switched on"
            )));
        }
        if zone.mergeable && (zone.shared || self.shared || zone.hugepages) {
            return Err(ConfigError::Conflict(format!(
                "{field}.mergeable works on private small pages only; switch shared and hugepages off"
            )));
        }
        let (room, plugged) = (zone.hotplug_room(), zone.hotplugged_size.unwrap_or(0));
        if room > 0 && self.hotplug_method != HotplugMethod::VirtioMem {
            return Err(ConfigError::Conflict(format!(
                "{field}.hotplug_size needs memory.hotplug_method VirtioMem: zones grow by nothing else"
            )));
        }
        let block = BLOCK.max(zone.hugepage_size.unwrap_or(0));
        if !room.is_multiple_of(block) {
            return bytes("hotplug_size", room, format!("a multiple of {block} bytes"));
        }
        if plugged > room || !plugged.is_multiple_of(block) {
            let allowed = format!("a multiple of {block} bytes, at most {field}.hotplug_size ({room})");
            return bytes("hotplugged_size", plugged, allowed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(id: &str, size: u64) -> MemoryZoneConfig {
        MemoryZoneConfig {
            id: id.to_owned(),
            size,
            ..MemoryZoneConfig::default()
        }
    }

    fn memory() -> MemoryConfig {
        MemoryConfig {
            size: 0,
            hotplug_method: HotplugMethod::VirtioMem,
            zones: Some(vec![zone("a", 3 * MIB), zone("b", 5 * MIB)]),
            ..MemoryConfig::default()
        }
    }

    #[test]
    fn zones_are_the_memory_of_the_guest() {
        let mut memory = memory();
        memory.validate_zones().expect("valid");
        assert_eq!((memory.boot_size(), memory.hotplug_room()), (8 * MIB, 0));
        if let Some(zones) = &mut memory.zones {
            zones[0].hotplug_size = Some(BLOCK);
            zones[1].hotplug_size = Some(3 * BLOCK);
        }
        memory.validate_zones().expect("valid");
        assert_eq!(memory.hotplug_room(), 4 * BLOCK);
        let whole = MemoryConfig::default();
        assert_eq!((whole.boot_size(), whole.zones().len()), (whole.size, 0));
    }

    #[test]
    fn what_contradicts_itself_is_refused_in_one_sentence() {
        let refused = |edit: &dyn Fn(&mut MemoryConfig)| {
            let mut memory = memory();
            edit(&mut memory);
            memory.validate_zones().expect_err("refused").to_string()
        };
        let of_zone = |edit: &dyn Fn(&mut MemoryZoneConfig)| {
            refused(&|memory| edit(&mut memory.zones.as_mut().expect("zones")[1]))
        };
        for (text, words) in [
            (
                refused(&|m| m.size = MIB),
                "memory.size is 1048576 bytes, and memory.zones",
            ),
            (
                refused(&|m| m.hugepages = true),
                "memory.hugepages is for memory in one piece",
            ),
            (refused(&|m| m.hotplug_size = Some(BLOCK)), "memory.hotplug_size is for"),
            (
                refused(&|m| m.hotplugged_size = Some(BLOCK)),
                "memory.hotplugged_size is for",
            ),
            (refused(&|m| m.mergeable = true), "memory.mergeable is for"),
            (
                refused(&|m| m.zones = Some(vec![zone("a", MIB); 65])),
                "memory.zones is a list of 65",
            ),
            (of_zone(&|z| z.id = "a".to_owned()), "two memory zones have the id 'a'"),
            (of_zone(&|z| z.id.clear()), "memory.zones[1].id is ''"),
            (of_zone(&|z| z.size = 0), "memory.zones[1].size is 0 bytes"),
            (of_zone(&|z| z.size = MIB + 1), "whole number of MiB"),
            (of_zone(&|z| z.size = 0u64.wrapping_sub(MIB)), "less than 2^64"),
            (
                of_zone(&|z| z.file = Some("/f".into())),
                "memory.zones[1].file is not supported",
            ),
            (
                of_zone(&|z| z.hugepage_size = Some(BLOCK)),
                "memory.zones[1].hugepages switched on",
            ),
            (of_zone(&|z| z.hotplug_size = Some(MIB)), "multiple of 2097152"),
            (
                of_zone(&|z| z.hotplugged_size = Some(BLOCK)),
                "at most memory.zones[1].hotplug_size (0)",
            ),
            (
                of_zone(&|z| {
                    z.hugepages = true;
                    z.hugepage_size = Some(1 << 30);
                    z.hotplug_size = Some(BLOCK);
                }),
                "multiple of 1073741824",
            ),
            (
                of_zone(&|z| {
                    z.mergeable = true;
                    z.shared = true;
                }),
                "memory.zones[1].mergeable works on private",
            ),
            (
                refused(&|m| {
                    m.shared = true;
                    m.zones.as_mut().expect("zones")[0].mergeable = true;
                }),
                "memory.zones[0].mergeable works on private",
            ),
            (
                refused(&|m| {
                    m.hotplug_method = HotplugMethod::Acpi;
                    m.zones.as_mut().expect("zones")[0].hotplug_size = Some(BLOCK);
                }),
                "needs memory.hotplug_method VirtioMem",
            ),
        ] {
            assert!(text.contains(words), "{text}");
        }
    }
}
