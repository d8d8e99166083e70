//! What a source tells of its guest before its memory is moved, and what it sends beside the state of devices and processors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use triarch_arch::CpuPlanStateV1;
use triarch_cpu_model::GuestProcessor;
use triarch_state::Kind;

/// A guest that is offered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OfferedV1 {
    /// Processor architecture.
    pub(super) arch: String,
    /// Its configuration, as `vm.info` has it.
    pub(super) config: Map<String, Value>,
    /// Bytes of the disks that the VMM itself serves, by their ids.
    pub(super) disks: BTreeMap<String, u64>,
}

/// Its processors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OfferedCpusV1 {
    /// What they are made from.
    pub(super) plan: CpuPlanStateV1,
    /// What each of them is, if the source knows.
    pub(super) processor: Option<GuestProcessor>,
}

/// How a guest goes on that was moved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MovedV1 {
    /// A client had paused it.
    pub(super) paused: bool,
}

/// The payload of that.
pub(super) const MOVED: Kind = Kind::new("moved", 1);
