//! Responses that other threads give.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::EventfdFlags;

use super::Response;

/// What other threads left for the server.
#[derive(Default)]
pub(super) struct Mail {
    /// Connection and response.
    pub(super) responses: Vec<(u64, Response)>,
    pub(super) stop: bool,
    /// Streams may have more to send.
    pub(super) streams: bool,
}

/// Where other threads leave it.
#[derive(Clone)]
pub(super) struct Mailbox(Arc<Shared>);

struct Shared {
    mail: Mutex<Mail>,
    wake: OwnedFd,
    /// Whether there is a stream at all.
    streaming: AtomicBool,
}

impl Mailbox {
    pub(super) fn new() -> rustix::io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared {
            mail: Mutex::default(),
            wake,
            streaming: AtomicBool::new(false),
        })))
    }

    /// Says whether there is a stream. A stream looks for items after this; what comes before is seen then, what comes later wakes.
    pub(super) fn set_streaming(&self, streaming: bool) {
        self.0.streaming.store(streaming, Ordering::SeqCst);
    }

    /// Takes everything.
    pub(super) fn empty(&self) -> Mail {
        // Only fails when nothing was left.
        let _ = rustix::io::read(&self.0.wake, &mut [0; 8]);
        std::mem::take(&mut *self.0.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn leave(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.0.mail.lock().unwrap_or_else(PoisonError::into_inner));
        // The counter is far from an overflow, and one that is full wakes as well.
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

/// Tells a server that its streams may have more to send.
#[derive(Clone)]
pub struct StreamWaker(pub(super) Mailbox);

impl StreamWaker {
    /// Makes the server look, if it has a stream. It does not wait; call it from any thread.
    pub fn wake(&self) {
        if self.0.0.streaming.load(Ordering::SeqCst) {
            self.0.leave(|mail| mail.streams = true);
        }
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
