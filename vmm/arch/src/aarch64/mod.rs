//! 64-bit ARM: GICv3 with ITS, PSCI, ACPI or a device tree.

mod board;
mod cpu;
mod describe;
pub mod layout;
mod load;
mod platform;
#[allow(unsafe_code)] // a register of the CPU, and what KVM's crate cannot ask
mod processor;
mod psci;
#[allow(unsafe_code)] // instructions for the guest
mod runtime;
pub mod state;

pub use board::{Board, BoardStateV1};
pub use cpu::{CpuError, CpuPlan, create_later, create_vcpus, set_entry};
pub use load::{Entry, load};
pub use platform::{Platform, inject_nmi};
pub use processor::{host_processor, saved_processor};
pub use state::{CpuPlanStateV1, PlatformStateV1, VcpuStateV1, recreate_vcpus, restore_time, restore_vcpu, save_vcpu};

/// System calls this architecture has beside the ones every architecture has: none, it came after them.
pub const OLDER_SYSCALLS: &[(i64, i64)] = &[];

/// Why the kernel cannot be handed what its boot protocol wants.
pub use triarch_boot::arm64::FdtError as BootError;

/// What an operating system needs to take CPUs while it runs.
pub const CPU_HOTPLUG_NEEDS: &str =
    "Linux needs version 6.11 or later, and somebody in the guest who brings new CPUs online";

/// What to do on a host without /dev/kvm. The host kernel has KVM built in and starts it only at EL2.
pub const WITHOUT_KVM: &str = "start this host's kernel at EL2 (`dmesg | grep kvm` tells why it has no KVM), not as a guest without nested virtualization";
