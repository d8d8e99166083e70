//! Interrupts and doorbells without a hypervisor, for tests of devices.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{InterruptLine, IoAddress, IoEvents, MsiMessage, MsiRouter, MsiVector};

/// Counts edges.
#[derive(Default)]
pub struct CountingLine(AtomicU64);

impl CountingLine {
    /// Edges raised so far.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl InterruptLine for CountingLine {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A vector whose triggers can be read back from its descriptor.
pub struct MockMsi {
    fd: EventFd,
    message: Mutex<Option<MsiMessage>>,
    requester: Mutex<u16>,
}

impl MockMsi {
    /// A masked vector of the function `requester`.
    pub fn new(requester: u16) -> io::Result<Self> {
        Ok(Self {
            fd: EventFd::new(EFD_NONBLOCK)?,
            message: Mutex::new(None),
            requester: Mutex::new(requester),
        })
    }

    /// The requester id of its function.
    pub fn requester(&self) -> u16 {
        *self.requester.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message the vector delivers, `None` while masked.
    pub fn message(&self) -> Option<MsiMessage> {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the triggers raised since the last call.
    pub fn take(&self) -> u64 {
        self.fd.read().unwrap_or(0)
    }
}

impl MsiVector for MockMsi {
    fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        Ok(())
    }
    fn rename(&self, requester: u16) -> io::Result<()> {
        *self.requester.lock().unwrap_or_else(PoisonError::into_inner) = requester;
        Ok(())
    }
    fn mask(&self) -> io::Result<()> {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }
    fn trigger(&self) -> io::Result<()> {
        self.fd.write(1)
    }
    fn pending(&self) -> bool {
        // Reading empties the counter, so put back what was there.
        match self.fd.read() {
            Ok(n) => self.fd.write(n).is_ok() && self.message().is_none(),
            Err(_) => false,
        }
    }
    fn event_fd(&self) -> &EventFd {
        &self.fd
    }
}

/// Hands out [`MockMsi`] vectors and remembers them.
#[derive(Default)]
pub struct MockRouter {
    /// Every vector handed out, in order.
    pub vectors: Mutex<Vec<Arc<MockMsi>>>,
}

impl MsiRouter for MockRouter {
    fn allocate(&self, requester: u16) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Arc::new(MockMsi::new(requester)?);
        self.vectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(vector.clone());
        Ok(vector)
    }
}

/// Remembers which doorbells are attached where.
#[derive(Default)]
pub struct MockIoEvents {
    /// Addresses attached now.
    pub attached: Mutex<Vec<IoAddress>>,
}

impl IoEvents for MockIoEvents {
    fn attach(&self, _fd: &EventFd, addr: IoAddress) -> io::Result<()> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).push(addr);
        Ok(())
    }
    fn detach(&self, _fd: &EventFd, addr: IoAddress) -> io::Result<()> {
        self.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|a| *a != addr);
        Ok(())
    }
}
