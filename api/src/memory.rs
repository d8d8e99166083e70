//! How a guest's memory changes while it runs.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ConfigError;
use crate::config::MemoryConfig;

/// The smallest block by which virtio-mem adds and removes memory, in bytes.
pub(crate) const BLOCK: u64 = 2 << 20;

/// By what a running guest gets more memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum HotplugMethod {
    /// Memory devices of ACPI (DIMMs).
    #[default]
    Acpi,
    /// A virtio-mem device.
    VirtioMem,
}

impl FromStr for HotplugMethod {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "acpi" => Ok(Self::Acpi),
            "virtio-mem" => Ok(Self::VirtioMem),
            _ => Err("write acpi or virtio-mem"),
        }
    }
}

/// Bytes of memory that a guest has whose memory can change while it runs. Where the three differ, the guest has not done yet what it was
/// asked for, or will not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct MemoryCounts {
    /// It should have so many.
    pub target: u64,
    /// It was given so many.
    pub present: u64,
    /// Of these it started with so many, or has said since that it uses them. `config.memory.size` says the same.
    pub taken: u64,
}

impl MemoryConfig {
    /// Bytes of the room for memory that comes while the guest runs.
    pub fn hotplug_room(&self) -> u64 {
        match self.zones() {
            [] => self.hotplug_size.unwrap_or(0),
            zones => zones
                .iter()
                .fold(0, |sum, zone| sum.saturating_add(zone.hotplug_room())),
        }
    }

    /// Checks what of the room a guest has by virtio-mem, which gives it blocks of 2 MiB, or of a huge page.
    fn validate_blocks(&self) -> Result<(), ConfigError> {
        let (room, plugged) = (self.hotplug_room(), self.hotplugged_size.unwrap_or(0));
        if self.hotplug_method != HotplugMethod::VirtioMem {
            return match plugged {
                0 => Ok(()),
                _ => Err(ConfigError::Conflict(
                    "memory.hotplugged_size needs memory.hotplug_method VirtioMem".into(),
                )),
            };
        }
        let block = BLOCK.max(self.hugepage_size.unwrap_or(0));
        for (field, bytes, most) in [
            ("memory.hotplug_size", room, u64::MAX),
            ("memory.hotplugged_size", plugged, room),
        ] {
            if bytes > most || !bytes.is_multiple_of(block) {
                return Err(ConfigError::Range {
                    field: field.into(),
                    value: format!("{bytes} bytes"),
                    allowed: match field {
                        "memory.hotplug_size" => format!("a multiple of {block} bytes"),
                        _ => format!("a multiple of {block} bytes, at most memory.hotplug_size"),
                    },
                });
            }
        }
        Ok(())
    }

    /// Checks how it may change.
    pub(crate) fn validate_hotplug(&self) -> Result<(), ConfigError> {
        if !self.zones().is_empty() {
            return self.validate_zones();
        }
        self.validate_blocks()?;
        match self.size.checked_add(self.hotplug_room()) {
            Some(_) => Ok(()),
            None => Err(ConfigError::Range {
                field: "memory.hotplug_size".into(),
                value: format!("{} bytes", self.hotplug_room()),
                allowed: "less than 2^64 bytes together with memory.size".into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_the_names_of_both_worlds() {
        assert_eq!("acpi".parse(), Ok(HotplugMethod::Acpi));
        assert_eq!("virtio-mem".parse(), Ok(HotplugMethod::VirtioMem));
        assert!("Acpi".parse::<HotplugMethod>().is_err());
        let text = r#"{"hotplug_method": "VirtioMem", "hotplug_size": 4096}"#;
        let config: MemoryConfig = serde_json::from_str(text).expect("a configuration");
        assert_eq!(config.hotplug_method, HotplugMethod::VirtioMem);
        assert_eq!(
            (config.hotplug_room(), MemoryConfig::default().hotplug_room()),
            (4096, 0)
        );
    }

    #[test]
    fn what_cannot_be_added_is_refused() {
        let config = |method, hotplug_size| MemoryConfig {
            hotplug_method: method,
            hotplug_size: Some(hotplug_size),
            ..MemoryConfig::default()
        };
        assert_eq!(config(HotplugMethod::Acpi, 8 << 30).validate_hotplug(), Ok(()));
        let refused = |config: MemoryConfig| config.validate_hotplug().expect_err("refused").to_string();
        assert!(refused(config(HotplugMethod::Acpi, u64::MAX)).contains("memory.hotplug_size"));
        assert_eq!(config(HotplugMethod::VirtioMem, 8 << 30).validate_hotplug(), Ok(()));
        assert!(refused(config(HotplugMethod::VirtioMem, 1 << 20)).contains("multiple of 2097152"));
        let plugged = |method, hotplugged_size| MemoryConfig {
            hotplugged_size: Some(hotplugged_size),
            ..config(method, 8 << 30)
        };
        assert_eq!(plugged(HotplugMethod::VirtioMem, 8 << 30).validate_hotplug(), Ok(()));
        for bytes in [(8 << 30) + BLOCK, BLOCK / 2, u64::MAX] {
            assert!(refused(plugged(HotplugMethod::VirtioMem, bytes)).contains("memory.hotplugged_size"));
        }
        assert!(refused(plugged(HotplugMethod::Acpi, BLOCK)).contains("VirtioMem"));
        let huge = MemoryConfig {
            hugepage_size: Some(1 << 30),
            ..plugged(HotplugMethod::VirtioMem, BLOCK)
        };
        assert!(refused(huge).contains("1073741824"));
    }
}
