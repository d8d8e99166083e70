//! Signals as messages.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::MachineError;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// The end of the VMM: SIGTERM, SIGINT, and SIGHUP unless it was to be ignored (`nohup`).
    End,
    /// A look at the size of the terminal: SIGWINCH.
    Resized,
}

/// Keeps the signals that mean something to the VMM until [`Controller`](crate::Controller) takes them. Threads inherit that, and
/// one thread without it is enough for the kernel to kill the process: call it on the main thread before there is another.
pub fn hold_signals() -> Result<(), MachineError> {
    block().map(drop).map_err(MachineError::host("hold signals back"))
}

/// Blocks them for the calling thread and tells which they are.
fn block() -> io::Result<libc::sigset_t> {
    let hang_up = !ignored(libc::SIGHUP)?;
    // SAFETY: all zeroes is a valid `sigset_t`, and the calls below get a pointer to this live one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives and is initialised; the signal numbers exist; the old mask is not asked for.
    let masked = unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGWINCH);
        if hang_up {
            libc::sigaddset(&mut set, libc::SIGHUP);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut())
    };
    match masked {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Whether whoever started this process had it ignore `signal`. A signal that is held back would arrive nevertheless.
fn ignored(signal: libc::c_int) -> io::Result<bool> {
    // SAFETY: all zeroes is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is changed, and the answer goes to `action`, which outlives the call.
    match unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } {
        0 => Ok(action.sa_sigaction == libc::SIG_IGN),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The signals: instead of interrupting something they make this descriptor readable.
pub(crate) struct Signals(OwnedFd);

impl Signals {
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

    /// The next signal that came, if there is one.
    pub(crate) fn next(&self) -> Option<Signal> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is as long as said.
        let n = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(n) != Ok(size) {
            return None;
        }
        // SAFETY: the kernel has filled all of it, as `n` says.
        let number = unsafe { info.assume_init() }.ssi_signo;
        Some(match i32::try_from(number) {
            Ok(libc::SIGWINCH) => Signal::Resized,
            _ => Signal::End,
        })
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
