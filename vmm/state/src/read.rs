//! Reads a snapshot.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::document::{self, MemoryTable};
use crate::pages::{CHUNK, filled};
use crate::{CONFIG, MAX_CONFIG, MAX_STATE, MEMORY, MemoryRange, Payloads, STATE, SnapshotError};

/// A snapshot that was opened and can be followed.
#[derive(Debug)]
pub struct Snapshot {
    config: Vec<u8>,
    memory: File,
    table: MemoryTable,
    /// The saved states.
    pub payloads: Payloads,
}

impl Snapshot {
    /// Opens the one in `dir`, of a guest on `arch`.
    pub fn open(dir: &Path, arch: &str) -> Result<Self, SnapshotError> {
        let state = match open(&dir.join(STATE)) {
            Err(SnapshotError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(SnapshotError::Missing(dir.to_owned()));
            }
            other => other?,
        };
        let state = bounded(state, &dir.join(STATE), MAX_STATE)?;
        let path = dir.join(MEMORY);
        let memory = open(&path)?;
        let len = memory.metadata().map_err(SnapshotError::host("read", &path))?.len();
        let (table, payloads) = document::parse(&state, arch, len)?;
        let path = dir.join(CONFIG);
        let config = bounded(open(&path)?, &path, MAX_CONFIG)?;
        Ok(Self {
            config,
            memory,
            table,
            payloads,
        })
    }

    /// The configuration, as it is now: somebody may have edited it.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The regions of guest memory.
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.table.ranges
    }

    /// What their offsets are in, for whoever maps it. Its checksums are not looked at then.
    pub fn memory_file(&self) -> &File {
        &self.memory
    }

    /// Reads the memory of those regions that are `wanted`. `write` gets what is at a GPA, where it is not zeroes; `progress` is told how
    /// many bytes of all are done.
    ///
    /// # Errors
    /// Also when a checksum differs: then nothing of that chunk was given to `write`.
    pub fn memory(
        &self,
        wanted: impl Fn(&MemoryRange) -> bool,
        mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), SnapshotError> {
        let path = Path::new(MEMORY);
        let total: u64 = self.ranges().iter().map(|range| range.size).sum();
        let (mut done, mut buffer) = (0, vec![0; CHUNK]);
        for range in &self.table.ranges {
            if !wanted(range) {
                continue;
            }
            for at in (0..range.size).step_by(CHUNK) {
                if let Some(bytes) = range.chunk(&self.memory, at, &mut buffer)? {
                    for run in filled(bytes) {
                        write(range.gpa + at + run.start as u64, &bytes[run])
                            .map_err(SnapshotError::host("fill guest memory from", path))?;
                    }
                }
                done += (range.size - at).min(CHUNK as u64);
                progress(done, total);
            }
        }
        Ok(())
    }

    /// Its memory, for whoever reads it when the rest is not needed any more.
    pub fn saved_memory(&self) -> Result<SavedMemory, SnapshotError> {
        let file = self.memory.try_clone();
        file.map(SavedMemory)
            .map_err(SnapshotError::host("read", Path::new(MEMORY)))
    }
}

/// The memory of a snapshot, which is read in any order.
#[derive(Debug)]
pub struct SavedMemory(File);

impl SavedMemory {
    /// The chunk of `range`, one of its snapshot's, that begins `at` bytes behind the range's begin, a multiple of [`CHUNK`]. It is read into
    /// `buffer`, which has as many bytes. `None`: it is all zeroes.
    ///
    /// # Errors
    /// Also when its checksum differs.
    pub fn chunk<'a>(
        &self,
        range: &MemoryRange,
        at: u64,
        buffer: &'a mut [u8],
    ) -> Result<Option<&'a [u8]>, SnapshotError> {
        range.chunk(&self.0, at, buffer)
    }
}

impl MemoryRange {
    /// What is in `file` at the chunk that begins `at` bytes behind the range's begin; `None`: it is all zeroes.
    fn chunk<'a>(&self, file: &File, at: u64, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, SnapshotError> {
        let Some(Some(checksum)) = self.checksums.get((at / CHUNK as u64) as usize) else {
            return Ok(None);
        };
        let bytes = &mut buffer[..self.size.saturating_sub(at).min(CHUNK as u64) as usize];
        let read = file.read_exact_at(bytes, self.offset + at);
        read.map_err(SnapshotError::host("read", Path::new(MEMORY)))?;
        match crc32fast::hash(bytes) == *checksum {
            true => Ok(Some(bytes)),
            false => Err(SnapshotError::MemoryDamaged { gpa: self.gpa + at }),
        }
    }
}

/// Whatever is there instead of a file must not make us wait.
fn open(path: &Path) -> Result<File, SnapshotError> {
    let mut options = File::options();
    options.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
    options.open(path).map_err(SnapshotError::host("open", path))
}

fn bounded(file: File, path: &Path, limit: u64) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::host("read", path))?;
    match bytes.len() as u64 > limit {
        true => Err(SnapshotError::TooLarge {
            path: path.to_owned(),
            limit,
        }),
        false => Ok(bytes),
    }
}
