//! x86-64: Intel, AMD, Hygon.

mod cpu;
pub mod layout;
mod platform;
mod syscalls;

pub use cpu::{CpuError, CpuPlan, create_vcpus, set_entry};
pub use platform::Platform;
pub use syscalls::OLDER_SYSCALLS;
