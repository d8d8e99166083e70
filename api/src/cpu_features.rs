//! What `vmm.cpu-features` tells.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Body of `vmm.cpu-features`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpuFeatures {
    /// The most a guest can get on this host.
    pub host: CpuDescription,
    /// What the guest that is there was given; absent without a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<CpuDescription>,
}

/// A CPU, by the names of what it can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpuDescription {
    /// `x86_64` or `aarch64`.
    pub architecture: String,
    /// Vendor as the CPU has it, such as `HygonGenuine`; on ARM the model's register says more (`MIDR_EL1` among the values).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// Family, model and stepping of an x86 CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<CpuSignature>,
    /// Release of the host's kernel, whose KVM has a say in what guests get; only of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Frequency of the TSC in kHz, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<u32>,
    /// Whether guests can have another frequency of the TSC; only of an x86 host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_scaling: Option<bool>,
    /// Features that are there, as Linux and QEMU call them, in the order of their registers.
    pub features: Vec<String>,
    /// Features that have a value, by name, unless it is 0.
    pub values: BTreeMap<String, u64>,
    /// Bits that are set and have no name, by place: `CPUID.7.1:EAX[13]`.
    pub unnamed: Vec<String>,
}

/// Family, model and stepping of an x86 CPU, with their extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpuSignature {
    /// Family.
    pub family: u32,
    /// Model.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
}
