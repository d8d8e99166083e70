//! Direct boot: kernel, initramfs, command line and the structures a kernel expects.
//!
//! For x86-64 guests that is what follows; for ARM see [`arm64`].
//!
//! Configuration comes in, bytes in guest memory and the state of the first vCPU go out; no KVM here.
//! Two protocols are spoken, chosen by what the kernel file is:
//!
//! | file | protocol | entry |
//! |---|---|---|
//! | ELF `vmlinux` (or firmware) with a PVH note | [PVH][pvh] | 32-bit, paging off, `rbx` = `hvm_start_info` |
//! | `bzImage` with a 64-bit entry point | [Linux 64-bit boot protocol][linux] | long mode, `rsi` = `boot_params` |
//!
//! The order of calls:
//!
//! 1. [`MemoryLayout::new`] from the machine's RAM and reserved ranges, [`BootLayout`] from the machine's constants;
//! 2. [`open_boot_file`] and [`load_kernel`], then, if there is one, [`load_initramfs`];
//! 3. [`write_boot_data`] with the command line and the RSDP's address, which returns a [`BootEntry`];
//! 4. [`CpuTables::write`] for the descriptor table and page tables that the entry's mode asks for.
//!
//! Nothing in a kernel file is believed before it was checked: the loaders were fuzzed with malformed
//! headers, never allocate by a length read from a file, and return one sentence with cause and fix.
//!
//! [pvh]: https://xenbits.xen.org/docs/unstable/misc/pvh.html
//! [linux]: https://www.kernel.org/doc/html/latest/arch/x86/boot.html

pub mod arm64;
mod boot_data;
mod bzimage;
mod cmdline;
mod cpu_tables;
mod elf;
mod identify;
mod initramfs;
mod kernel;
mod layout;
mod open;
mod pvh;
#[cfg(test)]
mod tests;
mod zero_page;

pub use boot_data::{BootDataError, BootEntry, BootParams, EntryMode, write_boot_data};
pub use cmdline::{CmdlineError, DEFAULT_CMDLINE_MAX, check_cmdline};
pub use cpu_tables::{CpuTables, SegmentSelectors};
pub use identify::{FileKind, GuestArch, identify};
pub use initramfs::{InitramfsError, InitramfsProblem, LoadedInitramfs, load_initramfs};
pub use kernel::{BootProtocol, KernelError, KernelProblem, LoadedKernel, load_kernel};
pub use layout::{BootLayout, BootTarget, LayoutError, MemKind, MemMapEntry, MemRange, MemoryLayout};
pub use open::{OpenError, open_boot_file};
pub use zero_page::SetupHeader;
