//! x86-64: Intel, AMD, Hygon.

mod board;
mod cpu;
pub mod layout;
mod load;
mod platform;
mod processor;
pub mod state;
mod syscalls;

pub use board::{Board, BoardStateV1};
pub use cpu::{CpuError, CpuPlan, create_later, create_vcpus, set_entry};
pub use load::{Entry, load};
pub use platform::{Platform, inject_nmi};
pub use processor::{host_processor, saved_processor};
pub use state::{CpuPlanStateV1, PlatformStateV1, VcpuStateV1, recreate_vcpus, restore_time, restore_vcpu, save_vcpu};
pub use syscalls::OLDER_SYSCALLS;

/// Why the kernel cannot be handed what its boot protocol wants.
pub use triarch_boot::BootDataError as BootError;

/// What an operating system needs to take CPUs while it runs.
pub const CPU_HOTPLUG_NEEDS: &str =
    "Linux needs CONFIG_ACPI_HOTPLUG_CPU, and somebody in the guest who brings new CPUs online";

/// What to do on a host without /dev/kvm.
pub const WITHOUT_KVM: &str =
    "load the kvm module of this CPU (kvm_intel, kvm_amd) or enable virtualization in the firmware";
