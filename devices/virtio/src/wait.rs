//! Sleeping until a worker has something to do.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::{Chain, VirtQueue};

/// A set of descriptors to sleep on.
pub(crate) struct Waiter(Epoll);

impl Waiter {
    /// Waits for any of `fds` to become readable.
    pub(crate) fn new(fds: &[RawFd]) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for fd in fds {
            epoll.ctl(ControlOperation::Add, *fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self(epoll))
    }

    /// Sleeps until one of them is readable. Which one is for the caller to find out: they all are non-blocking.
    pub(crate) fn wait(&self) {
        // An interrupted wait only means to look in vain once.
        let _ = self.0.wait(-1, &mut [EpollEvent::default()]);
    }
}

/// Whether a worker was asked to stop. The answer yes comes once.
pub(crate) fn stopping(stop: &EventFd) -> bool {
    stop.read().is_ok()
}

/// The next chain of `queue`, for which `notified` sleeps until the driver notifies or the worker is to stop; `None`: it is.
pub(crate) fn next(queue: &mut VirtQueue, notified: &Waiter, stop: &EventFd) -> Option<Chain> {
    loop {
        if stopping(stop) {
            return None;
        }
        if let Some(chain) = queue.pop() {
            return Some(chain);
        }
        if !queue.arm() {
            notified.wait();
            // A notification that came is answered by looking at the queue.
            let _ = queue.kick().read();
        }
    }
}

/// Descriptor numbers of `fds`.
pub(crate) fn raw<const N: usize>(fds: [&dyn AsRawFd; N]) -> [RawFd; N] {
    fds.map(AsRawFd::as_raw_fd)
}
