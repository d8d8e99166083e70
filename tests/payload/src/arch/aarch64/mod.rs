//! AArch64: entered as a Linux kernel would be, at EL1 with the MMU off, and staying at EL1 (boot.s).

pub mod boot;
pub mod clock;
pub mod commands;
pub mod config;
mod fault;
mod fdt;
mod gic;
pub mod interrupts;
pub mod io;
mod its;
mod memops;
pub mod paging;
pub mod power;
pub mod smp;
pub mod uart;

/// Its name.
pub const NAME: &str = "aarch64";
