//! The one way to the controller.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use triarch_api::{ApiError, Reply, Request};
use triarch_legacy::PowerEvent;
use triarch_vcpu::VcpuEvent;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the controller is told.
#[derive(Debug)]
pub enum Message {
    /// A client asks for something; the answer goes into the channel.
    Request(Request, SyncSender<Result<Reply, ApiError>>),
    /// Something happened in the guest. The number tells which build of it: what a guest did before its reset is of no interest
    /// after it.
    Guest(u64, GuestEvent),
    /// The process was asked to end (SIGTERM, SIGINT).
    Terminate,
}

/// What happens in a guest.
#[derive(Debug)]
pub enum GuestEvent {
    /// It used a power or reset register.
    Power(PowerEvent),
    /// A vCPU left the guest for good.
    Vcpu(usize, VcpuEvent),
}

/// Sends messages to the controller, from any thread, without ever waiting for it.
#[derive(Clone)]
pub struct Inbox {
    messages: Sender<Message>,
    wake: Arc<EventFd>,
}

impl Inbox {
    /// An inbox and its other end.
    pub(crate) fn new() -> io::Result<(Self, Outbox)> {
        let (messages, receiver) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok((
            Self {
                messages,
                wake: wake.clone(),
            },
            Outbox {
                messages: receiver,
                wake,
            },
        ))
    }

    /// Leaves a message. When the controller has ended, nobody needs it any more.
    pub fn post(&self, message: Message) {
        let _ = self.messages.send(message);
        let _ = self.wake.write(1);
    }

    /// Asks for something and waits for the answer.
    pub fn request(&self, request: Request) -> Result<Reply, ApiError> {
        let (reply, answer) = sync_channel(1);
        self.post(Message::Request(request, reply));
        answer
            .recv()
            .unwrap_or_else(|_| Err(ApiError::Failed("the VMM is shutting down".into())))
    }
}

/// The controller's end.
pub(crate) struct Outbox {
    messages: Receiver<Message>,
    wake: Arc<EventFd>,
}

impl Outbox {
    /// The next message, if there is one.
    pub(crate) fn next(&self) -> Option<Message> {
        self.messages.try_recv().ok()
    }

    /// Readable when there are messages.
    pub(crate) fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }
}
