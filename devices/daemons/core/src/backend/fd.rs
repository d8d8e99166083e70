//! Event descriptors that front ends send.

#![allow(unsafe_code)] // taking over a descriptor

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::OFlags;
use vmm_sys_util::eventfd::EventFd;

/// Takes over an event descriptor. It is made non-blocking: what a front end did with it must not make us wait.
pub(crate) fn event(fd: OwnedFd) -> io::Result<EventFd> {
    unblock(&fd)?;
    // SAFETY: the descriptor is open and ours, and given up here.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// Makes reads and writes return at once.
pub(crate) fn unblock(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

/// The descriptor of an event.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event has it open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
