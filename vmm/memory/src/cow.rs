//! Memory that begins as the contents of a file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::GuestMemoryRegion;

use crate::ram::advise_region;
use crate::{GuestRegion, MemoryError, RamOptions};

/// Puts `file`, from `offset` on, in the place of all of `region`, whose memory is this process's own: what is read comes from the file,
/// and a page that is written is copied first. Nobody may change the file or cut it short while the region is there.
///
/// # Errors
/// The region is shared or of huge pages, the file is too short, or the host refuses.
pub fn map_copy_on_write(
    region: &GuestRegion,
    options: &RamOptions,
    file: &File,
    offset: u64,
) -> Result<(), MemoryError> {
    let size = region.len();
    let failed = |source| MemoryError::Contents { size, source };
    let len = file.metadata().map_err(failed)?.len();
    let fits = offset.checked_add(size).is_some_and(|end| end <= len);
    if region.file_offset().is_some() || !options.copy_on_write || !fits {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    remap(region, 0, size, Some((file, offset))).map_err(failed)?;
    advise_region(region, options)
}

/// Puts fresh zeroes in the place of `len` bytes from `offset` of `region`, which may be a file's.
pub(crate) fn renew(region: &GuestRegion, offset: u64, len: u64, options: &RamOptions) -> io::Result<()> {
    remap(region, offset, len, None)?;
    // What it was told of before goes with the mapping.
    if let Some(node) = options.host_node {
        crate::node::bind(region, offset, len, node)?;
    }
    crate::ram::advise_range(region, offset, len, options);
    Ok(())
}

/// Maps the file, or zeroes, in the place of what is there.
fn remap(region: &GuestRegion, offset: u64, len: u64, file: Option<(&File, u64)>) -> io::Result<()> {
    let end = offset.checked_add(len).filter(|end| len > 0 && *end <= region.len());
    if end.is_none() || !offset.is_multiple_of(4096) || !len.is_multiple_of(4096) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (flags, fd, from) = match file {
        Some((file, from)) => (0, file.as_raw_fd(), from as i64),
        None => (libc::MAP_ANONYMOUS, -1, 0),
    };
    let start = region.as_ptr().wrapping_add(offset as usize);
    // SAFETY: the range is whole pages inside of a live mapping of ours, which keeps its place and its access: whoever has the region
    // reads and writes there as before. Its contents belong to the guest, which expects them to change at any time; nothing in this
    // process holds a reference to them.
    let mapped = unsafe {
        libc::mmap64(
            start.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | flags,
            fd,
            from,
        )
    };
    match mapped == libc::MAP_FAILED {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::{Discarder, GuestMemoryHandle, allocate};

    const MIB: u64 = 1 << 20;

    fn file(size: u64) -> File {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"saved".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).expect("a size");
        file
    }

    #[test]
    fn what_is_read_is_the_files_and_what_is_written_is_ours() {
        let options = RamOptions {
            copy_on_write: true,
            ..RamOptions::default()
        };
        let saved = file(3 * MIB);
        saved.write_all_at(&[5; 64 << 10], MIB).expect("write");
        let ranges = [(GuestAddress(8 * MIB), MIB)];
        let memory = GuestMemoryHandle::new(allocate(&ranges, &options).expect("allocate"));
        let map = memory.memory();
        let region = map.find_region(GuestAddress(8 * MIB)).expect("a region");
        assert!(
            map_copy_on_write(region, &options, &saved, 2 * MIB + 4096).is_err(),
            "too short"
        );
        map_copy_on_write(region, &options, &saved, MIB).expect("map");
        let byte = |at| map.read_obj::<u8>(GuestAddress(at)).expect("memory");
        assert_eq!([8 * MIB, 8 * MIB + 65535, 8 * MIB + 65536].map(byte), [5, 5, 0]);
        map.write_obj(9u8, GuestAddress(8 * MIB)).expect("write");
        let mut first = [0];
        saved.read_exact_at(&mut first, MIB).expect("read");
        assert_eq!((byte(8 * MIB), first), (9, [5]));
        // What is given back is zeroes and not what the file has.
        let discarder = Discarder::new(memory.clone(), options).expect("a page size");
        discarder.discard(GuestAddress(8 * MIB), 8192).expect("discard");
        assert_eq!([8 * MIB, 8 * MIB + 8191, 8 * MIB + 8192].map(byte), [0, 0, 5]);
    }

    #[test]
    fn shared_memory_is_not_mapped_over() {
        let options = RamOptions {
            shared: true,
            copy_on_write: true,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(0), MIB)], &options).expect("allocate");
        let region = memory.find_region(GuestAddress(0)).expect("a region");
        assert!(map_copy_on_write(region, &options, &file(MIB), 0).is_err());
    }
}
