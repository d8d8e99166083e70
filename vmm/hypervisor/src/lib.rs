//! KVM: the VM, its vCPUs, interrupts and doorbells (Documentation/virt/kvm/api.rst of the Linux kernel).
//!
//! What differs between processor architectures (registers, CPUID, the interrupt controller's set-up) is in `triarch-arch`, which
//! works on the descriptors this crate hands out.

mod firmware;
mod groups;
mod interrupts;
#[allow(unsafe_code)] // the shared kvm_run page
mod vcpu;
#[allow(unsafe_code)] // memory slots take host addresses
mod vm;

pub use firmware::{Firmware, FirmwareStateV1, PsciV1, StartV1};
pub use groups::VfioGroups;
pub use interrupts::{Interrupts, Line};
pub use vcpu::{Exit, ImmediateExit, Vcpu};
pub use vm::{IoEventFds, MemorySlots, Vm};

use std::io;

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// The one version of the KVM interface there is.
const API_VERSION: i32 = 12;

/// Why the hypervisor could not be used.
#[derive(Debug, Error)]
pub enum HypervisorError {
    /// The device node is missing.
    #[error("/dev/kvm does not exist; {0}")]
    Missing(&'static str),
    /// The device node may not be opened.
    #[error("/dev/kvm may not be opened; add the user to the group kvm or run as root")]
    Permission,
    /// It exists and yet cannot be opened.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] io::Error),
    /// Some other device, or a file.
    #[error("/dev/kvm is there but is not KVM's device; check what is mounted or was made at that path")]
    NotKvm,
    /// Not the stable interface.
    #[error("/dev/kvm speaks version {0} of the interface, version {API_VERSION} is needed")]
    Version(i32),
    /// The kernel lacks something no guest can do without.
    #[error("the host kernel's KVM lacks {0}")]
    Capability(&'static str),
    /// An operation of KVM failed.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl HypervisorError {
    /// Wraps a failed KVM operation; for use with `map_err`.
    pub fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm {
            what,
            source: source.into(),
        }
    }
}

/// Opens KVM and checks that it has what every guest needs. `remedy` says in the imperative what a person can do where there is no KVM.
pub fn open(remedy: &'static str) -> Result<Kvm, HypervisorError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => HypervisorError::Missing(remedy),
        libc::EACCES | libc::EPERM => HypervisorError::Permission,
        _ => HypervisorError::Open(error.into()),
    })?;
    let version = kvm.get_api_version();
    if version < 0 {
        return Err(HypervisorError::NotKvm);
    }
    if version != API_VERSION {
        return Err(HypervisorError::Version(version));
    }
    let needed = [
        (Cap::Irqchip, "an interrupt controller in the kernel"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::UserMemory, "user memory regions"),
        (Cap::ImmediateExit, "immediate exit (Linux 4.13)"),
    ];
    for (capability, name) in needed {
        if !kvm.check_extension(capability) {
            return Err(HypervisorError::Capability(name));
        }
    }
    Ok(kvm)
}
