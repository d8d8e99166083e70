//! An event descriptor: one thread or process wakes another.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::EventfdFlags;

/// Readable since it was rung until it is cleared. Clones are the same event.
#[derive(Debug, Clone)]
pub struct Event(Arc<OwnedFd>);

impl Event {
    /// One that nobody rang. Reading and writing it never wait.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Arc::new(rustix::event::eventfd(0, flags)?)))
    }

    /// Wakes whoever waits. It does not wait itself: a counter that is full wakes as well.
    pub fn ring(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Takes note of all rings until now; whether there were any.
    pub fn clear(&self) -> bool {
        rustix::io::read(&*self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_until_it_is_cleared() {
        let event = Event::new().expect("an event");
        assert!(!event.clear());
        event.ring();
        event.clone().ring();
        assert!(event.clear());
        assert!(!event.clear());
    }
}
