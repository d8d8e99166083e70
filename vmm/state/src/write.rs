//! Writes a snapshot.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, mkdirat, renameat, unlinkat};
use rustix::io::Errno;

use crate::devices;
use crate::document::{self, MemoryTable};
use crate::pages::{CHUNK, Pages, filled};
use crate::{Base, CONFIG, MAX_STATE, MEMORY, MemoryRange, PAGE, Payloads, STATE, SnapshotError, UNFINISHED_STATE};

/// Who writes a snapshot, of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Version of the VMM.
    pub vmm: String,
    /// Processor architecture of the guest.
    pub arch: String,
    /// What it is called by those that build on it, if any may: no two are called the same.
    pub id: Option<String>,
    /// What it builds on.
    pub base: Option<Base>,
}

/// Guest memory that is written.
pub trait Source {
    /// The first run of `range`, GPAs of one region, that may hold anything. `None`: all of it is zeroes.
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;
    /// Fills `buffer` with what is at `gpa`, of one region.
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// A region of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its GPAs, whole pages.
    pub range: Range<u64>,
    /// Its pages that differ from what the base has there; `None`: the base has nothing to do with it, and all of it is written.
    pub pages: Option<Pages>,
}

/// A snapshot that is being written. Unless it is [`finished`](Self::finish), dropping it removes all of it; and if even that does not
/// happen, what is left is no snapshot.
pub struct SnapshotWriter {
    dir: PathBuf,
    /// The directory was not there before.
    made: bool,
    memory: File,
    ranges: Vec<MemoryRange>,
    /// How many devices have a file.
    devices: u32,
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
        let left = lock_left(&path, dir)?;
        // Whoever had the lock may have finished meanwhile.
        if there()? {
            return Err(SnapshotError::Exists(dir.to_owned()));
        }
        if left.is_some() {
            // Whoever made it, or has it open, would read the guest's memory.
            unlinkat(CWD, &path, AtFlags::empty()).map_err(SnapshotError::host("remove", &path))?;
        }
        // Read as well: whoever maps what was written does.
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let memory = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(SnapshotError::InUse(dir.to_owned()));
            }
            made => made.map_err(SnapshotError::host("create", &path))?,
        };
        lock(&memory, &path, dir)?;
        // From here on all of it is ours, to be removed if anything fails.
        Ok(Self {
            dir: dir.to_owned(),
            made,
            memory,
            ranges: Vec::new(),
            devices: 0,
            finished: false,
        })
    }

    /// Where the state of one more device goes, and which one it is.
    pub(crate) fn next_device(&mut self) -> Result<(File, PathBuf, u32), SnapshotError> {
        let number = self.devices;
        let path = devices::path(&self.dir, number);
        let file = create_new(&path)?;
        self.devices += 1;
        Ok((file, path, number))
    }

    /// Writes all memory: the regions `parts`, in order, of `source`. `progress` is told how many bytes of all are done. Returns how many
    /// bytes were written.
    pub fn memory(
        &mut self,
        parts: Vec<Part>,
        source: &impl Source,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<u64, SnapshotError> {
        let path = self.dir.join(MEMORY);
        let len = |part: &Part| match &part.pages {
            Some(pages) => pages.count() * PAGE,
            None => part.range.end - part.range.start,
        };
        let total: u64 = parts.iter().map(len).sum();
        self.memory.set_len(total).map_err(SnapshotError::host("size", &path))?;
        let mut buffer = vec![0; CHUNK];
        let (mut offset, mut written) = (0, 0);
        for part in parts {
            let end = offset + len(&part);
            let Part { range, pages } = part;
            let mut saved = MemoryRange {
                gpa: range.start,
                size: range.end - range.start,
                offset,
                checksums: Vec::new(),
                pages,
            };
            let mut data = Data::new(source, &range);
            for (index, gpa) in range.clone().step_by(CHUNK).enumerate() {
                let chunk = gpa..range.end.min(gpa + CHUNK as u64);
                let bytes = match &saved.pages {
                    Some(pages) => gather(source, gpa, pages, index, &mut buffer),
                    None => data.fill(chunk, &mut buffer),
                };
                let (len, bytes) = bytes.map_err(SnapshotError::host("read guest memory for", &path))?;
                let checksum = bytes.map(|bytes| self.chunk(offset, bytes, &mut written)).transpose();
                let checksum = checksum.map_err(SnapshotError::host("write", &path))?;
                saved.checksums.push(checksum.flatten());
                offset += len;
                progress(offset, total);
            }
            debug_assert_eq!(offset, end);
            self.ranges.push(saved);
        }
        Ok(written)
    }

    /// Writes a chunk and returns its checksum, unless it is all zeroes.
    fn chunk(&self, offset: u64, bytes: &[u8], written: &mut u64) -> io::Result<Option<u32>> {
        let mut any = false;
        for run in filled(bytes) {
            any = true;
            *written += run.len() as u64;
            self.memory
                .write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
        }
        Ok(any.then(|| crc32fast::hash(bytes)))
    }

    /// Writes the rest, and makes it a snapshot that outlives a loss of power. Returns what those are told that build on it, if any may.
    pub fn finish(mut self, config: &[u8], about: &About, payloads: Payloads) -> Result<Option<Base>, SnapshotError> {
        let path = self.dir.join(MEMORY);
        self.memory.sync_all().map_err(SnapshotError::host("write", &path))?;
        write_new(&self.dir.join(CONFIG), config)?;
        // Those that are left of one that was never finished, and had more devices.
        for number in self.devices.. {
            if !remove(&devices::path(&self.dir, number))? {
                break;
            }
        }
        let table = MemoryTable::new(std::mem::take(&mut self.ranges));
        let (text, checksum) = document::text(about, table, payloads)?;
        let unfinished = self.dir.join(UNFINISHED_STATE);
        if text.len() as u64 > MAX_STATE {
            // Nobody would read it.
            return Err(SnapshotError::TooLarge {
                path: unfinished,
                limit: MAX_STATE,
            });
        }
        write_new(&unfinished, text.as_bytes())?;
        sync_dir(&self.dir)?;
        let state = self.dir.join(STATE);
        renameat(CWD, &unfinished, CWD, &state).map_err(SnapshotError::host("write", &state))?;
        sync_dir(&self.dir)?;
        if let Some(parent) = self
            .dir
            .parent()
            .filter(|parent| self.made && !parent.as_os_str().is_empty())
        {
            sync_dir(parent)?;
        }
        // From here on it is one, whatever happens to the host.
        self.finished = true;
        Ok(about.id.clone().map(|id| Base {
            directory: self.dir.clone(),
            id,
            checksum,
            bases: about.base.as_ref().map_or(0, |base| base.bases + 1),
        }))
    }
}

/// What of a region holds anything, from its begin to its end.
struct Data<'a, S> {
    source: &'a S,
    end: u64,
    /// The run that comes next.
    next: Range<u64>,
}

impl<'a, S: Source> Data<'a, S> {
    fn new(source: &'a S, range: &Range<u64>) -> Self {
        Self {
            source,
            end: range.end,
            next: range.start..range.start,
        }
    }

    /// Fills `buffer` with a chunk, the one behind the chunk before, and returns its bytes; none if it is all zeroes.
    fn fill<'b>(&mut self, chunk: Range<u64>, buffer: &'b mut [u8]) -> io::Result<(u64, Option<&'b [u8]>)> {
        let len = chunk.end - chunk.start;
        let bytes = &mut buffer[..len as usize];
        let (mut at, mut any) = (chunk.start, false);
        while at < chunk.end {
            if self.next.end <= at {
                let next = self.source.data(at..self.end)?;
                self.next = next.unwrap_or(self.end..self.end + 1);
            }
            let run = self.next.start.max(at)..self.next.end.min(chunk.end);
            if run.start >= chunk.end {
                break;
            }
            let place = |gpa: u64| (gpa - chunk.start) as usize;
            bytes[place(at)..place(run.start)].fill(0);
            self.source
                .read(run.start, &mut bytes[place(run.start)..place(run.end)])?;
            (at, any) = (run.end, true);
        }
        if any {
            bytes[(at - chunk.start) as usize..].fill(0);
        }
        Ok((len, any.then_some(&*bytes)))
    }
}

/// Fills `buffer` with the pages of a chunk, the one of that index, that begins at `gpa`, and returns their bytes.
fn gather<'b>(
    source: &impl Source,
    gpa: u64,
    pages: &Pages,
    index: usize,
    buffer: &'b mut [u8],
) -> io::Result<(u64, Option<&'b [u8]>)> {
    let mut len = 0;
    for run in pages.runs(index) {
        let end = len + run.len();
        source.read(gpa + run.start as u64, &mut buffer[len..end])?;
        len = end;
    }
    Ok((len as u64, (len > 0).then_some(&buffer[..len])))
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // What makes it one goes first: it may have its name already, and not outlive a loss of power.
        for name in [STATE, UNFINISHED_STATE, CONFIG] {
            let _ = unlinkat(CWD, self.dir.join(name), AtFlags::empty());
        }
        for number in 0..self.devices {
            let _ = unlinkat(CWD, devices::path(&self.dir, number), AtFlags::empty());
        }
        // Whoever finds that locked finds somebody at work.
        let _ = unlinkat(CWD, self.dir.join(MEMORY), AtFlags::empty());
        if self.made {
            let _ = unlinkat(CWD, &self.dir, AtFlags::REMOVEDIR);
        }
    }
}

/// The memory that one left who did not finish, if there is any; nobody else writes there as long as this is open.
fn lock_left(path: &Path, dir: &Path) -> Result<Option<File>, SnapshotError> {
    let mut options = File::options();
    // Not what a link leads to, nor a pipe that would make us wait.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).custom_flags(flags.bits() as i32);
    let left = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(SnapshotError::host("open", path))?,
    };
    lock(&left, path, dir)?;
    let failed = SnapshotError::host("look at", path);
    let ours = left.metadata().map_err(&failed)?;
    match path.symlink_metadata() {
        Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => Ok(Some(left)),
        // Somebody has just begun with another one.
        _ => Err(SnapshotError::InUse(dir.to_owned())),
    }
}

fn lock(file: &File, path: &Path, dir: &Path) -> Result<(), SnapshotError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(SnapshotError::InUse(dir.to_owned())),
        Err(error) => Err(SnapshotError::host("lock", path)(error)),
    }
}

/// Writes a file that others cannot read, in the place of whatever has its name.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
    let mut file = create_new(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(SnapshotError::host("write", path))
}

/// A file that others cannot read, in the place of whatever has its name.
fn create_new(path: &Path) -> Result<File, SnapshotError> {
    remove(path)?;
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options.open(path).map_err(SnapshotError::host("create", path))
}

/// Removes it; whether it was there.
fn remove(path: &Path) -> Result<bool, SnapshotError> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(SnapshotError::host("remove", path)(error)),
    }
}

fn sync_dir(path: &Path) -> Result<(), SnapshotError> {
    #[cfg(test)]
    crate::tests::sync_fails().map_err(SnapshotError::host("write", path))?;
    let opened = File::open(path).and_then(|dir| dir.sync_all());
    opened.map_err(SnapshotError::host("write", path))
}
