//! Reads guest memory for whoever copies all of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use crate::GuestRegion;

/// Fills `buffer` with what `region` has from `offset` on, while nobody writes there; `false`: all of it is zeroes, and the buffer is as it
/// was. What the host never gave the guest, or has back, is not made to be there by this where the region is a file's.
///
/// # Errors
/// It is not all in the region, or the host cannot read it.
pub fn read_content(region: &GuestRegion, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
    let len = buffer.len() as u64;
    if offset.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let shared = region.flags() & libc::MAP_SHARED != 0;
    match region.file_offset().filter(|_| shared) {
        Some(backing) => {
            let start = backing.start() + offset;
            if !has_data(backing.file(), start, len) {
                return Ok(false);
            }
            backing.file().read_exact_at(buffer, start)?;
        }
        // A private copy may differ from its file.
        None => region
            .read_slice(buffer, MemoryRegionAddress(offset))
            .map_err(io::Error::other)?,
    }
    Ok(true)
}

/// Whether a file may have anything but zeroes there.
fn has_data(file: &File, start: u64, len: u64) -> bool {
    // SAFETY: the call takes no pointers. Nobody uses the place it moves: all else that is read of these files is read at an offset.
    let next = unsafe { libc::lseek64(file.as_raw_fd(), start as i64, libc::SEEK_DATA) };
    if next < 0 {
        // Nothing behind it either; or a file system that cannot tell.
        return io::Error::last_os_error().raw_os_error() != Some(libc::ENXIO);
    }
    (next as u64) < start.saturating_add(len)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{RamOptions, allocate};

    const MIB: u64 = 1 << 20;

    #[test]
    fn content_is_read_and_what_is_not_there_stays_so() {
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                thp: false,
                ..RamOptions::default()
            };
            let ranges = [(GuestAddress(0), 2 * MIB), (GuestAddress(8 * MIB), 4 * MIB)];
            let memory = allocate(&ranges, &options).expect("allocate");
            let region = memory.find_region(GuestAddress(8 * MIB)).expect("a region");
            region
                .write_slice(&[7; 3], MemoryRegionAddress(MIB + 5))
                .expect("write");
            let mut buffer = vec![1; MIB as usize];
            assert!(read_content(region, MIB, &mut buffer).expect("read"), "shared {shared}");
            assert_eq!((&buffer[4..9], buffer[0]), (&[0, 7, 7, 7, 0][..], 0));
            let mut buffer = vec![1; MIB as usize];
            let filled = read_content(region, 2 * MIB, &mut buffer).expect("read");
            assert_eq!(filled, !shared);
            assert!(buffer.iter().all(|byte| *byte == u8::from(!filled)));
            if let Some(backing) = region.file_offset() {
                let held = backing.file().metadata().expect("a file").blocks() * 512;
                assert_eq!(held, 4096, "reading takes nothing");
            }
            assert!(read_content(region, 4 * MIB, &mut buffer).is_err());
            assert!(read_content(region, u64::MAX, &mut buffer).is_err());
        }
    }
}
