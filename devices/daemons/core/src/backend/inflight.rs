//! The region in which rings keep what they work on, for the next back end.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use triarch_vhost_protocol::InflightShape;
use triarch_virtio::InflightQueue;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

/// Queues and descriptors of the largest region there can be.
const MAX_QUEUES: u16 = 1024;
const MAX_SIZE: u16 = 1024;

/// Why there is no region.
#[derive(Debug, Error)]
pub enum InflightError {
    /// The numbers make no sense.
    #[error("an inflight region for {queues} queues of {size} descriptors is not possible")]
    Shape {
        /// Queues.
        queues: u16,
        /// Descriptors of each.
        size: u16,
    },
    /// The file is too short, or may be cut short.
    #[error("the file of the inflight region {0}")]
    File(&'static str),
    /// The system's refusal.
    #[error("cannot {0} the inflight region")]
    Io(&'static str, #[source] io::Error),
    /// It could not be mapped.
    #[error("cannot map the inflight region")]
    Map(#[source] MmapRegionError),
}

/// A region that is mapped.
pub(crate) struct Inflight {
    region: Arc<MmapRegion<()>>,
    shape: InflightShape,
}

impl Inflight {
    /// Makes a new region; returns it with the file the front end is to keep.
    pub(crate) fn create(queues: u16, size: u16) -> Result<(Self, InflightShape, OwnedFd), InflightError> {
        let bytes = bytes(queues, size)?;
        let failed = |what| move |error: rustix::io::Errno| InflightError::Io(what, error.into());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("vhost-inflight", flags).map_err(failed("create"))?;
        rustix::fs::ftruncate(&file, bytes).map_err(failed("size"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(failed("seal"))?;
        let shape = InflightShape {
            bytes,
            offset: 0,
            queues,
            size,
        };
        let keep = file.try_clone().map_err(|error| InflightError::Io("share", error))?;
        Ok((Self::map(file, shape)?, shape, keep))
    }

    /// Takes over a region that the front end kept.
    pub(crate) fn adopt(file: OwnedFd, shape: InflightShape) -> Result<Self, InflightError> {
        let needed = bytes(shape.queues, shape.size)?;
        // Without the seal, a front end could make us touch memory that is not there.
        match rustix::fs::fcntl_get_seals(&file) {
            Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
            _ => return Err(InflightError::File("is not sealed against being cut short")),
        }
        if shape.bytes < needed || !shape.offset.is_multiple_of(4096) {
            return Err(InflightError::File("is too small, or not aligned"));
        }
        Self::map(file, InflightShape { bytes: needed, ..shape })
    }

    fn map(file: OwnedFd, shape: InflightShape) -> Result<Self, InflightError> {
        let file = File::from(file);
        let metadata = file.metadata();
        let len = metadata.map_err(|error| InflightError::Io("look at", error))?.len();
        if shape.offset.checked_add(shape.bytes).is_none_or(|end| end > len) {
            return Err(InflightError::File("is too short"));
        }
        let region = MmapRegionBuilder::new(shape.bytes as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_file_offset(FileOffset::new(file, shape.offset))
            .build()
            .map_err(InflightError::Map)?;
        Ok(Self {
            region: Arc::new(region),
            shape,
        })
    }

    /// The part of ring `index`, if it has one.
    pub(crate) fn queue(&self, index: u16) -> Option<InflightQueue> {
        if index >= self.shape.queues {
            return None;
        }
        let offset = InflightQueue::bytes(self.shape.size) * usize::from(index);
        InflightQueue::new(self.region.clone(), offset, self.shape.size)
    }
}

fn bytes(queues: u16, size: u16) -> Result<u64, InflightError> {
    if !(1..=MAX_QUEUES).contains(&queues) || !(1..=MAX_SIZE).contains(&size) {
        return Err(InflightError::Shape { queues, size });
    }
    Ok((InflightQueue::bytes(size) * usize::from(queues)) as u64)
}
