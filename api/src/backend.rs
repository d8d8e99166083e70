//! What serves a device that the host has a file or an interface for: the VMM, or a daemon that it starts.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{DiskConfig, NetConfig};

/// What serves the file of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum DiskBackend {
    /// The VMM itself.
    #[default]
    Vmm,
    /// A `triarch-blkd` that the VMM starts, and ends with the VM.
    Blkd,
}

impl DiskBackend {
    /// Whether it is the VMM itself.
    pub fn is_vmm(&self) -> bool {
        *self == Self::Vmm
    }
}

impl FromStr for DiskBackend {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "vmm" => Ok(Self::Vmm),
            "blkd" => Ok(Self::Blkd),
            _ => Err("it is vmm or blkd"),
        }
    }
}

/// What serves the tap of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum NetBackend {
    /// The VMM itself.
    #[default]
    Vmm,
    /// A `triarch-netd` that the VMM starts, and ends with the VM.
    Netd,
}

impl NetBackend {
    /// Whether it is the VMM itself.
    pub fn is_vmm(&self) -> bool {
        *self == Self::Vmm
    }
}

impl FromStr for NetBackend {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "vmm" => Ok(Self::Vmm),
            "netd" => Ok(Self::Netd),
            _ => Err("it is vmm or netd"),
        }
    }
}

impl DiskConfig {
    /// Whether another process serves it, which has to map the guest's memory.
    pub fn has_daemon(&self) -> bool {
        self.vhost_user || !self.backend.is_vmm()
    }
}

impl NetConfig {
    /// Whether another process serves it, which has to map the guest's memory.
    pub fn has_daemon(&self) -> bool {
        self.vhost_user || !self.backend.is_vmm()
    }
}
