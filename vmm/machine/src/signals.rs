//! Signals as messages.
//!
//! SIGHUP and SIGWINCH make a descriptor readable. SIGTERM and SIGINT have a handler: it wakes the controller, which ends the VMM in
//! order, and where that does not come to an end it can still act when the signal is sent again.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::MachineError;

/// The exit code of a VMM that was told twice to end: sockets may stay behind, and requests of the guest may be unfinished.
pub const ENDED_AT_ONCE: u8 = 5;

/// Sent again sooner than this, a signal is the same wish: those who kill a process and then its group send it twice.
const AGAIN_NS: u64 = 500_000_000;

/// The code of signals that no process sent (sigaction(2)).
const SI_KERNEL: i32 = 0x80;

/// The signals that end the VMM.
const END: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

/// When the first signal to end came, in nanoseconds of the monotonic clock; zero before it.
static TOLD: AtomicU64 = AtomicU64::new(0);
/// What the handler writes to, for the rest of the process's life.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// What a signal asks for beside an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGHUP. From a process it asks for a new log file, from the kernel it tells that the terminal, or the leader of the session on it,
    /// is gone.
    HangUp {
        /// Who sent it.
        by_kernel: bool,
    },
    /// A look at the size of the terminal: SIGWINCH.
    Resized,
}

/// Signals that wait for a [`Controller`](crate::Controller).
#[derive(Debug)]
pub struct HeldSignals {
    /// SIGHUP was not to be ignored (`nohup`), so the end of the terminal may be the end of the VMM.
    hang_up_ends: bool,
    /// SIGHUP is taken.
    hang_up: bool,
}

/// Holds the signals that mean something to the VMM back until a controller takes them. Threads inherit that, and one thread without
/// it is enough for the kernel to kill the process: call it on the main thread before there is another. With a `log_file` to open
/// again SIGHUP has a meaning even where it was to be ignored.
pub fn hold_signals(log_file: bool) -> Result<HeldSignals, MachineError> {
    let hold = || {
        let hang_up_ends = !ignored(libc::SIGHUP)?;
        let held = HeldSignals {
            hang_up_ends,
            hang_up: hang_up_ends || log_file,
        };
        mask(libc::SIG_BLOCK, &[&END[..], &held.messages()].concat())?;
        Ok(held)
    };
    hold().map_err(MachineError::host("hold signals back"))
}

/// Whether a signal has told the VMM to end.
pub fn told_to_end() -> bool {
    TOLD.load(Ordering::SeqCst) != 0
}

impl HeldSignals {
    /// Whether the VMM ends with its terminal.
    pub(crate) fn hang_up_ends(&self) -> bool {
        self.hang_up_ends
    }

    fn messages(&self) -> Vec<libc::c_int> {
        let hang_up = self.hang_up.then_some(libc::SIGHUP);
        std::iter::once(libc::SIGWINCH).chain(hang_up).collect()
    }
}

/// The signals that are messages: instead of interrupting something they make this descriptor readable.
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Takes them, on the main thread. From here on [`told_to_end`] tells of the others, and `wake` becomes readable with it.
    pub(crate) fn take(held: &HeldSignals, wake: &EventFd) -> io::Result<Self> {
        let messages = set(&held.messages());
        // SAFETY: the set lives and is initialised.
        let fd = unsafe { libc::signalfd(-1, &messages, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let signals = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        // A descriptor that nobody closes: the handler may run at any time.
        WAKE.store(
            std::mem::ManuallyDrop::new(wake.try_clone()?).as_raw_fd(),
            Ordering::SeqCst,
        );
        for signal in END {
            handle(signal)?;
        }
        // Only this thread lets them in, and the kernel prefers it; what came meanwhile arrives now.
        mask(libc::SIG_UNBLOCK, &END)?;
        Ok(signals)
    }

    /// The next signal that came, if there is one.
    pub(crate) fn next(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is as long as said.
        let n = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(n) != Ok(size) {
            return None;
        }
        // SAFETY: the kernel has filled all of it, as `n` says.
        let info = unsafe { info.assume_init() };
        Some(match i32::try_from(info.ssi_signo) {
            Ok(libc::SIGWINCH) => Signal::Resized,
            _ => Signal::HangUp {
                by_kernel: info.ssi_code == SI_KERNEL,
            },
        })
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set, and the numbers added are those of signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

fn mask(how: libc::c_int, signals: &[libc::c_int]) -> io::Result<()> {
    // SAFETY: the set lives and is initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, &set(signals), null_mut()) } {
        0 => Ok(()),
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

fn handle(signal: libc::c_int) -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = on_end;
    // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler is async-signal-safe, and the old action is not asked for.
    match unsafe { libc::sigaction(signal, &action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Wakes the controller; told again later, ends the process. It does nothing but what is async-signal-safe, with system calls that
/// every thread of the VMM may make.
extern "C" fn on_end(_signal: libc::c_int) {
    let now = now_ns();
    match TOLD.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => {
            let one = 1u64.to_ne_bytes();
            // SAFETY: the buffer is as long as said; errno is what the interrupted code expects after it.
            unsafe {
                let errno = libc::__errno_location();
                let before = *errno;
                libc::write(WAKE.load(Ordering::SeqCst), one.as_ptr().cast(), one.len());
                *errno = before;
            }
        }
        Err(first) if now.saturating_sub(first) >= AGAIN_NS => {
            triarch_legacy::console::restore_terminal();
            // SAFETY: ends the process without running anything of it.
            unsafe { libc::_exit(ENDED_AT_ONCE.into()) }
        }
        Err(_) => {}
    }
}

/// The monotonic clock, never zero.
fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the timespec, which outlives the call; async-signal-safe.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    // The clock counts from the host's start and is not negative.
    (now.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(now.tv_nsec as u64)
        .max(1)
}
