//! Which pages of the guest daemons have written, for migration (protocol feature LOG_SHMFD).

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use triarch_device_core::Event;
use triarch_memory::{GuestMemory, GuestRegion, RamOptions, allocate};
use triarch_vhost_protocol::{LogArea, Payload};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory};

use crate::LinkError;
use crate::room::with_rooms;
use crate::session::{OWN_SIZE, own_memory};

/// Bytes of guest memory that a bit stands for.
pub const LOG_PAGE: u64 = 4096;
/// Bytes of guest memory that a word of the log stands for.
const WORD_BYTES: u64 = 64 * LOG_PAGE;
/// A page of the host, which the log is a whole number of.
const HOST_PAGE: u64 = 4096;

/// A bit for each page of guest memory. Daemons set them, in memory they share with the VMM and cannot cut short. One is enough for all
/// daemons of a guest.
pub struct PageLog {
    memory: GuestMemory,
    size: u64,
    /// Which words are of memory of the VMM's own.
    own: Range<u64>,
    /// What daemons ring when they have marked pages.
    written: Option<Event>,
    /// A daemon ended the connection over it.
    unwelcome: AtomicBool,
    /// A daemon that had rings was lost: it may have written what it did not mark.
    gaps: AtomicBool,
}

/// The last address of `guest`.
fn last(guest: &GuestMemory) -> u64 {
    guest.iter().map(|region| region.last_addr().0).max().unwrap_or(0)
}

impl PageLog {
    /// A log of all of `guest`, nothing marked; in `rooms` memory comes and goes in parts. Daemons that can (SET_LOG_FD) ring `written` when
    /// they have marked something. That spares looking in vain, no more: others mark pages and ring nothing. Some end the connection over
    /// the message (those made with the rust-vmm crates): that costs one whose sessions end with it, as virtiofsd's do, its guest. Give
    /// none unless the daemons are known.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new(guest: &GuestMemory, rooms: &[Arc<GuestRegion>], written: Option<Event>) -> Result<Self, LinkError> {
        let own = own_memory(guest).0;
        let last = last(&with_rooms(guest, rooms)).max(own + OWN_SIZE - 1);
        let size = (last / LOG_PAGE / 8 + 1).next_multiple_of(HOST_PAGE);
        let options = RamOptions {
            shared: true,
            thp: false,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(0), size)], &options);
        let memory = memory.map_err(|error| LinkError::Host {
            what: "a log of written pages",
            cause: std::io::Error::other(error),
        })?;
        Ok(Self {
            memory,
            size,
            own: own / WORD_BYTES..(own + OWN_SIZE) / WORD_BYTES,
            written,
            unwelcome: AtomicBool::new(false),
            gaps: AtomicBool::new(false),
        })
    }

    /// Whether it has a bit for each page of `guest`.
    pub(crate) fn covers(&self, guest: &GuestMemory) -> bool {
        last(guest) / LOG_PAGE / 8 < self.size
    }

    /// Calls `each` with the number of every page of the guest's (GPA divided by [`LOG_PAGE`]) that was written since the last call, in
    /// order.
    pub fn take(&self, mut each: impl FnMut(u64)) {
        let Some(region) = self.memory.iter().next() else {
            return;
        };
        for word in (0..self.size / 8).filter(|word| !self.own.contains(word)) {
            let at = MemoryRegionAddress(8 * word);
            let Ok(slice) = region.get_slice(at, 8) else { return };
            let Ok(bits) = slice.get_atomic_ref::<AtomicU64>(0) else {
                return;
            };
            // Reading first: most words are zero, and their pages need not come into being.
            if bits.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = u64::from_le(bits.swap(0, Ordering::AcqRel));
            while bits != 0 {
                each(64 * word + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Whether a daemon was lost since the last call that may have written what it did not mark: then any page may have been written.
    pub fn has_gaps(&self) -> bool {
        self.gaps.swap(false, Ordering::AcqRel)
    }

    /// A daemon that had rings is gone.
    pub(crate) fn leave_gaps(&self) {
        self.gaps.store(true, Ordering::Release);
    }

    /// Payload of SET_LOG_BASE.
    pub(crate) fn payload(&self) -> Vec<u8> {
        let area = LogArea {
            bytes: self.size,
            offset: 0,
        };
        area.encode()
    }

    /// The file that goes with it.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        let region = self.memory.iter().next()?;
        region.file_offset().map(|backing| backing.file().as_fd())
    }

    /// The event of SET_LOG_FD, if a daemon is to be told.
    pub(crate) fn written(&self) -> Option<BorrowedFd<'_>> {
        let event = self
            .written
            .as_ref()
            .filter(|_| !self.unwelcome.load(Ordering::Relaxed));
        event.map(AsFd::as_fd)
    }

    /// A daemon ended the connection when it was told of the event. The next one is not told.
    pub(crate) fn keep_silent(&self) {
        self.unwelcome.store(true, Ordering::Relaxed);
    }
}
