//! Why a guest could not be built or run.

use std::io;

use thiserror::Error;
use triarch_api::{ApiError, ConfigError};
use triarch_arch::{AddressLimit, BoardError, CpuError, LoadError, NmiError, StateError};
use triarch_hypervisor::HypervisorError;
use triarch_legacy::console::OpenError;
use triarch_memory::{MemoryError, UserfaultError};
use triarch_pci::AddError;
use triarch_sandbox::SandboxError;
use triarch_state::{PayloadError, SnapshotError};
use triarch_vcpu::VcpuError;
use triarch_vfio::DmaError;
use triarch_vhost_user::LinkError;

/// Why a guest could not be built or run. Each variant names the part; its source names the cause.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The configuration contradicts itself.
    #[error("the configuration is invalid")]
    Config(#[from] ConfigError),
    /// KVM.
    #[error("the hypervisor cannot be used")]
    Hypervisor(#[from] HypervisorError),
    /// Guest memory.
    #[error("cannot provide the guest's memory")]
    Memory(#[from] MemoryError),
    /// Guest memory's place.
    #[error("cannot place the guest's memory")]
    Address(#[from] AddressLimit),
    /// Guest memory, for devices of the host.
    #[error("cannot let devices of the host reach the guest's memory")]
    Dma(#[from] DmaError),
    /// vCPUs.
    #[error("cannot provide the guest's processors")]
    Cpu(#[from] CpuError),
    /// vCPU threads.
    #[error("cannot run the guest's processors")]
    Vcpu(#[from] VcpuError),
    /// Devices at fixed places.
    #[error("cannot set up the board")]
    Board(#[from] BoardError),
    /// Kernel, initramfs, tables.
    #[error("cannot load what the guest boots")]
    Load(#[from] LoadError),
    /// An interrupt that was asked for.
    #[error("cannot interrupt the guest")]
    Nmi(#[from] NmiError),
    /// A console.
    #[error("cannot open {device}")]
    Console {
        /// The flag that asked for it.
        device: &'static str,
        /// Cause.
        #[source]
        source: OpenError,
    },
    /// What somebody else opened for all devices of the host.
    #[error("cannot use what was opened for devices of the host")]
    Handed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A device that was asked for.
    #[error("cannot set up the device {id}")]
    Device {
        /// Its name.
        id: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device that has no place.
    #[error("cannot put the device {id} on the PCI bus")]
    Slot {
        /// Its name.
        id: String,
        /// Cause.
        #[source]
        source: AddError,
    },
    /// A guest that is moved.
    #[error("the guest cannot be moved: {0}")]
    Moved(String),
    /// Memory that a daemon of a device should map.
    #[error("the daemon of the device {id} cannot have the guest's memory")]
    Share {
        /// The device's name.
        id: String,
        /// Cause.
        #[source]
        source: LinkError,
    },
    /// The sandbox.
    #[error("cannot confine the VMM")]
    Sandbox(#[from] SandboxError),
    /// A snapshot.
    #[error("cannot use the snapshot")]
    Snapshot(#[from] SnapshotError),
    /// A snapshot that was to build on another one.
    #[error("not only what was written since {} can be saved: {why}", .base.display())]
    Base {
        /// The other one's directory.
        base: std::path::PathBuf,
        /// Why not, and what would do.
        why: String,
    },
    /// Daemons serve devices of a guest whose writes should be logged.
    #[error(
        "track_writes takes a VM without devices that daemons serve and without those of the host, since what they write is not logged, and {0} is \
         one; remove the device, or leave track_writes out"
    )]
    Unlogged(String),
    /// What is saved of the processors and interrupt controllers.
    #[error("cannot carry the guest's processors over")]
    State(#[from] StateError),
    /// Memory that comes on demand.
    #[error("memory cannot come on demand")]
    OnDemand(#[from] UserfaultError),
    /// Memory that was to come on demand.
    #[error("the guest has ended, since memory that was saved cannot be provided any more: {0}")]
    MemoryLost(String),
    /// A device, to be saved or restored.
    #[error("cannot carry the device {id} over")]
    Carry {
        /// Its name.
        id: String,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Descriptors, signals.
    #[error("cannot {what}")]
    Host {
        /// What failed.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The guest cannot go on.
    #[error("vCPU {index} failed: {reason}")]
    Guest {
        /// Index of the vCPU.
        index: usize,
        /// Why.
        reason: String,
    },
}

impl MachineError {
    /// Names what failed on the host; for use with `map_err`.
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// Names the device that failed, by its id.
    pub(crate) fn device(id: &Option<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Device {
            id: id.clone().unwrap_or_default(),
            source: source.into(),
        }
    }

    /// Whether the configuration is wrong whatever the host.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::Config(_) | Self::Cpu(CpuError::Topology(_)) | Self::Load(LoadError::Uuid(_))
        )
    }

    /// The error and all its causes in one line.
    pub fn chain(&self) -> String {
        triarch_api::chain(self)
    }

    /// Whether what the client configured cannot be had, so that another configuration would do; otherwise the host failed, or we did.
    fn another_configuration_would_do(&self) -> bool {
        match self {
            Self::Config(_)
            | Self::Address(_)
            | Self::Dma(_)
            | Self::Slot { .. }
            | Self::Moved(_)
            | Self::Base { .. }
            | Self::Unlogged(_) => true,
            Self::Cpu(cause) => !matches!(cause, CpuError::Kvm(_) | CpuError::Description(_)),
            // A mapping fails for want of pages: of the host's, or of its pool of huge ones.
            Self::Memory(cause) => !matches!(cause, MemoryError::MemFd { .. } | MemoryError::Layout(_)),
            Self::Load(cause) => !matches!(cause, LoadError::Acpi(_)) && !host_is_short(cause),
            Self::Console { source, .. } => {
                !matches!(source, OpenError::Events(_) | OpenError::Pty(_)) && !host_is_short(source)
            }
            Self::Handed(source) => !host_is_short(&**source),
            Self::Device { source, .. } | Self::Carry { source, .. } => !host_is_short(&**source),
            Self::Share { source, .. } => matches!(source, LinkError::Unfit(_)),
            Self::Snapshot(cause) => !host_is_short(cause),
            Self::State(cause) => !matches!(cause, StateError::Kvm(_) | StateError::Cpu(_)),
            Self::Board(BoardError::Saved { .. }) => true,
            // Another mode of restoring it would.
            Self::OnDemand(cause) => !matches!(cause, UserfaultError::Host { .. }),
            Self::Hypervisor(_)
            | Self::Vcpu(_)
            | Self::Board(_)
            | Self::Nmi(_)
            | Self::Sandbox(_)
            | Self::Host { .. }
            | Self::MemoryLost(_)
            | Self::Guest { .. } => false,
        }
    }
}

/// Whether the host ran out of descriptors or memory, or its disk failed, while it opened what it was told to.
fn host_is_short(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        let number = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        matches!(
            number,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EIO | libc::ENOSPC | libc::EDQUOT)
        )
    })
}

impl From<PayloadError> for MachineError {
    fn from(error: PayloadError) -> Self {
        Self::Snapshot(error.into())
    }
}

impl From<MachineError> for ApiError {
    /// What a client is told: 400 for what another configuration would mend, 500 for what it cannot.
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Config(cause) => Self::BadRequest(cause.to_string()),
            MachineError::Nmi(cause @ NmiError::Unsupported) => Self::Unsupported(cause.to_string()),
            other if other.another_configuration_would_do() => Self::bad_request(&other),
            other => Self::failed(&other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: MachineError) -> u16 {
        ApiError::from(error).status()
    }

    fn disk(number: i32) -> MachineError {
        MachineError::device(&Some("root".into()), io::Error::from_raw_os_error(number))
    }

    #[test]
    fn what_another_configuration_mends_is_a_bad_request() {
        assert_eq!(status(disk(libc::ENOENT)), 400);
        assert_eq!(status(disk(libc::EACCES)), 400);
        assert_eq!(status(disk(libc::EBUSY)), 400);
        let asked = MemoryError::MoreThanHost { asked: 2, host: 1 };
        assert_eq!(status(asked.into()), 400);
        assert_eq!(status(MemoryError::HugePageSize(3).into()), 400);
        let file = OpenError::File {
            path: "log".into(),
            source: io::Error::from_raw_os_error(libc::EACCES),
        };
        let console = |source| MachineError::Console {
            device: "--serial",
            source,
        };
        assert_eq!(status(console(file)), 400);
        assert_eq!(status(console(OpenError::InUse("s".into()))), 400);
    }

    #[test]
    fn what_the_host_lacks_is_a_failure() {
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EIO] {
            assert_eq!(status(disk(number)), 500, "{number}");
        }
        let failed = || io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(status(MachineError::host("do it")(failed())), 500);
        let console = |source| MachineError::Console {
            device: "--serial",
            source,
        };
        assert_eq!(status(console(OpenError::Pty(failed()))), 500);
    }

    #[test]
    fn a_bad_request_tells_all_its_causes() {
        let text = ApiError::from(disk(libc::ENOENT)).to_string();
        assert!(
            text.starts_with("cannot set up the device root: No such file"),
            "{text}"
        );
    }
}
