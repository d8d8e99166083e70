//! Room for guest memory of which only parts are there at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::bitmap::NewBitmap as _;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion};

use crate::discard::{advise, punch};
use crate::ram::{advise_region, map, memfd, page_size};
use crate::{GuestRegion, MemoryError, RamOptions, node};

/// A range of guest physical addresses whose memory comes and goes in parts. Without parts it costs the host nothing.
///
/// A part keeps its place in this process once it was used: I/O that a device began there may still be under way when nobody else can
/// reach it any more. Its memory goes back to the host.
pub struct SparseMemory {
    range: Range<u64>,
    options: RamOptions,
    page: u64,
    /// What other processes map, and where huge pages come from.
    file: Option<File>,
    parts: BTreeMap<u64, Arc<GuestRegion>>,
}

impl SparseMemory {
    /// Room at the GPAs `range`, whole pages, for memory that is made with `options`.
    pub fn new(range: Range<u64>, options: &RamOptions) -> Result<Self, MemoryError> {
        Self::of(range, options, None)
    }

    /// The same of `file`, which [`check_handed`](crate::check_handed) approved for all of `range`: parts have what is there.
    pub fn adopt(range: Range<u64>, options: &RamOptions, file: &File) -> Result<Self, MemoryError> {
        Self::of(range, options, Some(file))
    }

    fn of(range: Range<u64>, options: &RamOptions, file: Option<&File>) -> Result<Self, MemoryError> {
        let page = page_size(options)?;
        options.host_node.map_or(Ok(()), node::check)?;
        let (base, size) = (range.start, range.end.saturating_sub(range.start));
        if size == 0 || !size.is_multiple_of(page) || !base.is_multiple_of(page) {
            return Err(MemoryError::Unaligned { base, size, page });
        }
        let file = match file {
            Some(file) => Some(file.try_clone().map_err(|source| MemoryError::MemFd { size, source })?),
            None if options.shared || options.huge_pages.is_some() => Some(memfd(size, options)?),
            None => None,
        };
        Ok(Self {
            range,
            options: *options,
            page,
            file,
            parts: BTreeMap::new(),
        })
    }

    /// Its GPAs.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Bytes of a page as the host backs it: less than one cannot come or go.
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// All of it as one region, for processes that map it beside this one: what has no memory now gets it when somebody writes there.
    /// `None` for memory that only this process has.
    pub fn shared(&self) -> Result<Option<Arc<GuestRegion>>, MemoryError> {
        if !self.options.shared {
            return Ok(None);
        }
        let (base, size) = (self.range.start, self.range.end - self.range.start);
        // Nothing is written through it here, so one bit will do.
        let whole = NonZeroUsize::new(size as usize).unwrap_or(NonZeroUsize::MIN);
        let bitmap = AtomicBitmap::new(size as usize, whole);
        let region = self.region(0, size, bitmap)?;
        let region = GuestRegion::new(region, GuestAddress(base)).ok_or(self.unaligned())?;
        Ok(Some(Arc::new(region)))
    }

    /// The part at the GPAs `part`, whole pages of the range. The same part has the same bounds every time.
    pub fn part(&mut self, part: Range<u64>) -> Result<Arc<GuestRegion>, MemoryError> {
        if let Some(known) = self.parts.get(&part.start) {
            return Ok(known.clone());
        }
        let inside = self.range.start <= part.start && part.start < part.end && part.end <= self.range.end;
        let whole = part.start.is_multiple_of(self.page) && part.end.is_multiple_of(self.page);
        if !inside || !whole {
            return Err(self.unaligned());
        }
        let size = part.end - part.start;
        let bitmap = AtomicBitmap::with_len(size as usize);
        let mapping = self.region(part.start - self.range.start, size, bitmap)?;
        let region = GuestRegion::new(mapping, GuestAddress(part.start)).ok_or(self.unaligned())?;
        let options = RamOptions {
            prefault: false,
            ..self.options
        };
        advise_region(&region, &options)?;
        let region = Arc::new(region);
        self.parts.insert(part.start, region.clone());
        Ok(region)
    }

    /// Takes memory for `range` of one part now, where its absence would hurt later: of huge pages the host's pool may have none left
    /// when the guest comes to use them.
    pub fn fill(&self, range: Range<u64>) -> io::Result<()> {
        if self.options.huge_pages.is_none() && !self.options.prefault {
            return Ok(());
        }
        let (region, offset) = self.find(&range)?;
        advise(region, offset, range.end - range.start, libc::MADV_POPULATE_WRITE)
    }

    /// Gives the memory of `range`, of one part, back to the host.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let (region, offset) = self.find(&range)?;
        punch(region, offset, range.end - range.start, &self.options)
    }

    fn find(&self, range: &Range<u64>) -> io::Result<(&GuestRegion, u64)> {
        let found = self.parts.range(..=range.start).next_back();
        let inside = |region: &GuestRegion| range.start < range.end && range.end - 1 <= region.last_addr().0;
        match found.filter(|(_, region)| inside(region)) {
            Some((start, region)) => Ok((region, range.start - start)),
            None => Err(io::ErrorKind::AddrNotAvailable.into()),
        }
    }

    /// Maps `size` bytes from `offset` on. Nothing is reserved for it: that of huge pages is taken by [`fill`](Self::fill).
    fn region(
        &self,
        offset: u64,
        size: u64,
        bitmap: AtomicBitmap,
    ) -> Result<vm_memory::MmapRegion<AtomicBitmap>, MemoryError> {
        let backing = match &self.file {
            Some(file) => {
                let file = file.try_clone().map_err(|source| MemoryError::MemFd { size, source })?;
                Some(FileOffset::new(file, offset))
            }
            None => None,
        };
        let kind = match (self.options.shared, &backing) {
            (true, _) => libc::MAP_SHARED,
            (false, Some(_)) => libc::MAP_PRIVATE,
            (false, None) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        map(size, bitmap, kind | libc::MAP_NORESERVE, backing).map_err(|source| MemoryError::Map {
            size,
            hint: "",
            source,
        })
    }

    fn unaligned(&self) -> MemoryError {
        MemoryError::Unaligned {
            base: self.range.start,
            size: self.range.end - self.range.start,
            page: self.page,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::*;

    const MIB: u64 = 1 << 20;
    const AT: u64 = 4 << 30;

    /// Bytes of the host that `room` takes.
    fn taken(room: &SparseMemory) -> u64 {
        if let Some(file) = &room.file {
            return file.metadata().expect("a memory file").blocks() * 512;
        }
        room.parts.values().map(|part| resident(part)).sum()
    }

    fn resident(region: &GuestRegion) -> u64 {
        let page = page_size(&RamOptions::default()).expect("a page size");
        let mut pages = vec![0u8; (region.len() / page) as usize];
        // SAFETY: the region is mapped as long as it is borrowed, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), pages.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 != 0).count() as u64 * page
    }

    #[test]
    fn parts_come_and_go_and_room_costs_nothing() {
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                ..RamOptions::default()
            };
            // More than any host has.
            let mut room = SparseMemory::new(AT..AT + (1 << 42), &options).expect("room");
            let whole = room.shared().expect("one region");
            assert_eq!(whole.is_some(), shared);
            assert_eq!(taken(&room), 0);
            let part = room.part(AT + 8 * MIB..AT + 16 * MIB).expect("a part");
            assert!(Arc::ptr_eq(
                &part,
                &room.part(AT + 8 * MIB..AT + 16 * MIB).expect("the same")
            ));
            part.write_slice(&vec![7; 8 * MIB as usize], MemoryRegionAddress(0))
                .expect("write");
            if let Some(whole) = &whole {
                assert_eq!(whole.read_obj::<u8>(MemoryRegionAddress(9 * MIB)).expect("read"), 7);
            }
            assert_eq!(taken(&room), 8 * MIB);
            room.discard(AT + 10 * MIB..AT + 12 * MIB).expect("discard");
            assert_eq!(taken(&room), 6 * MIB);
            let byte = |at| part.read_obj::<u8>(MemoryRegionAddress(at)).expect("read");
            assert_eq!(
                [2 * MIB - 1, 2 * MIB, 4 * MIB - 1, 4 * MIB].map(byte),
                [7, 0, 0, 7],
                "shared {shared}"
            );
            assert!(part.bitmap().dirty_at(2 * MIB as usize));
        }
    }

    #[test]
    fn what_is_none_of_it_is_refused() {
        let options = RamOptions::default();
        assert!(SparseMemory::new(AT..AT, &options).is_err());
        assert!(SparseMemory::new(AT + 1..AT + 1 + MIB, &options).is_err());
        let mut room = SparseMemory::new(AT..AT + 4 * MIB, &options).expect("room");
        for part in [AT - MIB..AT, AT..AT + 5 * MIB, AT..AT, AT + 1..AT + MIB] {
            assert!(room.part(part).is_err());
        }
        room.part(AT..AT + MIB).expect("a part");
        for range in [AT..AT, AT..AT + 2 * MIB, AT + 2 * MIB..AT + 3 * MIB, AT - MIB..AT] {
            assert!(room.discard(range.clone()).is_err(), "{range:x?}");
        }
    }

    #[test]
    fn filling_takes_memory_only_where_it_was_asked_for() {
        let fill = |prefault| {
            let options = RamOptions {
                prefault,
                thp: false,
                ..RamOptions::default()
            };
            let mut room = SparseMemory::new(AT..AT + 64 * MIB, &options).expect("room");
            room.part(AT..AT + 32 * MIB).expect("a part");
            room.fill(AT..AT + 16 * MIB).expect("fill");
            taken(&room)
        };
        assert_eq!([fill(false), fill(true)], [0, 16 * MIB]);
    }
}
