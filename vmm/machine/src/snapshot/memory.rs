//! Guest memory to and from a snapshot.

use std::io;
use std::ops::Range;

use triarch_memory::{GuestMemory, read_content};
use triarch_state::{MemoryRange, Snapshot, SnapshotError, SnapshotWriter};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::progress::Progress;

fn ranges(memory: &GuestMemory) -> Vec<Range<u64>> {
    let range = |start: u64, len| start..start + len;
    memory
        .iter()
        .map(|region| range(region.start_addr().raw_value(), region.len()))
        .collect()
}

/// Writes all of `memory`.
pub(super) fn save(
    memory: &GuestMemory,
    writer: &mut SnapshotWriter,
    progress: Progress<'_>,
) -> Result<(), SnapshotError> {
    progress.note("memory");
    let read = |gpa, buffer: &mut [u8]| {
        let (region, at) = memory
            .to_region_addr(GuestAddress(gpa))
            .ok_or(io::ErrorKind::NotFound)?;
        read_content(region, at.raw_value(), buffer)
    };
    writer.memory(&ranges(memory), read, |done, total| progress.bytes(done, total))
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
