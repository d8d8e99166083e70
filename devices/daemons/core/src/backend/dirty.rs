//! The front end's log of written pages, for migration (vhost-user, "Migration").
//!
//! Devices mark what they write in the bitmaps of memory. These are emptied into the log now and then, and always before the front end
//! is told that a ring stands still: it looks at the log again after that.

#![allow(unsafe_code)] // atomic access to bytes that the front end empties meanwhile

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use thiserror::Error;
use triarch_memory::GuestMemory;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Address, FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::guard::{self, Guard};

/// Bytes of a page of the log, whatever the host's are.
pub(crate) const LOG_PAGE: u64 = 4096;

/// A mapped log.
pub(crate) struct DirtyLog {
    /// Where the file might be cut short.
    _guard: Option<Guard>,
    region: MmapRegion<()>,
}

/// Why a log could not be mapped.
#[derive(Debug, Error)]
pub enum LogError {
    /// Its file is shorter.
    #[error("its file is shorter")]
    Short,
    /// It could not be watched.
    #[error("it cannot be watched")]
    Watch(#[source] io::Error),
    /// The system's refusal.
    #[error(transparent)]
    Map(#[from] MmapRegionError),
}

impl DirtyLog {
    /// Maps `bytes` of the log at byte `offset` of its file. When it is cut short later, `lost` becomes readable.
    pub(crate) fn map(fd: OwnedFd, bytes: u64, offset: u64, lost: Option<&Arc<EventFd>>) -> Result<Self, LogError> {
        let file = File::from(fd);
        let len = file.metadata().map_or(0, |metadata| metadata.len());
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= len);
        if bytes == 0 || !fits || !offset.is_multiple_of(LOG_PAGE) {
            return Err(LogError::Short);
        }
        let sealed = guard::is_sealed(&file);
        let region = MmapRegionBuilder::new(bytes as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_file_offset(FileOffset::new(file, offset))
            .build()?;
        let guard = match sealed {
            true => None,
            false => {
                let guard = Guard::new(region.as_ptr() as usize, bytes as usize, lost);
                Some(guard.map_err(LogError::Watch)?)
            }
        };
        Ok(Self { _guard: guard, region })
    }

    /// Moves all marks of `memory` here, whose bitmaps have pages of the same length; whether there were any.
    pub(crate) fn collect(&self, memory: &GuestMemory) -> bool {
        let mut any = false;
        for region in memory.iter() {
            let bitmap: &AtomicBitmap = (**region).bitmap();
            let first = region.start_addr().raw_value() / LOG_PAGE;
            for (word, mut bits) in bitmap.get_and_reset().into_iter().enumerate() {
                while bits != 0 {
                    self.mark(first + word as u64 * 64 + u64::from(bits.trailing_zeros()));
                    bits &= bits - 1;
                    any = true;
                }
            }
        }
        any
    }

    fn mark(&self, page: u64) {
        let byte = (page / 8) as usize;
        if byte < self.region.size() {
            // SAFETY: the byte lies inside of the mapping, which lives as long as `self` does. Other processes access it too, and
            // only atomically.
            let byte = unsafe { AtomicU8::from_ptr(self.region.as_ptr().add(byte)) };
            byte.fetch_or(1 << (page % 8), Ordering::AcqRel);
        }
    }
}

/// Forgets all marks of `memory`.
pub(crate) fn forget(memory: &GuestMemory) {
    for region in memory.iter() {
        (**region).bitmap().reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, VolatileMemory};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn what_is_written_is_in_the_log_once() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 21), 1 << 20)]);
        let memory = memory.expect("memory");
        let file = tempfile::tempfile().expect("file");
        file.set_len(4096).expect("size");
        let lost = Arc::new(EventFd::new(EFD_NONBLOCK).expect("event"));
        let log = DirtyLog::map(file.into(), 96, 0, Some(&lost)).expect("long enough");
        let short = DirtyLog::map(tempfile::tempfile().expect("file").into(), 96, 0, Some(&lost));
        assert!(matches!(short, Err(LogError::Short)));
        memory.write_slice(&[1; 2], GuestAddress(4095)).expect("write");
        memory
            .write_slice(&[1; 1], GuestAddress((1 << 21) + 9 * 4096))
            .expect("write");
        memory
            .write_slice(&[1; 1], GuestAddress((1 << 21) + (1 << 20) - 1))
            .expect("write");
        log.collect(&memory);
        let mut bytes = [0u8; 96];
        log.region.as_volatile_slice().copy_to(&mut bytes[..]);
        let mut expected = [0u8; 96];
        expected[0] = 3;
        expected[65] = 2;
        expected[95] = 0x80;
        assert_eq!(bytes, expected);
        log.region.as_volatile_slice().copy_from(&[0u8; 96][..]);
        log.collect(&memory);
        log.region.as_volatile_slice().copy_to(&mut bytes[..]);
        assert_eq!(bytes, [0; 96]);
    }
}
