//! Memory that its owner cuts short while it is mapped here.
//!
//! Touching a page past the end of a file is SIGBUS, which would end the process and with it every other front end. Files sealed against
//! shrinking cannot do that; others are watched: the handler puts empty memory in the place of the whole region, so that whoever touched
//! it goes on, and tells the session, which ends.

#![allow(unsafe_code)] // a signal handler

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Once};

use rustix::fs::SealFlags;
use vmm_sys_util::eventfd::EventFd;

/// Regions that can be watched at once.
const SLOTS: usize = 2048;
/// The slot is somebody's, and not watched.
const CLAIMED: usize = 1;

/// What the handler looks at: it may do so at any time, so each change leaves the slot either whole or without a beginning.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    event: AtomicI32,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        event: AtomicI32::new(-1),
    }
}; SLOTS];

/// Watches a region for as long as it lives.
#[derive(Debug)]
pub(crate) struct Guard {
    slot: usize,
    /// Open for as long as the handler may write to it.
    _lost: Arc<EventFd>,
}

/// Whether nobody can cut the file short any more.
pub(crate) fn is_sealed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

impl Guard {
    /// Watches `len` bytes mapped at `start`, the beginning of a page. When they are lost, `lost` becomes readable.
    ///
    /// # Errors
    /// Too many are watched, or signals cannot be handled.
    pub(crate) fn new(start: usize, len: usize, lost: Option<&Arc<EventFd>>) -> io::Result<Self> {
        let lost = lost.ok_or_else(|| io::Error::other("there is no event descriptor for it"))?;
        install()?;
        let claim = |slot: &Slot| slot.start.compare_exchange(0, CLAIMED, SeqCst, SeqCst).is_ok();
        let full = || io::Error::other("too many regions of memory that is not sealed");
        let slot = TABLE.iter().position(claim).ok_or_else(full)?;
        let found = &TABLE[slot];
        found.end.store(start.saturating_add(len), SeqCst);
        found.event.store(lost.as_raw_fd(), SeqCst);
        found.start.store(start, SeqCst);
        Ok(Self {
            slot,
            _lost: lost.clone(),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &TABLE[self.slot];
        slot.start.store(CLAIMED, SeqCst);
        slot.end.store(0, SeqCst);
        slot.event.store(-1, SeqCst);
        slot.start.store(0, SeqCst);
    }
}

/// Handles SIGBUS from now on.
fn install() -> io::Result<()> {
    static INSTALL: Once = Once::new();
    static FAILED: AtomicI32 = AtomicI32::new(0);
    INSTALL.call_once(|| {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
        // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the handler is async-signal-safe, and the old action is not asked for.
        if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0 {
            FAILED.store(
                io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL),
                SeqCst,
            );
        }
    });
    match FAILED.load(SeqCst) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Uses nothing but atomic numbers and system calls. It is not interrupted by itself: it touches no memory that is watched.
extern "C" fn on_bus_error(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid record over, and the address is set for SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &TABLE {
        let (start, end) = (slot.start.load(SeqCst), slot.end.load(SeqCst));
        if start <= CLAIMED || !(start..end).contains(&address) {
            continue;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: `errno` is put back, since the code that is interrupted may be about to read it. The range is a mapping of this
        // process that is watched, and stays one; only what it shows changes. The descriptor is open, or the slot would not have it.
        unsafe {
            let errno = *libc::__errno_location();
            let mapped = libc::mmap(start as *mut libc::c_void, end - start, prot, flags, -1, 0);
            let one = 1u64.to_ne_bytes();
            libc::write(slot.event.load(SeqCst), one.as_ptr().cast(), one.len());
            *libc::__errno_location() = errno;
            if mapped != libc::MAP_FAILED {
                return;
            }
        }
    }
    // Not ours: the next time it is what it would have been without us.
    // SAFETY: takes no memory of ours.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn memory_that_is_cut_short_reads_as_zeroes_and_is_reported() {
        let file = tempfile::tempfile().expect("file");
        file.set_len(4 << 12).expect("size");
        assert!(!is_sealed(&file));
        let handle = file.try_clone().expect("handle");
        let range = (GuestAddress(0), 4 << 12, Some(FileOffset::new(handle, 0)));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).expect("memory");
        memory.write_obj(7u64, GuestAddress(3 << 12)).expect("write");
        let lost = Arc::new(EventFd::new(EFD_NONBLOCK).expect("event"));
        let start = memory.get_host_address(GuestAddress(0)).expect("mapped") as usize;
        let guard = Guard::new(start, 4 << 12, Some(&lost)).expect("guard");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(3 << 12)).expect("read"), 7);
        assert!(lost.read().is_err());
        file.set_len(1 << 12).expect("cut short");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(3 << 12)).expect("read"), 0);
        memory.write_obj(9u64, GuestAddress(2 << 12)).expect("write");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(2 << 12)).expect("read"), 9);
        assert_eq!(lost.read().expect("reported"), 1);
        let slot = guard.slot;
        drop(guard);
        assert_eq!(TABLE[slot].start.load(SeqCst), 0);
    }
}
