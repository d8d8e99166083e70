//! The last step: command line, memory map and the structure that the entry point is handed.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};
use zerocopy::IntoBytes;

use crate::cmdline::{CmdlineError, DEFAULT_CMDLINE_MAX, check_cmdline};
use crate::initramfs::LoadedInitramfs;
use crate::kernel::{BootProtocol, LoadedKernel};
use crate::layout::BootTarget;
use crate::pvh;
use crate::zero_page::{E820_MAX, ZeroPage, ZeroPageContents};

/// CPU mode at the entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 32-bit protected mode, flat segments, paging off.
    Pvh32,
    /// Long mode, identity-mapped, flat segments.
    Long64,
}

/// State of the first vCPU at its first instruction. Interrupts are off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootEntry {
    /// The mode.
    pub mode: EntryMode,
    /// The instruction pointer.
    pub rip: GuestAddress,
    /// The boot structure: goes into `rbx` for [`EntryMode::Pvh32`], into `rsi` for [`EntryMode::Long64`].
    pub params: GuestAddress,
}

/// What to tell the kernel.
#[derive(Clone, Copy, Debug)]
pub struct BootParams<'a> {
    /// The loaded kernel.
    pub kernel: &'a LoadedKernel,
    /// The loaded initramfs, if there is one.
    pub initramfs: Option<LoadedInitramfs>,
    /// The command line, without NUL.
    pub cmdline: &'a str,
    /// Where the ACPI root pointer is; without it a kernel searches the BIOS areas.
    pub rsdp: Option<GuestAddress>,
}

/// Why the boot structures could not be written.
#[derive(Debug, Error)]
pub enum BootDataError {
    /// The command line does not do.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The memory map is longer than the protocols carry.
    #[error("the memory map has {len} entries and the boot protocols carry {max}")]
    TooManyRanges {
        /// Its entries.
        len: usize,
        /// The most.
        max: usize,
    },
    /// Guest memory refused the bytes.
    #[error("writing the kernel's boot data into guest memory failed")]
    Memory(#[from] GuestMemoryError),
}

impl BootProtocol {
    /// The longest command line that this kernel reads, in bytes without NUL.
    pub fn cmdline_max(&self) -> usize {
        match self {
            Self::Pvh => DEFAULT_CMDLINE_MAX,
            Self::Linux64 { setup_header } => match setup_header.cmdline_size.get() {
                0 => DEFAULT_CMDLINE_MAX,
                size => size as usize,
            },
        }
    }
}

/// Writes command line, memory map and the protocol's structure, and says how to start the first vCPU.
pub fn write_boot_data<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    params: &BootParams<'_>,
) -> Result<BootEntry, BootDataError> {
    let layout = target.layout;
    let room = (layout.cmdline_size as usize).saturating_sub(1);
    check_cmdline(params.cmdline, params.kernel.protocol.cmdline_max().min(room))?;
    let map = target.memory.map();
    let max = E820_MAX.min(pvh::MAP_MAX);
    if map.len() > max {
        return Err(BootDataError::TooManyRanges { len: map.len(), max });
    }

    let mut cmdline = params.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    target.mem.write_slice(&cmdline, GuestAddress(layout.cmdline))?;

    let initramfs = params.initramfs.map(|i| (i.start.0, i.size));
    let rsdp = params.rsdp.map_or(0, |at| at.0);
    let (mode, at) = match &params.kernel.protocol {
        BootProtocol::Pvh => {
            let page = pvh::start_info(layout.start_info, layout.cmdline, initramfs, rsdp, &map);
            target.mem.write_slice(&page, GuestAddress(layout.start_info))?;
            (EntryMode::Pvh32, layout.start_info)
        }
        BootProtocol::Linux64 { setup_header } => {
            let page = ZeroPage::new(&ZeroPageContents {
                setup_header,
                cmdline_at: layout.cmdline,
                initramfs,
                rsdp,
                map: &map,
            });
            target
                .mem
                .write_slice(page.as_bytes(), GuestAddress(layout.zero_page))?;
            (EntryMode::Long64, layout.zero_page)
        }
    };
    Ok(BootEntry {
        mode,
        rip: params.kernel.entry,
        params: GuestAddress(at),
    })
}
