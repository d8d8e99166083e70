//! Block sizes of files and block devices.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use crate::IoBuf;
use crate::error::OpenError;
use crate::sys::{self, DirectAlignment};

const SECTOR: u32 = 512;

/// Block sizes of a disk, all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Unit of addressing: positions and lengths of operations are multiples of it.
    pub logical_block: u32,
    /// Unit the storage writes without reading first, a power-of-two multiple of `logical_block`.
    pub physical_block: u32,
    /// Smallest I/O the storage likes, at least `physical_block`.
    pub minimum_io: u32,
    /// I/O size the storage likes best; 0 if it does not say.
    pub optimal_io: u32,
    /// Unit in which discarded storage is released; 0 if the disk cannot discard.
    pub discard_granularity: u32,
}

/// What direct I/O needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectAlign {
    /// Alignment of buffer addresses.
    pub(crate) memory: u32,
    /// Alignment of positions and lengths.
    pub(crate) offset: u32,
}

impl DirectAlign {
    /// Whether a buffer can be used as it is.
    pub(crate) fn fits(self, buf: &IoBuf) -> bool {
        (buf.iovec().iov_base as usize).is_multiple_of(self.memory as usize)
            && buf.len().is_multiple_of(self.offset as usize)
    }
}

/// Finds out the alignment for a file that is open with `O_DIRECT`: from `statx` where the kernel knows, from the
/// device, else by trying.
pub(crate) fn direct(file: &File, device: bool, path: &Path) -> Result<DirectAlign, OpenError> {
    let found = match sys::direct_alignment(file.as_fd()) {
        DirectAlignment::Known { memory, offset } => Some((memory, offset)),
        DirectAlignment::Unsupported => None,
        DirectAlignment::Unknown if device => sys::device_logical_block(file.as_fd()).ok().map(|block| (block, block)),
        DirectAlignment::Unknown => [512, 1024, 2048, 4096]
            .into_iter()
            .find(|len| can_read(file, *len))
            .map(|len| (len, len)),
    };
    match found {
        Some((memory, offset)) if memory.is_power_of_two() && offset.is_power_of_two() => {
            Ok(DirectAlign { memory, offset })
        }
        _ => Err(OpenError::NoDirect { path: path.to_owned() }),
    }
}

/// Whether a direct read of `len` bytes is accepted. Its buffer is aligned to exactly `len`, because
/// older kernels want addresses aligned like lengths.
fn can_read(file: &File, len: u32) -> bool {
    let len = len as usize;
    let mut memory = vec![0u8; 3 * len];
    let address = memory.as_ptr() as usize;
    // An odd multiple of `len` exists among any two successive ones.
    let mut start = address.next_multiple_of(len) - address;
    if ((address + start) / len).is_multiple_of(2) {
        start += len;
    }
    file.read_at(&mut memory[start..start + len], 0).is_ok()
}

/// Finds out the block sizes of an opened disk.
pub(crate) fn probe(file: &File, metadata: &Metadata, direct: Option<DirectAlign>) -> io::Result<Geometry> {
    let wanted = direct.map_or(SECTOR, |d| d.offset.max(SECTOR));
    if metadata.file_type().is_block_device() {
        let fd = file.as_fd();
        let logical_block = sys::device_logical_block(fd)?.max(wanted);
        let physical_block = multiple(sys::device_physical_block(fd)?, logical_block);
        Ok(Geometry {
            logical_block,
            physical_block,
            minimum_io: multiple(sys::device_minimum_io(fd)?, logical_block).max(physical_block),
            optimal_io: sys::device_optimal_io(fd)? / logical_block * logical_block,
            discard_granularity: device_discard_granularity(metadata.rdev()),
        })
    } else {
        // Above a page, st_blksize is a wish about transfer sizes (network file systems), not a block.
        let physical_block = multiple((metadata.blksize() as u32).min(4096), wanted);
        Ok(Geometry {
            logical_block: wanted,
            physical_block,
            minimum_io: physical_block,
            optimal_io: 0,
            discard_granularity: physical_block,
        })
    }
}

/// `size` if it is a power of two and at least `block`, else `block`.
fn multiple(size: u32, block: u32) -> u32 {
    if size.is_power_of_two() { size.max(block) } else { block }
}

/// The discard granularity of a device from sysfs; 0 where the device cannot discard. There is no ioctl for it.
fn device_discard_granularity(rdev: u64) -> u32 {
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    let read = |name: &str| -> Option<u64> {
        // A partition has no queue of its own; its parent's is one level up.
        ["queue", "../queue"].iter().find_map(|queue| {
            let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        })
    };
    match read("discard_max_bytes") {
        // Without sysfs nothing is known: a discard that fails is harmless, so allow it.
        None => SECTOR,
        Some(0) => 0,
        Some(_) => read("discard_granularity")
            .and_then(|g| u32::try_from(g).ok())
            .unwrap_or(SECTOR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_no_multiple_are_not_believed() {
        assert_eq!(multiple(4096, 512), 4096);
        assert_eq!(multiple(512, 4096), 4096);
        assert_eq!(multiple(0, 512), 512);
        assert_eq!(multiple(3000, 512), 512);
    }

    #[test]
    fn page_cache_reads_of_any_length_work() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!([512, 1024, 2048, 4096].into_iter().all(|len| can_read(&file, len)));
    }
}
