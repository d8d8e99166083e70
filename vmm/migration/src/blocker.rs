//! What is in the way of a guest that is to be moved.

use std::fmt;

/// Most of them that are told.
pub const MAX_BLOCKERS: usize = 256;

/// What part of a guest or host something in the way belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Part {
    /// The host, or its VMM.
    Host = 1,
    /// A feature of the processors.
    Cpu = 2,
    /// How fast the guest's clock counts.
    Clock = 3,
    /// Memory.
    Memory = 4,
    /// A disk.
    Disk = 5,
    /// Another device.
    Device = 6,
    /// The configuration.
    Configuration = 7,
}

impl Part {
    const ALL: [Self; 7] = [
        Self::Host,
        Self::Cpu,
        Self::Clock,
        Self::Memory,
        Self::Disk,
        Self::Device,
        Self::Configuration,
    ];

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|part| *part as u32 == number)
    }
}

/// One thing that is in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// To what it belongs.
    pub what: Part,
    /// The device's id, or the feature's name; empty where neither is meant.
    pub name: String,
    /// Why the guest cannot be moved.
    pub reason: String,
    /// What would remove it.
    pub remedy: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        match self.remedy.is_empty() {
            true => Ok(()),
            false => write!(f, "; {}", self.remedy),
        }
    }
}
