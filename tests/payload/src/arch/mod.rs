//! All that depends on the processor and its platform. Nothing outside of this directory does.
//!
//! Each architecture is a directory with the same modules:
//!
//! | module | what it offers the rest |
//! |---|---|
//! | `boot` | `HEAP`; `read`: what the VMM told at entry; `rsdp_places`: where else to look for ACPI |
//! | `clock` | `ticks`, `khz` |
//! | `commands` | `run`: the commands that only this architecture has; `power` |
//! | `config` | `Ports`: a second way to PCI configuration space, if there is one |
//! | `interrupts` | `init`, `init_processor`, `processor_id`, `wake`, `wait`, `connect` |
//! | `io` | `Mmio`: device registers |
//! | `paging` | `map` |
//! | `power` | `park` |
//! | `smp` | `start`: brings a processor to [`processor_main`](crate::smp) |
//! | `uart` | `init`, `write`, `read_byte`, `VECTOR` |

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub use aarch64::*;

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
