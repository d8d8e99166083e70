//! Why a guest could not be built or run.

use std::io;

use thiserror::Error;
use triarch_api::{ApiError, ConfigError};
use triarch_arch::{AddressLimit, BoardError, CpuError, LoadError, NmiError};
use triarch_hypervisor::HypervisorError;
use triarch_legacy::console::OpenError;
use triarch_memory::MemoryError;
use triarch_pci::AddError;
use triarch_sandbox::SandboxError;
use triarch_vcpu::VcpuError;

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
    /// The sandbox.
    #[error("cannot confine the VMM")]
    Sandbox(#[from] SandboxError),
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
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl From<MachineError> for ApiError {
    /// What a client is told.
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Config(cause) => Self::BadRequest(cause.to_string()),
            MachineError::Nmi(cause @ NmiError::Unsupported) => Self::Unsupported(cause.to_string()),
            other => Self::failed(&other),
        }
    }
}
