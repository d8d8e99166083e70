//! Writes a snapshot.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, flock, mkdirat, renameat, unlinkat};
use rustix::io::Errno;

use crate::document::{self, MemoryTable};
use crate::pages::{CHUNK, filled};
use crate::{CONFIG, MEMORY, MemoryRange, Payloads, STATE, SnapshotError, UNFINISHED_STATE};

/// Who writes a snapshot, of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Version of the VMM.
    pub vmm: String,
    /// Processor architecture of the guest.
    pub arch: String,
}

/// A snapshot that is being written. Unless it is [`finished`](Self::finish), dropping it removes all of it; and if even that does not
/// happen, what is left is no snapshot.
pub struct SnapshotWriter {
    dir: PathBuf,
    /// The directory was not there before.
    made: bool,
    memory: File,
    ranges: Vec<MemoryRange>,
    finished: bool,
}

impl SnapshotWriter {
    /// Begins one in `dir`, which is made if it is not there. Files there that are left of one that was never finished are overwritten.
    pub fn create(dir: &Path) -> Result<Self, SnapshotError> {
        let made = match mkdirat(CWD, dir, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(SnapshotError::host("make the directory", dir)(error)),
        };
        match Self::begin(dir, made) {
            Ok(writer) => Ok(writer),
            Err(error) => {
                if made {
                    let _ = unlinkat(CWD, dir, AtFlags::REMOVEDIR);
                }
                Err(error)
            }
        }
    }

    fn begin(dir: &Path, made: bool) -> Result<Self, SnapshotError> {
        let state = dir.join(STATE);
        let there = || state.try_exists().map_err(SnapshotError::host("look for", &state));
        if there()? {
            return Err(SnapshotError::Exists(dir.to_owned()));
        }
        let path = dir.join(MEMORY);
        let failed = SnapshotError::host("create", &path);
        // Read as well: whoever maps what was written does.
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let memory = options.open(&path).map_err(failed)?;
        match flock(&memory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(SnapshotError::InUse(dir.to_owned())),
            Err(error) => return Err(SnapshotError::host("lock", &path)(error)),
        }
        // Whoever had the lock may have finished meanwhile.
        if there()? {
            return Err(SnapshotError::Exists(dir.to_owned()));
        }
        // From here on all of it is ours, to be removed if anything fails.
        let writer = Self {
            dir: dir.to_owned(),
            made,
            memory,
            ranges: Vec::new(),
            finished: false,
        };
        writer.memory.set_len(0).map_err(SnapshotError::host("empty", &path))?;
        Ok(writer)
    }

    /// Writes all memory. `ranges` are the GPAs of its regions, in order; `read` fills a buffer with what is at a GPA, or tells by `false`
    /// that all of it is zeroes; `progress` is told how many bytes of all are done.
    pub fn memory(
        &mut self,
        ranges: &[Range<u64>],
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<bool>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), SnapshotError> {
        let path = self.dir.join(MEMORY);
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        self.memory.set_len(total).map_err(SnapshotError::host("size", &path))?;
        let mut buffer = vec![0; CHUNK];
        let mut offset = 0;
        for range in ranges {
            let mut saved = MemoryRange {
                gpa: range.start,
                size: range.end - range.start,
                offset,
                checksums: Vec::new(),
            };
            for gpa in range.clone().step_by(CHUNK) {
                let len = (range.end - gpa).min(CHUNK as u64) as usize;
                let bytes = &mut buffer[..len];
                let filled = read(gpa, bytes).map_err(SnapshotError::host("read guest memory for", &path))?;
                let written = filled.then(|| self.chunk(offset, bytes)).transpose();
                saved
                    .checksums
                    .push(written.map_err(SnapshotError::host("write", &path))?.flatten());
                offset += len as u64;
                progress(offset, total);
            }
            self.ranges.push(saved);
        }
        Ok(())
    }

    /// Writes a chunk and returns its checksum, unless it is all zeroes.
    fn chunk(&self, offset: u64, bytes: &[u8]) -> io::Result<Option<u32>> {
        let mut any = false;
        for run in filled(bytes) {
            any = true;
            self.memory
                .write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
        }
        Ok(any.then(|| crc32fast::hash(bytes)))
    }

    /// Writes the rest, and makes it a snapshot that outlives a loss of power.
    pub fn finish(mut self, config: &[u8], about: &About, payloads: Payloads) -> Result<(), SnapshotError> {
        let path = self.dir.join(MEMORY);
        self.memory.sync_all().map_err(SnapshotError::host("write", &path))?;
        write_new(&self.dir.join(CONFIG), config)?;
        let table = MemoryTable::new(std::mem::take(&mut self.ranges));
        let text = document::text(about, table, payloads)?;
        let unfinished = self.dir.join(UNFINISHED_STATE);
        write_new(&unfinished, text.as_bytes())?;
        sync_dir(&self.dir)?;
        let state = self.dir.join(STATE);
        renameat(CWD, &unfinished, CWD, &state).map_err(SnapshotError::host("write", &state))?;
        // From here on it is one.
        self.finished = true;
        sync_dir(&self.dir)?;
        if let Some(parent) = self
            .dir
            .parent()
            .filter(|parent| self.made && !parent.as_os_str().is_empty())
        {
            sync_dir(parent)?;
        }
        Ok(())
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for name in [UNFINISHED_STATE, CONFIG, MEMORY] {
            let _ = unlinkat(CWD, self.dir.join(name), AtFlags::empty());
        }
        if self.made {
            let _ = unlinkat(CWD, &self.dir, AtFlags::REMOVEDIR);
        }
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).map_err(SnapshotError::host("create", path))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(SnapshotError::host("write", path))
}

fn sync_dir(path: &Path) -> Result<(), SnapshotError> {
    let opened = File::open(path).and_then(|dir| dir.sync_all());
    opened.map_err(SnapshotError::host("write", path))
}
