//! What devices are that only their drivers understand: a file each, which nobody else looks into.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{SnapshotError, SnapshotWriter, read};

/// Bytes that are read and written at once: there is never more of it in memory.
const PART: usize = 1 << 20;

/// A file with the state of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFile {
    /// It is `device-N`.
    number: u32,
    /// How long it is.
    bytes: u64,
    /// CRC-32 of it.
    checksum: u32,
}

pub(crate) fn path(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("device-{number}"))
}

impl SnapshotWriter {
    /// Writes what `source` reads, until it reads nothing, as the state of a device.
    pub fn device(
        &mut self,
        mut source: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<DeviceFile, SnapshotError> {
        let (mut file, path, number) = self.next_device()?;
        let (mut buffer, mut bytes, mut hasher) = (vec![0; PART], 0, crc32fast::Hasher::new());
        loop {
            let read = source(&mut buffer).map_err(SnapshotError::host("read the state of a device for", &path))?;
            let part = &buffer[..read.min(PART)];
            if part.is_empty() {
                break;
            }
            hasher.update(part);
            bytes += part.len() as u64;
            file.write_all(part).map_err(SnapshotError::host("write", &path))?;
        }
        file.sync_all().map_err(SnapshotError::host("write", &path))?;
        Ok(DeviceFile {
            number,
            bytes,
            checksum: hasher.finalize(),
        })
    }
}

/// The files of a snapshot with the states of devices.
#[derive(Debug, Clone)]
pub struct DeviceFiles {
    pub(crate) directory: PathBuf,
}

impl DeviceFiles {
    /// Has `target` take what is in `file`.
    ///
    /// # Errors
    /// It is not there, was changed, or `target` does not want it. What `target` took by then is void.
    pub fn read(
        &self,
        file: &DeviceFile,
        mut target: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), SnapshotError> {
        let path = path(&self.directory, file.number);
        let mut opened = read::open(&path)?;
        let len = opened.metadata().map_err(SnapshotError::host("read", &path))?.len();
        if len != file.bytes {
            return Err(SnapshotError::DeviceDamaged(path));
        }
        let (mut buffer, mut left, mut hasher) = (vec![0; PART], file.bytes, crc32fast::Hasher::new());
        while left > 0 {
            let len = left.min(PART as u64) as usize;
            let part = &mut buffer[..len];
            opened.read_exact(part).map_err(SnapshotError::host("read", &path))?;
            hasher.update(part);
            target(part).map_err(SnapshotError::host("give a device what is in", &path))?;
            left -= len as u64;
        }
        match hasher.finalize() == file.checksum {
            true => Ok(()),
            false => Err(SnapshotError::DeviceDamaged(path)),
        }
    }
}
