//! Placing an initramfs.

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use crate::kernel::{BootProtocol, LoadedKernel};
use crate::layout::{BootTarget, MemRange, MemoryLayout};

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedInitramfs {
    /// Its first byte, page aligned.
    pub start: GuestAddress,
    /// Its length in bytes.
    pub size: u64,
}

/// An initramfs could not be loaded; the source says why and what to do.
#[derive(Debug, Error)]
#[error("cannot use initramfs '{}'", .path.display())]
pub struct InitramfsError {
    /// The file, as the user named it.
    pub path: PathBuf,
    /// The reason.
    pub source: InitramfsProblem,
}

/// What is wrong with an initramfs.
#[derive(Debug, Error)]
pub enum InitramfsProblem {
    /// The file cannot be read.
    #[error("reading the file failed")]
    Read(#[source] io::Error),
    /// The file has no bytes.
    #[error("the file is empty; give a cpio archive or leave the option out")]
    Empty,
    /// It is larger than the room that is left.
    #[error(
        "it has {size} bytes, but only {room} bytes of guest memory are free for it below {limit:#x} beside the kernel; \
         give the guest more memory or a smaller initramfs"
    )]
    TooLarge {
        /// Its length in bytes.
        size: u64,
        /// The largest that would fit, in bytes.
        room: u64,
        /// First address that it must not reach.
        limit: u64,
    },
    /// Guest memory refused the bytes.
    #[error("copying it into guest memory failed")]
    Memory(#[source] GuestMemoryError),
}

/// Loads the initramfs in `file` at the highest page of free RAM below the device hole and the kernel's own limit,
/// clear of the kernel; `path` is only for messages.
pub fn load_initramfs<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    kernel: &LoadedKernel,
    file: &mut File,
    path: &Path,
) -> Result<LoadedInitramfs, InitramfsError> {
    load(target, kernel, file).map_err(|source| InitramfsError {
        path: path.into(),
        source,
    })
}

fn load<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    kernel: &LoadedKernel,
    file: &mut File,
) -> Result<LoadedInitramfs, InitramfsProblem> {
    // Where memory ends below the hole, that is the limit worth naming.
    let kernel_limit = match &kernel.protocol {
        BootProtocol::Pvh => u64::from(u32::MAX) + 1,
        BootProtocol::Linux64 { setup_header } => u64::from(setup_header.initrd_addr_max.get()).saturating_add(1),
    };
    let limit = kernel_limit.min(target.layout.device_hole_start);
    let window = MemRange::from_bounds(target.layout.kernel_start, limit);
    place(target.mem, target.memory, &window, &kernel.occupied, file)
}

/// Loads the initramfs in `file` at the highest page inside of `window`, clear of `occupied`.
pub(crate) fn place<M: GuestMemory + ?Sized>(
    mem: &M,
    memory: &MemoryLayout,
    window: &MemRange,
    occupied: &[MemRange],
    file: &mut File,
) -> Result<LoadedInitramfs, InitramfsProblem> {
    let size = file.metadata().map_err(InitramfsProblem::Read)?.len();
    if size == 0 {
        return Err(InitramfsProblem::Empty);
    }
    let too_large = || InitramfsProblem::TooLarge {
        size,
        room: memory.largest_fit(window, occupied),
        limit: window.end(),
    };
    let start = memory.highest_fit(size, window, occupied).ok_or_else(too_large)?;
    let length = usize::try_from(size).map_err(|_| too_large())?;
    file.rewind().map_err(InitramfsProblem::Read)?;
    mem.read_exact_volatile_from(GuestAddress(start), file, length)
        .map_err(InitramfsProblem::Memory)?;
    Ok(LoadedInitramfs {
        start: GuestAddress(start),
        size,
    })
}
