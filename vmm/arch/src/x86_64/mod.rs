//! x86-64: Intel, AMD, Hygon.

mod cpu;
pub mod layout;
mod platform;

pub use cpu::{CpuError, CpuPlan, create_vcpus, set_entry};
pub use platform::Platform;
