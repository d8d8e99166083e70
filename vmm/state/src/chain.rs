//! Snapshots that build on others: each has the pages that were written since the one before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::document::MemoryTable;
use crate::pages::CHUNK;
use crate::{MEMORY, MemoryRange, PAGE, SnapshotError};

/// Most snapshots that one builds on. A guest that is restored waits for all of them to be read.
pub const MAX_BASES: u32 = 64;

/// A snapshot that others build on: where it is, and what tells that it is the one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its directory when the other one was written. It may have moved together with that.
    pub directory: PathBuf,
    /// What it calls itself.
    pub(crate) id: String,
    /// CRC-32 of what its `state.json` tells.
    pub(crate) checksum: u32,
    /// How many snapshots it builds on itself.
    pub(crate) bases: u32,
}

impl Base {
    /// Whether `other` is the same snapshot, wherever it is.
    pub fn is(&self, other: &Self) -> bool {
        (&self.id, self.checksum) == (&other.id, other.checksum)
    }

    /// Whether one more can build on it.
    pub fn has_room(&self) -> bool {
        self.bases < MAX_BASES
    }
}

/// The memory of one snapshot, as far as it has any of its own.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) directory: PathBuf,
    pub(crate) file: File,
    pub(crate) table: MemoryTable,
}

impl Layer {
    fn find(&self, gpa: u64) -> Option<&MemoryRange> {
        let at = self.table.ranges.binary_search_by_key(&gpa, |range| range.gpa);
        self.table.ranges.get(at.ok()?)
    }

    /// Whether `below` has all that this one does not.
    pub(crate) fn fits(&self, below: &Self) -> Result<(), SnapshotError> {
        let built = self.table.ranges.iter().filter(|range| range.pages.is_some());
        let missing = |range: &&MemoryRange| below.find(range.gpa).is_none_or(|found| found.size != range.size);
        match built.clone().find(missing) {
            None => Ok(()),
            Some(range) => Err(SnapshotError::Memory(format!(
                "it has no region of {:#x} bytes at {:#x}",
                range.size, range.gpa
            ))),
        }
    }

    /// Puts what this one has of a chunk into `bytes`, which hold nothing yet if not `filled`; then they may have anything. Returns whether
    /// they hold anything then.
    fn put(&self, range: &MemoryRange, at: u64, bytes: &mut [u8], filled: bool) -> Result<bool, SnapshotError> {
        let chunk = (at / CHUNK as u64) as usize;
        let checksum = range.checksums.get(chunk).copied().flatten();
        let Some(pages) = &range.pages else {
            let Some(checksum) = checksum else { return Ok(false) };
            self.read(range.offset + at, bytes)?;
            return self.check(bytes, checksum, range.gpa + at);
        };
        let count = pages.count_in(chunk);
        if count == 0 {
            return Ok(filled);
        }
        let Some(checksum) = checksum else {
            if filled {
                let len = bytes.len();
                pages
                    .runs(chunk)
                    .for_each(|run| bytes[run.start..run.end.min(len)].fill(0));
            }
            return Ok(filled);
        };
        if !filled {
            bytes.fill(0);
        }
        let mut packed = vec![0; count * PAGE as usize];
        self.read(range.offset + pages.before(chunk) * PAGE, &mut packed)?;
        self.check(&packed, checksum, range.gpa + at)?;
        let mut from = 0;
        for run in pages.runs(chunk) {
            let len = run.len();
            bytes[run].copy_from_slice(&packed[from..from + len]);
            from += len;
        }
        Ok(true)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        let path = self.directory.join(MEMORY);
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(SnapshotError::host("read", &path))
    }

    fn check(&self, bytes: &[u8], checksum: u32, gpa: u64) -> Result<bool, SnapshotError> {
        match crc32fast::hash(bytes) == checksum {
            true => Ok(true),
            false => Err(SnapshotError::MemoryDamaged {
                gpa,
                directory: self.directory.clone(),
            }),
        }
    }
}

/// The memory of a snapshot, and of those that it builds on, which is read in any order.
#[derive(Debug)]
pub struct SavedMemory {
    /// Its own first, then each one's that the one before builds on.
    pub(crate) layers: Vec<Layer>,
}

impl SavedMemory {
    /// The regions of guest memory.
    pub(crate) fn ranges(&self) -> &[MemoryRange] {
        self.layers.first().map_or(&[], |layer| &layer.table.ranges)
    }

    /// The chunk of `range`, one of its snapshot's, that begins `at` bytes behind the range's begin, a multiple of [`CHUNK`]. It is read into
    /// `buffer`, which has as many bytes. `None`: it is all zeroes.
    ///
    /// # Errors
    /// Also when a checksum differs.
    pub fn chunk<'a>(
        &self,
        range: &MemoryRange,
        at: u64,
        buffer: &'a mut [u8],
    ) -> Result<Option<&'a [u8]>, SnapshotError> {
        let bytes = &mut buffer[..range.size.saturating_sub(at).min(CHUNK as u64) as usize];
        let of_each = self
            .layers
            .iter()
            .map_while(|layer| Some((layer, layer.find(range.gpa)?)));
        // Nothing below one that has all of it is of any matter.
        let mut done = false;
        let needed = of_each.take_while(|(_, range)| !std::mem::replace(&mut done, range.pages.is_none()));
        let mut filled = false;
        for (layer, range) in needed.collect::<Vec<_>>().into_iter().rev() {
            filled = layer.put(range, at, bytes, filled)?;
        }
        Ok(filled.then_some(bytes))
    }

    /// The same, for another reader.
    pub(crate) fn another(&self) -> io::Result<Self> {
        let layer = |layer: &Layer| {
            Ok(Layer {
                directory: layer.directory.clone(),
                file: layer.file.try_clone()?,
                table: layer.table.clone(),
            })
        };
        let layers = self.layers.iter().map(layer).collect::<io::Result<_>>()?;
        Ok(Self { layers })
    }
}

/// Where the snapshot `base` may be that the one in `of` builds on: where it was, or beside that one under the name it had.
pub(crate) fn places(base: &Base, of: &Path) -> Vec<PathBuf> {
    let beside = of.parent().zip(base.directory.file_name());
    let beside = beside.map(|(parent, name)| parent.join(name));
    let mut places = vec![base.directory.clone()];
    places.extend(beside.filter(|path| *path != base.directory));
    places
}
