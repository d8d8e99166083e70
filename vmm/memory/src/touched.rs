//! Which guest memory was ever touched, for whoever copies all of it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryRegion;

use crate::{Backing, GuestRegion};

/// Bytes of memory that an entry of the kernel's page map stands for, where pages are small.
const ENTRY: usize = 8;
/// Entries that are read at once.
const ENTRIES: u64 = 4096;
/// The page is in memory, or in swap (Documentation/admin-guide/mm/pagemap.rst).
const THERE: u64 = 1 << 63 | 1 << 62;

/// Tells which guest memory may hold something. What it leaves out reads as zeroes.
pub struct Touched {
    /// The process's page map; without one everything counts as touched.
    map: Option<File>,
    page: u64,
    backing: Backing,
}

/// Bytes of the host's smallest page.
pub fn host_page() -> u64 {
    // SAFETY: the call takes no pointers and changes nothing.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(page).unwrap_or(4096)
}

impl Touched {
    /// For memory made as `backing` says. Opens what the kernel tells about this process, which a confined thread may not.
    pub fn new(backing: &Backing) -> Self {
        let map = File::open("/proc/self/pagemap");
        if let Err(error) = &map {
            tracing::info!("all of the guest's memory is read, since /proc/self/pagemap cannot be opened: {error}");
        }
        Self {
            map: map.ok(),
            page: host_page(),
            backing: backing.clone(),
        }
    }

    /// The first run of `range`, offsets in `region`, that may hold something. `None`: all of it reads as zeroes.
    ///
    /// # Errors
    /// The range is not in the region, or the kernel does not tell.
    pub fn first(&self, region: &GuestRegion, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if range.is_empty() {
            return Ok(None);
        }
        if range.end > region.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let shared = region.flags() & libc::MAP_SHARED != 0;
        match region.file_offset() {
            Some(backing) if shared => in_file(backing.file(), backing.start(), range),
            // What was never touched of these is what the file has, or is no matter of small pages.
            Some(_) => Ok(Some(range)),
            None if self.backing.of(region.start_addr().0).copy_on_write => Ok(Some(range)),
            None => match &self.map {
                Some(map) => self.in_map(map, region.as_ptr() as u64, range),
                None => Ok(Some(range)),
            },
        }
    }

    fn in_map(&self, map: &File, base: u64, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let (mut at, last) = (range.start / self.page, range.end.div_ceil(self.page));
        let mut found = None;
        let mut buffer = [0; ENTRIES as usize * ENTRY];
        while at < last {
            let count = (last - at).min(ENTRIES);
            let bytes = &mut buffer[..count as usize * ENTRY];
            map.read_exact_at(bytes, (base / self.page + at) * ENTRY as u64)?;
            for (index, entry) in (at..).zip(bytes.as_chunks::<ENTRY>().0) {
                let there = u64::from_ne_bytes(*entry) & THERE != 0;
                match found {
                    None if there => found = Some(index),
                    Some(first) if !there => return Ok(Some(self.run(first, index, &range))),
                    _ => {}
                }
            }
            at += count;
        }
        Ok(found.map(|first| self.run(first, last, &range)))
    }

    /// The pages from `first` to before `end`, as far as they are in `range`.
    fn run(&self, first: u64, end: u64, range: &Range<u64>) -> Range<u64> {
        (first * self.page).max(range.start)..(end * self.page).min(range.end)
    }
}

/// The same of a file that has this memory from `start` on.
fn in_file(file: &File, start: u64, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let Some(data) = seek(file, start + range.start, libc::SEEK_DATA)? else {
        return Ok(None);
    };
    if data >= start + range.end {
        return Ok(None);
    }
    // There is a hole behind the last byte.
    let hole = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(u64::MAX);
    Ok(Some(data - start..hole.saturating_sub(start).min(range.end)))
}

/// Where data or a hole is next; `None`: there is none. A file system that cannot tell has data everywhere.
fn seek(file: &File, from: u64, what: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the call takes no pointers. Nobody uses the place it moves: all else that is read of these files is read at an offset.
    let next = unsafe { libc::lseek64(file.as_raw_fd(), from as i64, what) };
    if next >= 0 {
        return Ok(Some(next as u64));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        Some(libc::EINVAL) => Ok(Some(if what == libc::SEEK_DATA { from } else { u64::MAX })),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, MemoryRegionAddress};

    use super::*;
    use crate::{RamOptions, allocate};

    const MIB: u64 = 1 << 20;
    const PAGE: u64 = 4096;

    fn runs(touched: &Touched, region: &GuestRegion) -> Vec<(u64, u64)> {
        let (mut at, mut runs) = (0, Vec::new());
        while let Some(run) = touched.first(region, at..region.len()).expect("told") {
            assert!(run.start >= at && run.start < run.end && run.end <= region.len());
            runs.push((run.start / PAGE, run.end / PAGE));
            at = run.end;
        }
        runs
    }

    #[test]
    fn what_was_written_is_found_and_the_rest_is_not() {
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                thp: false,
                ..RamOptions::default()
            };
            let ranges = [(GuestAddress(0), 2 * MIB), (GuestAddress(8 * MIB), 64 * MIB)];
            let memory = allocate(&ranges, &options).expect("allocate");
            let region = memory.find_region(GuestAddress(8 * MIB)).expect("a region");
            let touched = Touched::new(&options.into());
            assert_eq!(runs(&touched, region), [], "shared {shared}");
            for page in [0, 1, 2, 700, 5000, 16383] {
                region
                    .write_slice(&[7], MemoryRegionAddress(page * PAGE + 9))
                    .expect("write");
            }
            let expected = [(0, 3), (700, 701), (5000, 5001), (16383, 16384)];
            assert_eq!(runs(&touched, region), expected, "shared {shared}");
            let part = |range| touched.first(region, range).expect("told");
            assert_eq!(part(2 * PAGE..PAGE * 3), Some(2 * PAGE..PAGE * 3));
            assert_eq!(part(3 * PAGE..PAGE * 700), None);
            assert_eq!(part(PAGE..PAGE), None);
            assert!(touched.first(region, 0..64 * MIB + PAGE).is_err());
            assert_eq!(
                runs(&touched, memory.find_region(GuestAddress(0)).expect("a region")),
                []
            );
        }
    }

    #[test]
    fn what_a_file_may_have_counts_as_touched() {
        let options = RamOptions {
            copy_on_write: true,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(0), 2 * MIB)], &options).expect("allocate");
        let region = memory.find_region(GuestAddress(0)).expect("a region");
        assert_eq!(runs(&Touched::new(&options.into()), region), [(0, 512)]);
        let unknown = Touched {
            map: None,
            page: PAGE,
            backing: RamOptions::default().into(),
        };
        assert_eq!(runs(&unknown, region), [(0, 512)]);
    }
}
