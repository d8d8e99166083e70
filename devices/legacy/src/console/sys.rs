//! The system calls behind consoles that std has no safe form of.

#![allow(unsafe_code)] // poll, ioctl and terminal calls on descriptors this module is lent

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmm_sys_util::epoll::Epoll;

/// Standard input.
// SAFETY: nothing in Triarch closes descriptor 0, and a call on one that was closed before the start only fails.
pub(super) const STDIN: BorrowedFd<'static> = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };
/// Standard output.
// SAFETY: as for standard input.
pub(super) const STDOUT: BorrowedFd<'static> = unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) };

/// Waits until one of `events` (POLLIN, POLLOUT) or a hang-up shows on `fd`, at most `timeout`; returns what shows, zero if nothing does.
pub(super) fn poll(fd: BorrowedFd, events: i16, timeout: Duration) -> i16 {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: `entry` is one valid pollfd and outlives the call.
    let n = unsafe { libc::poll(&mut entry, 1, timeout) };
    if n > 0 { entry.revents } else { 0 }
}

/// Columns and rows of the terminal behind `fd`; `None` when it is none or knows no size.
pub(super) fn window_size(fd: BorrowedFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ fills one winsize, which `size` is.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &mut size) } == 0;
    (done && size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
}

/// Whether changing the terminal `fd` would not stop the process: it runs in the foreground, or job control has no say.
pub(super) fn in_foreground(fd: BorrowedFd) -> bool {
    // SAFETY: both calls take and return plain numbers.
    let (group, own) = unsafe { (libc::tcgetpgrp(fd.as_raw_fd()), libc::getpgid(0)) };
    group == -1 || group == own
}

/// The settings of the terminal `fd`.
pub(super) fn attributes(fd: BorrowedFd) -> io::Result<libc::termios> {
    let mut attributes = std::mem::MaybeUninit::uninit();
    // SAFETY: tcgetattr fills the struct when it returns zero, and only then is it used.
    unsafe {
        if libc::tcgetattr(fd.as_raw_fd(), attributes.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(attributes.assume_init())
    }
}

/// Changes the settings of the terminal `fd`. Async-signal-safe.
pub(super) fn set_attributes(fd: BorrowedFd, attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: `attributes` is a valid termios for the length of the call.
    match unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Passes every byte through, both ways, without echo.
pub(super) fn fully_raw(attributes: &mut libc::termios) {
    // SAFETY: cfmakeraw changes fields of the struct it is given.
    unsafe { libc::cfmakeraw(attributes) };
}

/// Runs `function` when the process exits by `exit` or by returning from `main`.
pub(super) fn at_exit(function: extern "C" fn()) {
    // SAFETY: a plain function without captures, valid for the life of the process. When the table is full the terminal is still
    // restored on the ordinary ways out.
    unsafe { libc::atexit(function) };
}

/// A new pseudo-terminal: its non-blocking master, its slave and the slave's path.
pub(super) fn open_pty() -> io::Result<(File, File, PathBuf)> {
    const FLAGS: libc::c_int = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let mut name = [0; 128];
    // SAFETY: each descriptor is checked before it is owned, and owned once; `name` is as long as said and ptsname_r ends it with a zero.
    unsafe {
        let master = owned(libc::posix_openpt(FLAGS | libc::O_NONBLOCK))?;
        if libc::unlockpt(master.as_raw_fd()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let error = libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let slave = owned(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, FLAGS))?;
        let path = PathBuf::from(OsStr::from_bytes(CStr::from_ptr(name.as_ptr()).to_bytes()));
        Ok((master.into(), slave.into(), path))
    }
}

/// # Safety
/// `fd`, unless negative, must be open and owned by nothing else.
unsafe fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes the file at `path`, with the call that the sandbox knows on every architecture.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a valid string for the length of the call.
    match unsafe { libc::unlinkat(libc::AT_FDCWD, path.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From now on a read from the terminal by a background job fails instead of stopping the whole VM.
pub(super) fn ignore_background_reads() {
    // SAFETY: ignoring a signal runs no handler.
    unsafe { libc::signal(libc::SIGTTIN, libc::SIG_IGN) };
}

/// The descriptor of an epoll set, for as long as the set is borrowed.
pub(super) fn epoll_fd(epoll: &Epoll) -> BorrowedFd<'_> {
    // SAFETY: the set owns its descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(epoll.as_raw_fd()) }
}

/// A second descriptor for what `fd` refers to.
pub(super) fn duplicate(fd: &impl AsFd) -> io::Result<File> {
    fd.as_fd().try_clone_to_owned().map(File::from)
}
