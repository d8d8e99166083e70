//! Guest memory to and from a snapshot.

use std::io;
use std::ops::Range;

use triarch_memory::{Backing, GuestMemory, GuestRegion, Touched, read_content};
use triarch_state::{MemoryRange, Part, Snapshot, SnapshotError, SnapshotWriter, Source};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::progress::Progress;

pub(super) fn ranges(memory: &GuestMemory) -> Vec<Range<u64>> {
    let range = |start: u64, len| start..start + len;
    memory
        .iter()
        .map(|region| range(region.start_addr().raw_value(), region.len()))
        .collect()
}

/// All of `memory`.
pub(super) fn whole(memory: &GuestMemory) -> Vec<Part> {
    let part = |range| Part { range, pages: None };
    ranges(memory).into_iter().map(part).collect()
}

/// Guest memory that is read while the guest stands still.
struct Contents<'a> {
    memory: &'a GuestMemory,
    touched: Touched,
}

impl Contents<'_> {
    fn region(&self, gpa: u64) -> io::Result<(&GuestRegion, u64)> {
        let found = self.memory.to_region_addr(GuestAddress(gpa));
        let (region, at) = found.ok_or(io::ErrorKind::NotFound)?;
        Ok((region, at.raw_value()))
    }
}

impl Source for Contents<'_> {
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let (region, at) = self.region(range.start)?;
        let base = range.start - at;
        let found = self.touched.first(region, at..range.end - base)?;
        Ok(found.map(|found| base + found.start..base + found.end))
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (region, at) = self.region(gpa)?;
        if !read_content(region, at, buffer)? {
            buffer.fill(0);
        }
        Ok(())
    }
}

/// Writes `parts` of `memory`, which is backed as `backing` says. Returns how many bytes were written.
pub(super) fn save(
    memory: &GuestMemory,
    backing: &Backing,
    parts: Vec<Part>,
    writer: &mut SnapshotWriter,
    progress: Progress<'_>,
) -> Result<u64, SnapshotError> {
    progress.note("memory");
    let touched = Touched::new(backing);
    let contents = Contents { memory, touched };
    writer.memory(parts, &contents, |done, total| progress.bytes(done, total))
}

/// Fills what is `wanted` of `memory`, which is zeroes.
pub(super) fn fill(
    memory: &GuestMemory,
    snapshot: &Snapshot,
    wanted: impl Fn(&MemoryRange) -> bool,
    progress: Progress<'_>,
) -> Result<(), SnapshotError> {
    let write = |gpa, bytes: &[u8]| {
        let written = memory.write_slice(bytes, GuestAddress(gpa));
        written.map_err(io::Error::other)
    };
    snapshot.memory(wanted, write, |done, total| progress.bytes(done, total))
}

/// Makes sure that `memory` has the regions that were saved and no others.
pub(super) fn check(memory: &GuestMemory, snapshot: &Snapshot) -> Result<(), SnapshotError> {
    let saved = snapshot.ranges().iter().map(|range| range.gpa..range.gpa + range.size);
    let (saved, here) = (saved.collect::<Vec<_>>(), ranges(memory));
    if saved == here {
        return Ok(());
    }
    let bytes = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>() >> 20;
    let (was, is) = (bytes(&saved), bytes(&here));
    let text = match was == is {
        true => "the guest has it at other addresses; config.json must have the memory it was saved with".to_owned(),
        false => format!("it has {was} MiB, and with its config.json the guest has {is} MiB"),
    };
    Err(SnapshotError::Memory(text))
}
