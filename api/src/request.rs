//! Requests as data: what a client asks and what it gets.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    CheckMigration, CpuFeatures, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, MemoryCounts,
    MigrationCheck, MigrationProgress, NetConfig, Operation, Phase, ReceiveMigration, ResizeZone, RestoreConfig,
    SendMigration, SetMigration, SnapshotConfig, VmConfig, VsockConfig, ZoneCounts,
};

/// What a client asks of the VMM, with all that belongs to it. [`Operation`] tells which phase accepts it.
#[derive(Debug)]
pub enum Request {
    /// Take this configuration.
    Create(Box<VmConfig>),
    /// Shut down if needed and forget the configuration.
    Delete,
    /// Build the guest and let it run.
    Boot,
    /// Let the guest stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Stop at once, without asking the guest.
    Shutdown,
    /// Stop at once and boot again.
    Reboot,
    /// Ask the guest to shut itself down.
    PowerButton,
    /// Interrupt every vCPU with an NMI.
    Nmi,
    /// Another number of vCPUs, another size of RAM.
    Resize(Resize),
    /// Another size of a memory zone.
    ResizeZone(ResizeZone),
    /// A disk grows.
    ResizeDisk(ResizeDisk),
    /// One more disk.
    AddDisk(Box<DiskConfig>),
    /// One more network interface; the descriptors are its tap, opened by the client, one a queue pair.
    AddNet(Box<NetConfig>, Vec<OwnedFd>),
    /// A file system that a daemon shares.
    AddFs(FsConfig),
    /// Any device that a daemon serves.
    AddGenericVhostUser(GenericVhostUserConfig),
    /// Sockets between guest and host.
    AddVsock(VsockConfig),
    /// One of the host's devices; the descriptors are its file, opened by the client, and, if the VM has none yet, /dev/iommu. By groups they
    /// are those of its group and /dev/vfio/vfio.
    AddDevice(DeviceConfig, Vec<OwnedFd>),
    /// Take a device away, by asking a guest that runs.
    RemoveDevice(RemoveDevice),
    /// Save the VM.
    Snapshot(SnapshotConfig),
    /// Make a VM from a snapshot; the descriptors are those of its taps that the client opened.
    Restore(RestoreConfig, Vec<OwnedFd>),
    /// Move the VM to another VMM; it is answered when that is over.
    SendMigration(Box<SendMigration>),
    /// Take a VM from another VMM; it is answered when the guest runs here. The descriptors are those of its taps that the client opened.
    ReceiveMigration(Box<ReceiveMigration>, Vec<OwnedFd>),
    /// Tell what would be in the way if the VM were moved.
    CheckMigration(Box<CheckMigration>),
    /// Change a migration that is under way.
    SetMigration(SetMigration),
    /// End a migration that is under way, and keep the guest where it is.
    CancelMigration,
    /// Tell how far a migration is.
    MigrationProgress,
    /// Tell what CPUs guests can have here, and what the guest that is there has.
    CpuFeatures,
    /// End the process.
    VmmShutdown,
}

impl Request {
    /// What it does.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Create(_) => Operation::Create,
            Self::Delete => Operation::Delete,
            Self::Boot => Operation::Boot,
            Self::Pause => Operation::Pause,
            Self::Resume => Operation::Resume,
            Self::Shutdown => Operation::Shutdown,
            Self::Reboot => Operation::Reboot,
            Self::PowerButton => Operation::PowerButton,
            Self::Nmi => Operation::Nmi,
            Self::Resize(_) => Operation::Resize,
            Self::ResizeZone(_) => Operation::ResizeZone,
            Self::ResizeDisk(_) => Operation::ResizeDisk,
            Self::AddDisk(_) => Operation::AddDisk,
            Self::AddNet(..) => Operation::AddNet,
            Self::AddFs(_) => Operation::AddFs,
            Self::AddGenericVhostUser(_) => Operation::AddGenericVhostUser,
            Self::AddVsock(_) => Operation::AddVsock,
            Self::AddDevice(..) => Operation::AddDevice,
            Self::RemoveDevice(_) => Operation::RemoveDevice,
            Self::Snapshot(_) => Operation::Snapshot,
            Self::Restore(..) => Operation::Restore,
            Self::SendMigration(_) => Operation::SendMigration,
            Self::ReceiveMigration(..) => Operation::ReceiveMigration,
            Self::CheckMigration(_) => Operation::CheckMigration,
            Self::SetMigration(_) => Operation::SetMigration,
            Self::CancelMigration => Operation::CancelMigration,
            Self::MigrationProgress => Operation::MigrationProgress,
            Self::CpuFeatures => Operation::CpuFeatures,
            Self::VmmShutdown => Operation::VmmShutdown,
        }
    }

    /// The route's name, for messages and audit lines.
    pub fn name(&self) -> &'static str {
        self.operation().name()
    }

    /// Whether it only asks: nothing changes, and nobody records it.
    pub fn is_question(&self) -> bool {
        matches!(self, Self::CpuFeatures | Self::MigrationProgress)
    }

    /// Whether a VM in `phase` accepts the request; if not, what the client is told.
    pub fn check(&self, phase: Phase) -> Result<(), ApiError> {
        self.operation().check(phase)
    }
}

/// Body of `vm.resize`: a target; what is absent stays as it is. A guest that runs is asked for another number of vCPUs or
/// for another amount of memory, and a job tells what comes of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct Resize {
    /// Number of vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 254)))]
    pub desired_vcpus: Option<u32>,
    /// Bytes of RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 1_048_576), extend("multipleOf" = 1_048_576)))]
    pub desired_ram: Option<u64>,
    /// Bytes of RAM that the balloon takes from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// Body of `vm.resize-disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ResizeDisk {
    /// The disk's id.
    pub id: String,
    /// Its new size in bytes: not less than it has, a multiple of 512.
    #[cfg_attr(feature = "openapi", schemars(extend("multipleOf" = 512)))]
    pub desired_size: u64,
}

/// Body of `vm.remove-device`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RemoveDevice {
    /// The device's id.
    pub id: String,
    /// Whether to take it without asking the guest, which may have it in use; also after it was asked and did nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// What a client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// What the CPUs can do.
    CpuFeatures(Box<CpuFeatures>),
    /// The guest that runs has one more device.
    Added(AddedDevice),
    /// How far a migration is.
    MigrationProgress(Box<MigrationProgress>),
    /// What would be in the way of one.
    MigrationCheck(Box<MigrationCheck>),
}

/// Answer to a device that was added to a guest that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct AddedDevice {
    /// Its id.
    pub id: String,
    /// Where its PCI function is, as in `0000:00:04.0`.
    pub bdf: String,
}

/// Body of `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VmInfo {
    /// Configuration as it is now, with the paths of terminals made for it.
    pub config: VmConfig,
    /// `Created`, `Running`, `Paused` or `Shutdown`.
    pub state: Phase,
    /// Bytes of RAM the guest has.
    pub memory_actual_size: u64,
    /// The devices of the guest by their ids; absent without a guest.
    #[serde(default, skip_serializing_if = "DeviceTree::is_empty")]
    pub device_tree: DeviceTree,
    /// How many vCPUs the guest has; absent without a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<VcpuCounts>,
    /// How much memory the guest has; absent without a guest, and for one whose memory cannot change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryCounts>,
    /// How much memory its zones have; absent without a guest, and for one whose memory is in one piece.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory_zones: Vec<ZoneCounts>,
    /// How its devices stand with the daemons that serve them, by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub links: BTreeMap<String, DeviceLink>,
}

/// How many vCPUs a guest has. Where the three differ, the guest has not done yet what it was asked for, or will not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VcpuCounts {
    /// It should have so many.
    pub target: u32,
    /// It was given so many.
    pub present: u32,
    /// Of these it had so many from its start, or has started since. `config.cpus.boot_vcpus` says the same.
    pub started: u32,
}

/// Devices by their ids: each PCI function, and the device behind it.
pub type DeviceTree = BTreeMap<String, DeviceNode>;

/// A device in `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct DeviceNode {
    /// Its id.
    pub id: String,
    /// Id of the device it is behind.
    pub parent: Option<String>,
    /// Ids of the devices behind it.
    pub children: Vec<String>,
    /// Where a PCI function is, as in `0000:00:01.0`.
    pub pci_bdf: Option<String>,
}

/// Whether a device has a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum LinkState {
    /// It has.
    Connected,
    /// It has none; its requests wait.
    Disconnected,
    /// It has none; its requests fail.
    Failing,
}

/// Who works on the guest's rings of a device that a daemon serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum LinkPath {
    /// The daemon.
    Direct,
    /// The VMM, which passes requests on to the daemon.
    Relay,
}

/// How a device stands with the daemon that serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct DeviceLink {
    /// Whether it has one.
    pub state: LinkState,
    /// How requests get to its daemon, or got to the one before.
    pub datapath: LinkPath,
    /// Why it has none, or why it had none the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When `state` began, in seconds since 1970.
    pub since: u64,
    /// How often a daemon came back.
    pub reconnects: u64,
    /// Requests that were given to a daemon again, because the one before did not answer them.
    pub resubmitted: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ApiError {
    /// 400: the request itself is wrong.
    #[error("{0}")]
    BadRequest(String),
    /// 404: what it speaks of does not exist.
    #[error("{0}")]
    NotFound(String),
    /// 409: not in this phase.
    #[error("{0}")]
    WrongPhase(String),
    /// 429: not before something else is done.
    #[error("{0}")]
    Busy(String),
    /// 501: this build does not have it.
    #[error("{0}")]
    Unsupported(String),
    /// 500: it was tried and failed.
    #[error("{0}")]
    Failed(String),
}

impl ApiError {
    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::BadRequest(_) => 400,
            Self::NotFound(_) => 404,
            Self::WrongPhase(_) => 409,
            Self::Busy(_) => 429,
            Self::Unsupported(_) => 501,
            Self::Failed(_) => 500,
        }
    }

    /// The same, beginning with the name of the route that failed.
    #[must_use]
    pub fn of_route(mut self, name: &str) -> Self {
        let (Self::BadRequest(text)
        | Self::NotFound(text)
        | Self::WrongPhase(text)
        | Self::Busy(text)
        | Self::Unsupported(text)
        | Self::Failed(text)) = &mut self;
        if !text.starts_with(name) {
            text.insert_str(0, &format!("{name}: "));
        }
        self
    }

    /// [`Failed`](Self::Failed) because of `error`: it and its causes as one sentence, the outermost first.
    pub fn failed(error: &dyn std::error::Error) -> Self {
        Self::Failed(chain(error))
    }

    /// [`BadRequest`](Self::BadRequest) because of `error`, told in the same way.
    pub fn bad_request(error: &dyn std::error::Error) -> Self {
        Self::BadRequest(chain(error))
    }
}

/// An error and its causes as one sentence, the outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_all_its_causes() {
        #[derive(Debug, Error)]
        #[error("cannot load the kernel")]
        struct Outer(#[source] std::fmt::Error);
        let error = ApiError::failed(&Outer(std::fmt::Error));
        let inner = std::fmt::Error.to_string();
        assert_eq!(error.to_string(), format!("cannot load the kernel: {inner}"));
    }
}
