//! Responses that other threads give.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::EventfdFlags;

use super::Response;

/// What other threads left for the server.
#[derive(Default)]
pub(super) struct Mail {
    /// Connection and response.
    pub(super) responses: Vec<(u64, Response)>,
    pub(super) stop: bool,
}

/// Where other threads leave it.
#[derive(Clone)]
pub(super) struct Mailbox(Arc<Shared>);

struct Shared {
    mail: Mutex<Mail>,
    wake: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> rustix::io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mail = Mutex::default();
        Ok(Self(Arc::new(Shared { mail, wake })))
    }

    /// Takes everything.
    pub(super) fn empty(&self) -> Mail {
        // Only fails when nothing was left.
        let _ = rustix::io::read(&self.0.wake, &mut [0; 8]);
        std::mem::take(&mut *self.0.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn leave(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.0.mail.lock().unwrap_or_else(PoisonError::into_inner));
        // The counter cannot overflow: there is at most one response a connection between two reads.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }
}

impl AsFd for Mailbox {
    /// Readable when there is something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}

/// Ends a server from another thread.
#[derive(Clone)]
pub struct Stopper(pub(super) Mailbox);

impl Stopper {
    /// Asks the server to end. It sends what it has to send, for a moment, and returns from its loop.
    pub fn stop(&self) {
        self.0.leave(|mail| mail.stop = true);
    }
}

/// The duty to respond to a call. Dropped without a response, it responds with 500.
pub struct Later {
    to: Option<(Mailbox, u64)>,
}

impl Later {
    pub(super) fn new(mailbox: Mailbox, connection: u64) -> Self {
        Self {
            to: Some((mailbox, connection)),
        }
    }

    /// Responds, from any thread, without waiting.
    pub fn respond(mut self, response: Response) {
        self.deliver(response);
    }

    fn deliver(&mut self, response: Response) {
        if let Some((mailbox, connection)) = self.to.take() {
            mailbox.leave(|mail| mail.responses.push((connection, response)));
        }
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        if self.to.is_some() {
            self.deliver(Response::error(500, "nobody answered the request"));
        }
    }
}
