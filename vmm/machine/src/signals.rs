//! SIGTERM and SIGINT as messages.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::MachineError;

/// Keeps the signals that end the process (SIGTERM, SIGINT) until [`Controller`](crate::Controller) takes them. Threads inherit that, and
/// one thread without it is enough for the kernel to kill the process: call it on the main thread before there is another.
pub fn hold_end_signals() -> Result<(), MachineError> {
    block().map(drop).map_err(MachineError::host("hold signals back"))
}

/// Blocks them for the calling thread and tells which they are.
fn block() -> io::Result<libc::sigset_t> {
    // SAFETY: all zeroes is a valid `sigset_t`, and the calls below get a pointer to this live one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives and is initialised; the signal numbers exist; the old mask is not asked for.
    let masked = unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut())
    };
    match masked {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// The signals that end the process: instead of interrupting something they make this descriptor readable.
pub(crate) struct EndSignals(OwnedFd);

impl EndSignals {
    /// Takes them, on the main thread.
    pub(crate) fn take() -> io::Result<Self> {
        let set = block()?;
        // SAFETY: `set` lives and is initialised.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Whether one of the signals came since the last call.
    pub(crate) fn came(&self) -> bool {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        // SAFETY: the buffer is as long as said.
        let n = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
        n > 0
    }
}

impl AsRawFd for EndSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
