//! What a source tells of its guest before its memory is moved, and what it sends beside the state of devices and processors.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use triarch_arch::{CpuPlanStateV1, HexBytes};
use triarch_block::Disk;
use triarch_cpu_model::GuestProcessor;
use triarch_state::Kind;
use triarch_vhost_user::Offer;

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
    /// Which files these are.
    #[serde(default)]
    pub(super) files: FilesV1,
    /// What it was shown of the devices that daemons serve, by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) served: BTreeMap<String, ServedV1>,
    /// Of what kind the devices of the host are that go with it, by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) hosts: BTreeMap<String, String>,
}

/// Files of the source's host, for a destination that may be on the same one.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FilesV1 {
    /// What tells the host from others, as long as it is not booted anew. Empty: it is not known.
    pub(super) host: String,
    /// The numbers of their file systems and their own, by the ids of the disks.
    pub(super) numbers: BTreeMap<String, (u64, u64)>,
}

impl FilesV1 {
    /// Those of `disks` on this host.
    pub(super) fn of<'a>(disks: impl Iterator<Item = (&'a str, &'a Arc<Disk>)>) -> Self {
        let numbers = disks.filter_map(|(id, disk)| Some((id.to_owned(), disk.identity().ok()?)));
        Self {
            host: this_host(),
            numbers: numbers.collect(),
        }
    }

    /// Whether `disk` is another file of this host than the source's disk `id`; false where that is not known.
    pub(super) fn differs(&self, id: &str, disk: &Disk) -> bool {
        let here = !self.host.is_empty() && self.host == this_host();
        match (self.numbers.get(id), disk.identity()) {
            (Some(theirs), Ok(ours)) => here && *theirs != ours,
            _ => false,
        }
    }
}

/// What a guest was shown of a device that a daemon serves.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServedV1 {
    features: u64,
    /// How many queues its daemon serves at most, as it counts them.
    queues: u64,
    /// The configuration space.
    config: HexBytes,
}

impl From<Offer> for ServedV1 {
    fn from(offer: Offer) -> Self {
        Self {
            features: offer.features,
            queues: offer.queues,
            config: HexBytes(offer.config),
        }
    }
}

/// Linux' number for the time since this host was booted (random(4)).
fn this_host() -> String {
    let number = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    number.trim().to_owned()
}

impl From<ServedV1> for Offer {
    fn from(served: ServedV1) -> Self {
        Self {
            features: served.features,
            queues: served.queues,
            config: served.config.0,
        }
    }
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
