//! Memory that another process of this host had, and handed over as files (memfd_create(2), unix(7)).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryRegion};

use crate::ram::{self, memfd, page_size};
use crate::{GuestMemory, GuestRegion, MemoryError, RamOptions};

/// Seals without which whoever else has the file could cut it short: touching what is gone would kill us.
const WANTED: libc::c_int = libc::F_SEAL_SHRINK;
/// Seals with which a guest could not write.
const UNWANTED: libc::c_int = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;

/// Why a descriptor cannot be a guest's memory.
#[derive(Debug, Error)]
pub enum HandedError {
    /// It cannot be looked at.
    #[error("a descriptor that was handed over cannot be looked at")]
    Host(#[source] io::Error),
    /// A regular file, a device, a socket.
    #[error("a descriptor that was handed over is no memory file (memfd)")]
    Kind,
    /// Others could cut it short, or the guest cannot write.
    #[error(
        "a memory file that was handed over has the seals {found:#x}: it must be sealed against shrinking, and not against writing"
    )]
    Seals {
        /// F_SEAL_*.
        found: libc::c_int,
    },
    /// Another size.
    #[error("a memory file that was handed over has {found} bytes where the guest has {expected}")]
    Size {
        /// What it has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// Other pages.
    #[error("a memory file that was handed over has pages of {found} bytes where this configuration wants {expected}")]
    Pages {
        /// What it has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// This guest is to have memory of its own.
    #[error("memory was handed over, and this configuration has it private: leave shared on")]
    Private,
}

/// What tells a file from others, as long as it is open.
pub type Identity = (u64, u64);

/// Whether `file` can be `size` bytes of memory made with `options`; which one it is.
///
/// # Errors
/// It is no memfd, or another one.
pub fn check_handed(file: &File, size: u64, options: &RamOptions) -> Result<Identity, HandedError> {
    if !options.shared {
        return Err(HandedError::Private);
    }
    // SAFETY: the call takes no pointers, and changes nothing.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(HandedError::Kind);
    }
    if seals & WANTED != WANTED || seals & UNWANTED != 0 {
        return Err(HandedError::Seals { found: seals });
    }
    let found = file.metadata().map_err(HandedError::Host)?;
    if found.len() != size {
        return Err(HandedError::Size {
            found: found.len(),
            expected: size,
        });
    }
    let (pages, expected) = (
        pages(file)?,
        page_size(options).map_err(|error| HandedError::Host(io::Error::other(error)))?,
    );
    match pages == expected {
        true => Ok((found.dev(), found.ino())),
        false => Err(HandedError::Pages { found: pages, expected }),
    }
}

/// Bytes of the pages of a memory file: those of the pool, or the host's smallest.
fn pages(file: &File) -> Result<u64, HandedError> {
    // SAFETY: all zeroes is a valid `statfs`, which the kernel then fills.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a `statfs` that outlives the call.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut info) } != 0 {
        return Err(HandedError::Host(io::Error::last_os_error()));
    }
    #[allow(clippy::unnecessary_cast)] // their width is the architecture's
    match info.f_type as u64 == libc::HUGETLBFS_MAGIC as u64 {
        true => Ok(info.f_bsize as u64),
        false => page_size(&RamOptions::default()).map_err(|error| HandedError::Host(io::Error::other(error))),
    }
}

/// As [`allocate`](crate::allocate), of `file`, which [`check_handed`] approved for all of `ranges` together. What is in it stays, and so do
/// its holes: nothing is prefaulted.
pub fn adopt(ranges: &[(GuestAddress, u64)], options: &RamOptions, file: &File) -> Result<GuestMemory, MemoryError> {
    options.host_node.map_or(Ok(()), crate::node::check)?;
    ram::regions(ranges, &kept(options), Some(file))
}

/// The same of one region by itself, which is all of `file`.
pub fn adopt_region(
    base: GuestAddress,
    size: u64,
    options: &RamOptions,
    file: &File,
) -> Result<Arc<GuestRegion>, MemoryError> {
    let made = adopt(&[(base, size)], options, file)?;
    match made.remove_region(base, size) {
        Ok((_, region)) => Ok(region),
        Err(error) => Err(MemoryError::Layout(error)),
    }
}

/// How memory is mapped that is there.
pub(crate) fn kept(options: &RamOptions) -> RamOptions {
    RamOptions {
        prefault: false,
        ..*options
    }
}

/// The file that has `region`, and where in it the region begins; `None` if no other process can have it.
pub fn file_of(region: &GuestRegion) -> Option<(&File, u64)> {
    let shared = region.flags() & libc::MAP_SHARED != 0;
    let backing = region.file_offset().filter(|_| shared)?;
    Some((backing.file(), backing.start()))
}

/// A file of `size` bytes of memory for two processes, which neither can cut short.
pub fn shared_file(size: u64) -> Result<File, MemoryError> {
    memfd(size, &RamOptions::default())
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::{SparseMemory, allocate};

    const MIB: u64 = 1 << 20;

    fn shared() -> RamOptions {
        RamOptions {
            shared: true,
            prefault: true,
            ..RamOptions::default()
        }
    }

    /// Without seals.
    fn memory_file(size: u64, flags: libc::c_uint) -> File {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | flags) };
        assert!(fd >= 0);
        // SAFETY: the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).expect("a size");
        file
    }

    #[test]
    fn what_was_handed_over_is_there_and_its_holes_are_holes() {
        let ranges = [(GuestAddress(0), 2 * MIB), (GuestAddress(8 * MIB), 4 * MIB)];
        let options = RamOptions {
            prefault: false,
            ..shared()
        };
        let before = allocate(&ranges, &options).expect("allocate");
        before.write_obj(7u8, GuestAddress(9 * MIB)).expect("write");
        let region = before.find_region(GuestAddress(8 * MIB)).expect("a region");
        let (file, offset) = file_of(region).expect("a file");
        assert_eq!(offset, 2 * MIB);
        check_handed(file, 6 * MIB, &shared()).expect("its own memory");
        let file = file.try_clone().expect("a copy");
        let after = adopt(&ranges, &shared(), &file).expect("adopt");
        drop(before);
        assert_eq!(after.read_obj::<u8>(GuestAddress(9 * MIB)).expect("read"), 7);
        let held = file.metadata().expect("a file").blocks() * 512;
        assert!(held <= 2 * MIB, "{held} bytes: prefault filled the holes");
        // Room that comes and goes.
        let room = 1 << 32..(1 << 32) + 8 * MIB;
        let mut first = SparseMemory::new(room.clone(), &options).expect("room");
        let part = first.part(room.start + 2 * MIB..room.start + 4 * MIB).expect("a part");
        part.write_obj(9u8, vm_memory::MemoryRegionAddress(5)).expect("write");
        let (file, offset) = file_of(&part).expect("a file");
        assert_eq!(offset, 2 * MIB);
        let mut second = SparseMemory::adopt(room.clone(), &options, file).expect("room");
        let part = second.part(room.start + 2 * MIB..room.start + 4 * MIB).expect("a part");
        assert_eq!(part.read_obj::<u8>(vm_memory::MemoryRegionAddress(5)).expect("read"), 9);
        assert!(
            file_of(
                allocate(&ranges, &RamOptions::default())
                    .expect("allocate")
                    .iter()
                    .next()
                    .expect("one")
            )
            .is_none()
        );
    }

    #[test]
    fn what_is_no_memory_of_the_guest_is_refused() {
        let check = |file: &File| check_handed(file, 4 * MIB, &shared());
        let good = shared_file(4 * MIB).expect("a file");
        check(&good).expect("good");
        assert!(matches!(
            check_handed(&good, 4 * MIB, &RamOptions::default()),
            Err(HandedError::Private)
        ));
        assert!(matches!(
            check_handed(&good, 8 * MIB, &shared()),
            Err(HandedError::Size { found, expected }) if found == 4 * MIB && expected == 8 * MIB
        ));
        let sealable = libc::MFD_ALLOW_SEALING;
        assert!(matches!(
            check(&memory_file(4 * MIB, 0)),
            Err(HandedError::Seals { .. })
        ));
        assert!(matches!(
            check(&memory_file(4 * MIB, sealable)),
            Err(HandedError::Seals { found: 0 })
        ));
        let sealed = memory_file(4 * MIB, sealable);
        // SAFETY: the call changes nothing but the file's seals.
        let added = unsafe {
            libc::fcntl(
                sealed.as_raw_fd(),
                libc::F_ADD_SEALS,
                WANTED | libc::F_SEAL_FUTURE_WRITE,
            )
        };
        assert_eq!(added, 0);
        assert!(matches!(check(&sealed), Err(HandedError::Seals { .. })));
        let program = File::open(std::env::current_exe().expect("a path")).expect("a regular file");
        assert!(matches!(check(&program), Err(HandedError::Kind)));
        assert!(matches!(
            check(&File::open("/dev/null").expect("a device")),
            Err(HandedError::Kind)
        ));
        let huge = RamOptions {
            huge_pages: Some(crate::HugePages {
                page_size: Some(2 * MIB),
            }),
            ..shared()
        };
        assert!(check_handed(&good, 4 * MIB, &huge).is_err());
    }
}
