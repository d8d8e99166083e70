//! How the device tells the driver something: event descriptors of the front end's, and a socket for the configuration space.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::SendFlags;
use triarch_vhost_protocol::{BACKEND_CONFIG_CHANGE_MSG, message};
use triarch_virtio::VirtioInterrupt;
use vmm_sys_util::eventfd::EventFd;

/// What a ring signals with.
#[derive(Default)]
pub(crate) struct Signals {
    pub(crate) call: Option<EventFd>,
    pub(crate) error: Option<EventFd>,
}

/// The front end's ears.
pub(crate) struct Calls {
    rings: Vec<Mutex<Signals>>,
    back: Mutex<Option<OwnedFd>>,
}

impl Calls {
    /// None yet, for `queues` rings.
    pub(crate) fn new(queues: usize) -> Self {
        Self {
            rings: (0..queues).map(|_| Mutex::default()).collect(),
            back: Mutex::new(None),
        }
    }

    /// Changes what ring `index` signals with.
    pub(crate) fn change(&self, index: usize, change: impl FnOnce(&mut Signals)) {
        if let Some(ring) = self.rings.get(index) {
            change(&mut ring.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Takes over the socket for our own requests.
    pub(crate) fn set_back_channel(&self, socket: OwnedFd) {
        *self.back.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }
}

fn signal(event: Option<&EventFd>) -> io::Result<()> {
    match event.map(|event| event.write(1)) {
        // A counter at its maximum is readable already.
        Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

impl VirtioInterrupt for Calls {
    fn queue(&self, index: u16) -> io::Result<()> {
        let Some(ring) = self.rings.get(usize::from(index)) else {
            return Ok(());
        };
        signal(ring.lock().unwrap_or_else(PoisonError::into_inner).call.as_ref())
    }

    fn config(&self) -> io::Result<()> {
        let back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(back) = back.as_ref() else {
            // A front end that did not give us one learns of it when it asks.
            return Ok(());
        };
        let bytes = message(BACKEND_CONFIG_CHANGE_MSG, 0, &[]);
        match rustix::net::send(back, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // So full of the same message that another one adds nothing.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn needs_reset(&self) {
        for ring in &self.rings {
            // The front end may not listen.
            let _ = signal(ring.lock().unwrap_or_else(PoisonError::into_inner).error.as_ref());
        }
    }

    fn queue_event(&self, _index: u16) -> Option<EventFd> {
        None
    }
}
