//! Makes the regions a guest's RAM consists of.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, MmapRegion};

use crate::align;
use crate::discard::advise;
use crate::{GuestMemory, GuestRegion, node};

/// Explicit huge pages (hugetlbfs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// Page size in bytes: a power of two the host offers; `None` for the host's default size.
    pub page_size: Option<u64>,
}

/// How RAM is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamOptions {
    /// Back it by one memfd that other processes can map (vhost-user needs that), else by private anonymous memory.
    pub shared: bool,
    /// Take pages from the host's huge page pool.
    pub huge_pages: Option<HugePages>,
    /// Let the kernel use transparent huge pages.
    pub thp: bool,
    /// Touch every page now, so that the guest never waits for one.
    pub prefault: bool,
    /// Let the kernel merge equal pages (KSM); private memory only.
    pub mergeable: bool,
    /// It may begin as what a file has ([`map_copy_on_write`](crate::map_copy_on_write)); private memory only.
    pub copy_on_write: bool,
    /// NUMA node of the host that has its pages, and no other; huge pages should be prefaulted then, since a pool of one node can be short
    /// when the guest comes to use them.
    pub host_node: Option<u32>,
}

impl Default for RamOptions {
    fn default() -> Self {
        Self {
            shared: false,
            huge_pages: None,
            thp: true,
            prefault: false,
            mergeable: false,
            copy_on_write: false,
            host_node: None,
        }
    }
}

/// Why RAM could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// More than RAM and swap of the host together.
    #[error("the guest asks for {asked} MiB of memory, the host has {host} MiB with swap; lower memory size")]
    MoreThanHost {
        /// MiB asked for.
        asked: u64,
        /// MiB of RAM and swap the host has.
        host: u64,
    },
    /// A huge page size the host does not offer.
    #[error("the host offers no huge pages of {0} bytes; see /sys/kernel/mm/hugepages for the sizes it has")]
    HugePageSize(u64),
    /// Region sizes must be whole pages.
    #[error("{size} bytes at {base:#x} are not whole pages of {page} bytes; make the memory a multiple of that")]
    Unaligned {
        /// GPA of the region.
        base: u64,
        /// Size of the region in bytes.
        size: u64,
        /// Page size in bytes.
        page: u64,
    },
    /// The memfd could not be made or sized.
    #[error("cannot create the memory file of {size} bytes")]
    MemFd {
        /// Size in bytes.
        size: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A region could not be mapped.
    #[error("cannot map {size} bytes of guest memory{hint}")]
    Map {
        /// Size in bytes.
        size: u64,
        /// What to do about it.
        hint: &'static str,
        /// Cause.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Pages could not be touched in advance.
    #[error("cannot prefault {size} bytes of guest memory; free memory on the host or drop prefault")]
    Prefault {
        /// Size in bytes.
        size: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The region cannot have what the file has.
    #[error("cannot map a file in the place of {size} bytes of guest memory")]
    Contents {
        /// Size in bytes.
        size: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A node that the host does not have.
    #[error(
        "the host has no memory in NUMA node {node}; {}",
        match .nodes.as_str() { "" => "its kernel has no NUMA".to_owned(), nodes => format!("it has some in {nodes}") }
    )]
    NoNode {
        /// The node.
        node: u32,
        /// Those that have memory.
        nodes: String,
    },
    /// The host does not take pages from the node.
    #[error("cannot have {size} bytes of guest memory in the host's NUMA node {node}")]
    Bind {
        /// Size in bytes.
        size: u64,
        /// The node.
        node: u32,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A zone could not be made.
    #[error("the memory zone '{id}' cannot be made")]
    Zone {
        /// Its name.
        id: String,
        /// Cause.
        #[source]
        source: Box<MemoryError>,
    },
    /// The ranges overlap or are not sorted by address.
    #[error("the memory layout is invalid")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// Makes guest memory of `ranges` (GPA and size in bytes, sorted, not overlapping).
pub fn allocate(ranges: &[(GuestAddress, u64)], options: &RamOptions) -> Result<GuestMemory, MemoryError> {
    let total = ranges.iter().fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
    let page = page_size(options)?;
    options.host_node.map_or(Ok(()), node::check)?;
    if options.huge_pages.is_none() {
        check_host_has(total)?;
    }
    for &(base, size) in ranges {
        if size == 0 || size % page != 0 {
            return Err(MemoryError::Unaligned {
                base: base.0,
                size,
                page,
            });
        }
    }
    let file = if options.shared || options.huge_pages.is_some() {
        Some(memfd(total, options)?)
    } else {
        None
    };
    regions(ranges, options, file.as_ref())
}

/// Maps `ranges`, one after the other of `file` if there is one.
pub(crate) fn regions(
    ranges: &[(GuestAddress, u64)],
    options: &RamOptions,
    file: Option<&File>,
) -> Result<GuestMemory, MemoryError> {
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for &(base, size) in ranges {
        let backing = match file {
            Some(file) => Some(FileOffset::new(
                file.try_clone().map_err(|source| MemoryError::MemFd { size, source })?,
                offset,
            )),
            None => None,
        };
        regions.push(map_region(base, size, backing, options)?);
        offset += size;
    }
    GuestMemory::from_regions(regions).map_err(MemoryError::Layout)
}

fn map_region(
    base: GuestAddress,
    size: u64,
    backing: Option<FileOffset>,
    options: &RamOptions,
) -> Result<GuestRegion, MemoryError> {
    let hint = match options.huge_pages {
        Some(_) => "; the host's huge page pool may be too small, see /proc/sys/vm/nr_hugepages",
        None => "",
    };
    let failed = |source| MemoryError::Map { size, hint, source };
    let mut flags = if options.shared {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    if backing.is_none() {
        flags |= libc::MAP_ANONYMOUS;
    }
    // Huge pages are reserved now, so that a short pool is an error here and not a SIGBUS in the guest.
    if options.huge_pages.is_none() {
        flags |= libc::MAP_NORESERVE;
    }
    if options.huge_pages.is_some() {
        // Tried without a bitmap first: for more pages than the pool has, that might take more memory than the host has.
        map(size, (), flags, backing.clone()).map_err(failed)?;
    }
    let make = || map(size, AtomicBitmap::with_len(size as usize), flags, backing.clone());
    let mapping = match options.huge_pages {
        // The pool's pages are aligned by themselves.
        Some(_) => make(),
        None => align::placed(base.0, size, make),
    };
    let mapping = mapping.map_err(failed)?;
    let region = GuestRegion::new(mapping, base).ok_or(MemoryError::Unaligned {
        base: base.0,
        size,
        page: 1,
    })?;
    advise_region(&region, options)?;
    Ok(region)
}

pub(crate) fn map<B: Bitmap>(
    size: u64,
    bitmap: B,
    flags: libc::c_int,
    backing: Option<FileOffset>,
) -> Result<MmapRegion<B>, MmapRegionError> {
    let mut builder = MmapRegionBuilder::new_with_bitmap(size as usize, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(backing) = backing {
        builder = builder.with_file_offset(backing);
    }
    builder.build()
}

pub(crate) fn advise_region(region: &GuestRegion, options: &RamOptions) -> Result<(), MemoryError> {
    if let Some(node) = options.host_node {
        let size = region.len();
        node::bind(region, 0, size, node).map_err(|source| MemoryError::Bind { size, node, source })?;
    }
    advise_range(region, 0, region.len(), options);
    if options.prefault {
        advise(region, 0, region.len(), libc::MADV_POPULATE_WRITE).map_err(|source| MemoryError::Prefault {
            size: region.len(),
            source,
        })?;
    }
    Ok(())
}

/// Tells the host how `len` bytes from `offset` of `region` are used.
pub(crate) fn advise_range(region: &GuestRegion, offset: u64, len: u64, options: &RamOptions) {
    let thp = if options.thp {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    if options.huge_pages.is_none() {
        // A kernel without THP refuses; the guest then runs on small pages, which is what such a host offers.
        let _ = advise(region, offset, len, thp);
    }
    if options.mergeable {
        let _ = advise(region, offset, len, libc::MADV_MERGEABLE);
    }
    // Core dumps of the VMM must not carry the tenant's memory.
    let _ = advise(region, offset, len, libc::MADV_DONTDUMP);
}

/// Bytes of the pages that the host backs RAM with.
pub(crate) fn page_size(options: &RamOptions) -> Result<u64, MemoryError> {
    match options.huge_pages {
        None => Ok(4096),
        Some(HugePages { page_size: None }) => Ok(default_huge_page().unwrap_or(2 << 20)),
        Some(HugePages { page_size: Some(size) }) => {
            let known = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size / 1024);
            if size.is_power_of_two() && std::path::Path::new(&known).exists() {
                Ok(size)
            } else {
                Err(MemoryError::HugePageSize(size))
            }
        }
    }
}

fn default_huge_page() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("Hugepagesize:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}

pub(crate) fn check_host_has(total: u64) -> Result<(), MemoryError> {
    // SAFETY: all zeroes is a valid `sysinfo`, which the kernel then fills.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a `sysinfo` that outlives the call.
    if unsafe { libc::sysinfo(&mut info) } != 0 {
        return Ok(());
    }
    let host = (info.totalram as u64 + info.totalswap as u64).saturating_mul(u64::from(info.mem_unit));
    if total > host {
        return Err(MemoryError::MoreThanHost {
            asked: total >> 20,
            host: host >> 20,
        });
    }
    Ok(())
}

pub(crate) fn memfd(size: u64, options: &RamOptions) -> Result<File, MemoryError> {
    let failed = |source| MemoryError::MemFd { size, source };
    let name = CString::new("guest-ram").unwrap_or_default();
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if let Some(huge) = options.huge_pages {
        flags |= libc::MFD_HUGETLB;
        if let Some(page) = huge.page_size {
            flags |= page.trailing_zeros() << libc::MFD_HUGE_SHIFT;
        }
    }
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(failed)?;
    // Whoever maps it beside us must not be able to cut it short: touching what is gone would kill us.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call changes nothing but the file's seals.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn regions_around_a_hole_are_read_and_written() {
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                prefault: true,
                ..RamOptions::default()
            };
            let memory = allocate(
                &[(GuestAddress(0), 4 * MIB), (GuestAddress(1 << 32), 2 * MIB)],
                &options,
            )
            .expect("allocate");
            memory
                .write_obj(0x1234_5678u32, GuestAddress((1 << 32) + 4))
                .expect("write above the hole");
            assert_eq!(
                memory.read_obj::<u32>(GuestAddress((1 << 32) + 4)).expect("read"),
                0x1234_5678
            );
            assert!(
                memory.write_obj(0u8, GuestAddress(4 * MIB)).is_err(),
                "the hole is not memory"
            );
            assert_eq!(memory.iter().all(|r| r.file_offset().is_some()), shared);
        }
    }

    #[test]
    fn shared_regions_follow_each_other_in_one_file() {
        let options = RamOptions {
            shared: true,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(0), MIB), (GuestAddress(8 * MIB), MIB)], &options).expect("allocate");
        let offsets: Vec<u64> = memory
            .iter()
            .filter_map(|r| r.file_offset().map(FileOffset::start))
            .collect();
        assert_eq!(offsets, [0, MIB]);
    }

    #[test]
    fn nobody_can_cut_shared_memory_short() {
        let options = RamOptions {
            shared: true,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(0), MIB)], &options).expect("allocate");
        let backing = memory.iter().find_map(|r| r.file_offset()).expect("a file");
        assert!(backing.file().set_len(0).is_err());
        assert!(backing.file().set_len(2 * MIB).is_err());
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let options = RamOptions::default();
        let refuse = |size| allocate(&[(GuestAddress(0), size)], &options).expect_err("refused");
        assert!(matches!(refuse(0), MemoryError::Unaligned { .. }));
        assert!(matches!(refuse(4097), MemoryError::Unaligned { .. }));
        assert!(matches!(refuse(1 << 50), MemoryError::MoreThanHost { .. }));
        let huge = RamOptions {
            huge_pages: Some(HugePages {
                page_size: Some(3 << 20),
            }),
            ..options
        };
        assert!(matches!(
            allocate(&[(GuestAddress(0), MIB)], &huge),
            Err(MemoryError::HugePageSize(_))
        ));
        let default_huge = RamOptions {
            huge_pages: Some(HugePages { page_size: None }),
            ..options
        };
        assert!(matches!(
            allocate(&[(GuestAddress(0), MIB)], &default_huge),
            Err(MemoryError::Unaligned { size: MIB, .. })
        ));
    }
}
