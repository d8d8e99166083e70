//! Reads a snapshot.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use crate::DeviceFiles;
use crate::chain::{self, Base, Layer, MAX_BASES, SavedMemory};
use crate::document::{self, Document};
use crate::pages::{CHUNK, filled};
use crate::{CONFIG, MAX_CONFIG, MAX_STATE, MEMORY, MemoryRange, Payloads, STATE, SnapshotError};

/// A snapshot that was opened and can be followed.
#[derive(Debug)]
pub struct Snapshot {
    config: Vec<u8>,
    memory: SavedMemory,
    itself: Option<Base>,
    /// The saved states.
    pub payloads: Payloads,
}

/// What a directory has beside the configuration.
struct Opened {
    layer: Layer,
    id: Option<String>,
    base: Option<Base>,
    checksum: u32,
    payloads: Payloads,
}

impl Opened {
    fn open(dir: &Path, arch: &str) -> Result<Self, SnapshotError> {
        let state = match open(&dir.join(STATE)) {
            Err(SnapshotError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(SnapshotError::Missing(dir.to_owned()));
            }
            other => other?,
        };
        let state = bounded(state, &dir.join(STATE), MAX_STATE)?;
        let path = dir.join(MEMORY);
        let file = open(&path)?;
        let len = file.metadata().map_err(SnapshotError::host("read", &path))?.len();
        let Document {
            id,
            base,
            memory: table,
            payloads,
            checksum,
        } = document::parse(&state, arch, len)?;
        let directory = dir.to_owned();
        Ok(Self {
            layer: Layer { directory, file, table },
            id,
            base,
            checksum,
            payloads,
        })
    }

    /// Opens the one that `base` tells of, which the one in `of` builds on.
    fn below(base: &Base, of: &Layer, arch: &str) -> Result<Self, SnapshotError> {
        let mut found = Err(SnapshotError::Missing(base.directory.clone()));
        for place in chain::places(base, &of.directory) {
            match Self::open(&place, arch) {
                Err(SnapshotError::Missing(_)) => {}
                other => {
                    found = other;
                    break;
                }
            }
        }
        let found = found?;
        if found.id.as_ref() != Some(&base.id) || found.checksum != base.checksum {
            return Err(SnapshotError::Other(found.layer.directory));
        }
        of.fits(&found.layer)?;
        Ok(found)
    }
}

impl Snapshot {
    /// Opens the one in `dir`, of a guest on `arch`, and all that it builds on.
    pub fn open(dir: &Path, arch: &str) -> Result<Self, SnapshotError> {
        let Opened {
            layer,
            id,
            base,
            checksum,
            payloads,
        } = Opened::open(dir, arch)?;
        let (mut layers, mut next) = (vec![layer], base);
        while let Some(base) = next {
            if layers.len() > MAX_BASES as usize {
                return Err(SnapshotError::Chain(dir.to_owned()));
            }
            let Some(of) = layers.last() else { break };
            let below = Opened::below(&base, of, arch).map_err(|source| SnapshotError::Base {
                of: of.directory.clone(),
                base: base.directory.clone(),
                source: Box::new(source),
            })?;
            layers.push(below.layer);
            next = below.base;
        }
        let path = dir.join(CONFIG);
        let config = bounded(open(&path)?, &path, MAX_CONFIG)?;
        let bases = layers.len() as u32 - 1;
        let directory = dir.to_owned();
        Ok(Self {
            config,
            memory: SavedMemory { layers },
            itself: id.map(|id| Base {
                directory,
                id,
                checksum,
                bases,
            }),
            payloads,
        })
    }

    /// The configuration, as it is now: somebody may have edited it.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// What another one builds on that builds on this one, if it was saved for that.
    pub fn itself(&self) -> Option<&Base> {
        self.itself.as_ref()
    }

    /// The regions of guest memory.
    pub fn ranges(&self) -> &[MemoryRange] {
        self.memory.ranges()
    }

    /// What the regions' offsets are in, for whoever maps it. Its checksums are not looked at then. `None`: it builds on another one, so that
    /// not all is in one file.
    pub fn memory_file(&self) -> Option<&File> {
        match self.memory.layers.as_slice() {
            [layer] => Some(&layer.file),
            _ => None,
        }
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
        for range in self.ranges() {
            if !wanted(range) {
                continue;
            }
            for at in (0..range.size).step_by(CHUNK) {
                if let Some(bytes) = self.memory.chunk(range, at, &mut buffer)? {
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

    /// The states of its devices that are in files of their own.
    pub fn devices(&self) -> Option<DeviceFiles> {
        let layer = self.memory.layers.first()?;
        let directory = layer.directory.clone();
        Some(DeviceFiles { directory })
    }

    /// Its memory, for whoever reads it when the rest is not needed any more.
    pub fn saved_memory(&self) -> Result<SavedMemory, SnapshotError> {
        let another = self.memory.another();
        another.map_err(SnapshotError::host("read", Path::new(MEMORY)))
    }
}

/// Whatever is there instead of a file must not make us wait.
pub(crate) fn open(path: &Path) -> Result<File, SnapshotError> {
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
