//! x86-64: Intel, AMD, Hygon.

mod board;
mod cpu;
pub mod layout;
mod load;
mod platform;
mod syscalls;

pub use board::{Board, BoardError};
pub use cpu::{CpuError, CpuPlan, create_vcpus, set_entry};
pub use load::{Entry, LoadError, load};
pub use platform::{Platform, inject_nmi};
pub use syscalls::OLDER_SYSCALLS;
