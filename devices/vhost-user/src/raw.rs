//! Events of other crates, as descriptors that can be sent.

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor, and the result does not outlive the reference to it.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
