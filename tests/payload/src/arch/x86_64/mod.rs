//! x86-64: entered by PVH, running in ring 3 (boot.s tells how ring 3 and ring 0 share the work).

pub mod boot;
pub mod clock;
pub mod commands;
pub mod config;
mod fault;
pub mod interrupts;
pub mod io;
mod memops;
pub mod paging;
mod ring0;
pub mod smp;
pub mod uart;

/// Ends of a processor.
pub mod power {
    pub use super::ring0::park;
}

/// Its name.
pub const NAME: &str = "x86_64";
