//! Who made the CPU, and whose branch of the architecture it follows.

use serde::{Deserialize, Serialize};

/// A maker of x86 CPUs, by the string of CPUID leaf 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
    /// `HygonGenuine`: C86, derived from AMD's Zen.
    Hygon,
    /// `CentaurHauls` and `  Shanghai  `: Zhaoxin.
    Zhaoxin,
    /// Any other.
    Other,
}

impl Vendor {
    /// From the registers of leaf 0.
    pub fn from_leaf0(ebx: u32, ecx: u32, edx: u32) -> Self {
        let mut name = [0; 12];
        for (bytes, register) in name.chunks_exact_mut(4).zip([ebx, edx, ecx]) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        match &name {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" => Self::Amd,
            b"HygonGenuine" => Self::Hygon,
            b"CentaurHauls" | b"  Shanghai  " => Self::Zhaoxin,
            _ => Self::Other,
        }
    }

    /// Whether topology, cache and feature leaves follow AMD's manual (0x8000_0008, 0x8000_001D, 0x8000_001E).
    pub fn is_amd_like(self) -> bool {
        matches!(self, Self::Amd | Self::Hygon)
    }
}
