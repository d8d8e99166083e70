//! x86-64: Intel, AMD, Hygon.

mod board;
mod cpu;
pub mod layout;
mod load;
mod platform;
mod syscalls;

pub use board::{Board, BoardConfig, BoardError};
pub use cpu::{CpuError, CpuPlan, create_vcpus, set_entry};
pub use load::{Entry, LoadConfig, LoadError, load};
pub use platform::Platform;
pub use syscalls::OLDER_SYSCALLS;
