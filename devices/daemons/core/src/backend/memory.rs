//! The front end's memory.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;
use triarch_memory::{GuestMemory, GuestMemoryHandle, GuestRegion};
use triarch_vhost_protocol::Region;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::dirty;
use super::guard::{self, Guard};

/// Regions there may be at once.
pub(crate) const MAX_REGIONS: usize = 509;
/// Bytes they may have together. What is kept for each page of them is what a front end can make this process grow by.
const MAX_BYTES: u64 = 16 << 40;
/// Regions begin and end at multiples of this, in memory and in their files.
const PAGE: u64 = dirty::LOG_PAGE;
/// What the bitmaps have one bit for: the unit of the front end's log.
const LOG_PAGE: NonZeroUsize = NonZeroUsize::new(PAGE as usize).unwrap();

/// Why memory could not be shared.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A region makes no sense.
    #[error("the memory region {gpa:#x}+{size:#x} {what}")]
    Region {
        /// Its address.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Too many.
    #[error("there are more than {MAX_REGIONS} memory regions, or more than {} TiB of memory", MAX_BYTES >> 40)]
    TooMuch,
    /// The file could not be looked at.
    #[error("cannot look at the file of a memory region")]
    File(#[source] io::Error),
    /// It could not be mapped.
    #[error("cannot map a memory region")]
    Map(#[source] MmapRegionError),
    /// It could not be watched.
    #[error("cannot watch a memory region")]
    Watch(#[source] io::Error),
    /// Regions overlap.
    #[error("the memory regions overlap")]
    Overlap(#[source] vm_memory::GuestRegionCollectionError),
}

/// A region, and where this process sees it.
#[derive(Clone)]
struct Mapped {
    region: Region,
    /// Where the file might be cut short.
    _guard: Option<Arc<Guard>>,
    memory: Arc<GuestRegion>,
}

/// The memory that the front end shares.
pub(crate) struct MemoryTable {
    mapped: Vec<Mapped>,
    handle: GuestMemoryHandle,
    /// Readable when a region is gone.
    lost: Option<Arc<EventFd>>,
}

impl MemoryTable {
    /// None yet. When the front end takes away what it shared, `lost` becomes readable.
    pub(crate) fn new(lost: Option<Arc<EventFd>>) -> Self {
        Self {
            mapped: Vec::new(),
            handle: GuestMemoryHandle::new(GuestMemory::new()),
            lost,
        }
    }

    /// The memory as devices see it. It follows what comes and goes.
    pub(crate) fn handle(&self) -> &GuestMemoryHandle {
        &self.handle
    }

    /// Replaces all of it.
    pub(crate) fn set(&mut self, regions: Vec<(Region, OwnedFd)>) -> Result<(), MemoryError> {
        let regions: Result<Vec<_>, _> = regions
            .into_iter()
            .map(|(region, fd)| map(region, fd, self.lost.as_ref()))
            .collect();
        self.publish(regions?)
    }

    /// Adds a region.
    pub(crate) fn add(&mut self, region: Region, fd: OwnedFd) -> Result<(), MemoryError> {
        let mut all = self.mapped.clone();
        all.push(map(region, fd, self.lost.as_ref())?);
        self.publish(all)
    }

    /// Removes the region with these addresses.
    pub(crate) fn remove(&mut self, region: &Region) -> Result<(), MemoryError> {
        let same = |r: &Region| (r.gpa, r.size, r.user) == (region.gpa, region.size, region.user);
        let mut all = self.mapped.clone();
        all.retain(|mapped| !same(&mapped.region));
        if all.len() == self.mapped.len() {
            return Err(wrong(region, "is not there to be removed"));
        }
        self.publish(all)
    }

    fn publish(&mut self, mut all: Vec<Mapped>) -> Result<(), MemoryError> {
        let bytes = all.iter().fold(0u64, |sum, m| sum.saturating_add(m.region.size));
        if all.len() > MAX_REGIONS || bytes > MAX_BYTES {
            return Err(MemoryError::TooMuch);
        }
        all.sort_by_key(|mapped| mapped.region.gpa);
        let regions: Vec<_> = all.iter().map(|mapped| mapped.memory.clone()).collect();
        let memory = match regions.is_empty() {
            true => GuestMemory::new(),
            false => GuestMemory::from_arc_regions(regions).map_err(MemoryError::Overlap)?,
        };
        match self.handle.lock() {
            Ok(guard) => guard.replace(memory),
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
        self.mapped = all;
        Ok(())
    }

    /// The GPA of what the front end sees at `user`.
    pub(crate) fn gpa(&self, user: u64) -> Option<u64> {
        let inside = |r: &Region| user.checked_sub(r.user).filter(|at| *at < r.size);
        self.mapped
            .iter()
            .find_map(|mapped| inside(&mapped.region).map(|at| mapped.region.gpa + at))
    }
}

fn wrong(region: &Region, what: &'static str) -> MemoryError {
    MemoryError::Region {
        gpa: region.gpa,
        size: region.size,
        what,
    }
}

fn map(region: Region, fd: OwnedFd, lost: Option<&Arc<EventFd>>) -> Result<Mapped, MemoryError> {
    let Region {
        gpa,
        size,
        user,
        offset,
    } = region;
    let bad = |what| Err(wrong(&region, what));
    if size == 0 || size > MAX_BYTES {
        return bad("is empty, or too large");
    }
    if [gpa, size, offset].iter().any(|value| !value.is_multiple_of(PAGE)) {
        return bad("is not made of whole pages");
    }
    if gpa.checked_add(size).is_none() || user.checked_add(size).is_none() {
        return bad("reaches past the end of the address space");
    }
    let file = File::from(fd);
    let metadata = file.metadata().map_err(MemoryError::File)?;
    if !metadata.is_file() {
        return bad("lies in what is no file");
    }
    if offset.checked_add(size).is_none_or(|end| end > metadata.len()) {
        return bad("reaches past the end of its file");
    }
    let bytes = size as usize;
    let sealed = guard::is_sealed(&file);
    let bitmap = AtomicBitmap::new(bytes, LOG_PAGE);
    let mapping: MmapRegion<AtomicBitmap> = MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, offset))
        .build()
        .map_err(MemoryError::Map)?;
    let guard = match sealed {
        true => None,
        false => {
            let guard = Guard::new(mapping.as_ptr() as usize, bytes, lost);
            Some(Arc::new(guard.map_err(MemoryError::Watch)?))
        }
    };
    let memory = GuestRegion::new(mapping, GuestAddress(gpa));
    let memory = memory.ok_or_else(|| wrong(&region, "reaches past the end of the address space"))?;
    Ok(Mapped {
        region,
        _guard: guard,
        memory: Arc::new(memory),
    })
}
