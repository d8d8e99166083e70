//! Pages of guest memory that are provided when somebody first touches them (Linux, Documentation/admin-guide/mm/userfaultfd.rst).

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};

use thiserror::Error;
use vm_memory::GuestMemoryRegion;

use crate::GuestRegion;
use crate::discard::PART;

/// Where the kernel hands out what the system call does, to whoever may open it.
const DEVICE: &str = "/dev/userfaultfd";
/// The kernel's interface (linux/userfaultfd.h).
const API: u64 = 0xaa;
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00 as libc::Ioctl;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const REGISTER_MISSING: u64 = 1;
const COPY_DONTWAKE: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
/// Bytes of a message, and how many are taken at once.
const MESSAGE: usize = 32;
const MESSAGES: usize = 64;

/// Why page faults cannot be served.
#[derive(Debug, Error)]
pub enum UserfaultError {
    /// The host does not let this process.
    #[error(
        "the host does not let this process serve page faults; give it access to /dev/userfaultfd or CAP_SYS_PTRACE, or write 1 to \
         /proc/sys/vm/unprivileged_userfaultfd"
    )]
    Forbidden(#[source] io::Error),
    /// The host's kernel cannot.
    #[error("the host's kernel cannot have page faults served as guest memory needs it (userfaultfd)")]
    Unable(#[source] io::Error),
    /// It failed.
    #[error("cannot {what}")]
    Host {
        /// What.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// What threads that touch memory have the kernel tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Somebody waits for the page at this address of the process.
    Missing(u64),
    /// What was there is given back to the host, and reads as zeroes from now on.
    Removed(Range<u64>),
}

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArgument {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct ZeroArgument {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// Serves the page faults of this process's memory, those of KVM and of other system calls among them; other processes that map the same
/// memory are not served. Dropping it gives all that was never provided to the kernel, which provides zeroes.
#[derive(Debug)]
pub struct Userfault {
    fd: File,
    regions: Vec<Range<u64>>,
}

impl Userfault {
    /// Begins with no memory.
    pub fn new() -> Result<Self, UserfaultError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match File::options().read(true).write(true).open(DEVICE) {
            // SAFETY: the request takes plain flags.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            // An older kernel, or somebody who may not open it and may have the right to the call.
            // SAFETY: the call takes plain flags.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as RawFd },
        };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => UserfaultError::Forbidden(error),
                Some(libc::ENOSYS | libc::EINVAL) => UserfaultError::Unable(error),
                _ => UserfaultError::Host {
                    what: "serve page faults",
                    source: error,
                },
            });
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let fd = unsafe { File::from_raw_fd(fd) };
        let mut argument = ApiArgument {
            api: API,
            features: FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM,
            ioctls: 0,
        };
        control(&fd, UFFDIO_API, &mut argument).map_err(UserfaultError::Unable)?;
        let regions = Vec::new();
        Ok(Self { fd, regions })
    }

    /// Has faults in all of `region` served from now on, of which nothing may be there yet. It must be of small pages, and must live for as
    /// long as this does.
    pub fn register(&mut self, region: &GuestRegion) -> Result<(), UserfaultError> {
        let start = region.as_ptr() as u64;
        let mut argument = RegisterArgument {
            start,
            len: region.len(),
            mode: REGISTER_MISSING,
            ioctls: 0,
        };
        let what = "have page faults of guest memory served";
        let registered = control(&self.fd, UFFDIO_REGISTER, &mut argument);
        registered.map_err(|source| UserfaultError::Host { what, source })?;
        self.regions.push(start..start + region.len());
        Ok(())
    }

    /// Bytes of a page of the host: less cannot be provided.
    pub fn page_size() -> u64 {
        // SAFETY: the call takes a plain number.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).unwrap_or(4096)
    }

    /// What happened since the last call; nothing if nothing did.
    pub fn faults(&mut self) -> io::Result<Vec<Fault>> {
        let mut buffer = [0; MESSAGE * MESSAGES];
        let len = match (&self.fd).read(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        let word = |message: &[u8], at: usize| {
            let bytes = message[at..at + 8].try_into().unwrap_or_default();
            u64::from_ne_bytes(bytes)
        };
        let fault = |message: &[u8]| match message[0] {
            EVENT_PAGEFAULT => Some(Fault::Missing(word(message, 16))),
            EVENT_REMOVE => Some(Fault::Removed(word(message, 8)..word(message, 16))),
            // None that was asked for.
            _ => None,
        };
        Ok(buffer[..len].chunks_exact(MESSAGE).filter_map(fault).collect())
    }

    /// Provides `bytes`, whole pages of the host, at address `to`. Whoever waits for one of them waits on. Returns how many bytes are there:
    /// fewer if there are [`faults`](Self::faults) to look at first.
    ///
    /// # Errors
    /// Something is there already, or the host has no memory.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> io::Result<usize> {
        self.inside(to, bytes.len() as u64)?;
        let mut argument = CopyArgument {
            to,
            from: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: COPY_DONTWAKE,
            done: 0,
        };
        let result = control(&self.fd, UFFDIO_COPY, &mut argument);
        provided(result, argument.done, bytes.len())
    }

    /// Provides zeroes at the page of `len` bytes at address `at`, unless something is there or it is not [registered](Self::register)
    /// any more, and wakes whoever waits for it. Returns whether that is done: if not there are [`faults`](Self::faults) to look at first.
    pub fn zero(&self, at: u64, len: u64) -> io::Result<bool> {
        self.inside(at, len)?;
        let mut argument = ZeroArgument {
            start: at,
            len,
            mode: 0,
            done: 0,
        };
        let result = control(&self.fd, UFFDIO_ZEROPAGE, &mut argument);
        match result.as_ref().map_err(io::Error::raw_os_error) {
            Err(Some(libc::EEXIST)) => {
                self.wake(at, len)?;
                Ok(true)
            }
            // Whoever waited was woken by what ended the registration.
            Err(Some(libc::ENOENT)) => Ok(true),
            _ => Ok(provided(result, argument.done, len as usize)? == len as usize),
        }
    }

    /// Whoever waits for pages in `len` bytes at address `at` looks again whether they are there.
    pub fn wake(&self, at: u64, len: u64) -> io::Result<()> {
        self.inside(at, len)?;
        let mut range = RangeArgument { start: at, len };
        control(&self.fd, UFFDIO_WAKE, &mut range)
    }

    /// Faults in `len` bytes at address `at` are the kernel's from now on, which provides zeroes. Whoever waits for a page there goes on.
    ///
    /// # Errors
    /// These are no whole [`PART`]s of a region, of which the last may be shorter; or the process has too many mappings (ENOMEM).
    pub fn release(&self, at: u64, len: u64) -> io::Result<()> {
        let region = self.inside(at, len)?;
        let is_whole = |address: u64| (address - region.start).is_multiple_of(PART) || address == region.end;
        if !is_whole(at) || !is_whole(at + len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut argument = RangeArgument { start: at, len };
        control(&self.fd, UFFDIO_UNREGISTER, &mut argument)
    }

    /// The region of these bytes: nobody but guest memory is provided with anything.
    fn inside(&self, at: u64, len: u64) -> io::Result<&Range<u64>> {
        let end = at.checked_add(len);
        let inside = |region: &&Range<u64>| at >= region.start && end.is_some_and(|end| end <= region.end);
        let found = self.regions.iter().find(inside);
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How much of `len` bytes is there after a request that tells of it in `done`.
fn provided(result: io::Result<()>, done: i64, len: usize) -> io::Result<usize> {
    match result {
        Ok(()) => Ok(len),
        // It stops in the middle, or before its begin, while memory is being given back.
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(usize::try_from(done).unwrap_or(0).min(len)),
        Err(error) => Err(error),
    }
}

fn control<T>(fd: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request is called with the argument it is defined with, which outlives the call. What it reads or provides lies in a
    // slice that the caller borrows, or in mappings of guest memory, which expects its contents to change at any time.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::{Discarder, GuestMemoryHandle, RamOptions, allocate};

    const MIB: u64 = 1 << 20;

    fn wait(userfault: &mut Userfault) -> Vec<Fault> {
        let mut poll = libc::pollfd {
            fd: userfault.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one descriptor of ours.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1, "no fault");
        userfault.faults().expect("faults")
    }

    #[test]
    fn what_is_missing_is_provided_and_what_was_removed_is_not() {
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                ..RamOptions::default()
            };
            let memory = GuestMemoryHandle::new(allocate(&[(GuestAddress(0), MIB)], &options).expect("allocate"));
            let mut userfault = match Userfault::new() {
                Err(UserfaultError::Forbidden(error)) => return eprintln!("not tried: {error}"),
                other => other.expect("userfaultfd"),
            };
            let map = memory.memory();
            let region = map.find_region(GuestAddress(0)).expect("a region");
            userfault.register(region).expect("register");
            let start = region.as_ptr() as u64;
            assert!(userfault.faults().expect("faults").is_empty());
            let read = |at: u64| {
                let memory = memory.clone();
                thread::spawn(move || memory.memory().read_obj::<u8>(GuestAddress(at)).expect("memory"))
            };
            let first = read(4096 + 5);
            assert_eq!(wait(&mut userfault), [Fault::Missing(start + 4096)]);
            assert!(
                userfault.copy(start + MIB - 4096, &[1; 8192]).is_err(),
                "it ends before"
            );
            assert_eq!(userfault.copy(start + 4096, &[7; 8192]).expect("copy"), 8192);
            assert!(userfault.copy(start + 4096, &[8; 4096]).is_err(), "something is there");
            assert!(!first.is_finished());
            assert!(userfault.zero(start + 4096, 4096).expect("wake"));
            assert_eq!(first.join().expect("read"), 7);
            // Whoever gives pages back waits until that is known.
            let discarder = Discarder::new(memory.clone(), options).expect("a page size");
            let discard = thread::spawn(move || discarder.discard(GuestAddress(8192), 8192).expect("discard"));
            assert_eq!(wait(&mut userfault), [Fault::Removed(start + 8192..start + 16384)]);
            assert_eq!(discard.join().expect("discarded"), 8192);
            let second = read(8192);
            assert_eq!(wait(&mut userfault), [Fault::Missing(start + 8192)]);
            assert!(userfault.zero(start + 8192, 4096).expect("zero"));
            assert_eq!(second.join().expect("read"), 0);
            // The rest is the kernel's.
            let third = read(MIB - 1);
            wait(&mut userfault);
            userfault.release(start, MIB).expect("release");
            assert_eq!(third.join().expect("read"), 0);
            assert_eq!(map.read_obj::<u8>(GuestAddress(4096)).expect("memory"), 7);
            assert!(userfault.zero(start, 4096).expect("nobody waits"));
        }
    }

    #[test]
    fn what_is_given_back_while_registrations_end_is_all_given_back() {
        let size = 2 * PART;
        for shared in [false, true].repeat(8) {
            let options = RamOptions {
                shared,
                ..RamOptions::default()
            };
            let memory = GuestMemoryHandle::new(allocate(&[(GuestAddress(0), size)], &options).expect("allocate"));
            let map = memory.memory();
            map.write_slice(&vec![7; size as usize], GuestAddress(0)).expect("fill");
            let mut userfault = match Userfault::new() {
                Err(UserfaultError::Forbidden(error)) => return eprintln!("not tried: {error}"),
                other => other.expect("userfaultfd"),
            };
            let region = map.find_region(GuestAddress(0)).expect("a region");
            userfault.register(region).expect("register");
            let start = region.as_ptr() as u64;
            assert!(userfault.release(start + 4096, size - 4096).is_err(), "half a part");
            let len = size - 2 * 4096;
            let discarder = Discarder::new(memory.clone(), options).expect("a page size");
            let discard = thread::spawn(move || discarder.discard(GuestAddress(4096), len).expect("discard"));
            wait(&mut userfault);
            // Who gives it back waits for that, and may find two mappings then.
            userfault.release(start, PART).expect("release");
            while !discard.is_finished() {
                userfault.faults().expect("faults");
                thread::yield_now();
            }
            assert_eq!(discard.join().expect("discarded"), len);
            userfault.release(start, size).expect("release");
            let byte = |at| map.read_obj::<u8>(GuestAddress(at)).expect("memory");
            let found = [4095, 4096, PART - 1, PART, size - 4097, size - 4096].map(byte);
            assert_eq!(found, [7, 0, 0, 0, 0, 7], "shared {shared}");
        }
    }
}
