//! The one way to the controller.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use arc_swap::ArcSwapOption;
use triarch_api::events::EventLog;
use triarch_api::jobs::JobBoard;
use triarch_api::metrics::Metrics;
use triarch_api::{Answer, ApiError, Handler, Reply, Request, VmInfo};
use triarch_legacy::PowerEvent;
use triarch_vcpu::VcpuEvent;
use triarch_vfio::Alarm;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::metrics::{GuestMeters, Meters};
use crate::migration::Call;
use crate::snapshot::SnapshotMeters;

/// What the controller is told.
#[derive(Debug)]
pub enum Message {
    /// A client asks for something.
    Request(Request, Answer),
    /// Something happened in the guest. The number tells which build of it: what a guest did before its reset is of no interest
    /// after it.
    Guest(u64, GuestEvent),
    /// The log file should be opened again; or, when it is the kernel who says so, the terminal is gone (SIGHUP).
    HangUp {
        /// No process sent it.
        by_kernel: bool,
    },
    /// It is time to tell the supervisor that the controller does its work.
    Alive,
    /// It is time to look whether the guest still does what it was asked for.
    Patience,
    /// The terminal may have another size (SIGWINCH).
    Resized,
    /// The host tells something of the device of its own with this name.
    OfHost(String, Alarm),
    /// The thread that moves the guest wants something done.
    Call(Call),
}

/// What happens in a guest.
#[derive(Debug)]
pub enum GuestEvent {
    /// It used a power or reset register.
    Power(PowerEvent),
    /// A vCPU left the guest for good.
    Vcpu(usize, VcpuEvent),
    /// It may have done something about processors that come or go.
    Processors,
    /// It may have done something about memory devices that come or go.
    Dimms,
    /// It may have done something about PCI devices that come or go.
    Slots,
    /// The host is done with the device of this id, which the guest has no more.
    Unplugged(String),
    /// A device lost its daemon or has one again; [`Machine`](crate::Machine) knows which.
    Link,
    /// Its balloon has another size, or a driver; [`Machine`](crate::Machine) knows which.
    Balloon,
    /// Memory that it should have cannot be provided, for this reason. Threads that touch it stand still for good.
    MemoryLost(String),
    /// It has plugged or unplugged memory; [`Machine`](crate::Machine) knows how much.
    Memory,
}

/// Sends messages to the controller, from any thread, without ever waiting for it.
#[derive(Clone)]
pub struct Inbox {
    messages: Sender<Message>,
    wake: Arc<EventFd>,
    info: Arc<ArcSwapOption<VmInfo>>,
    meters: Arc<Meters>,
    events: Arc<EventLog>,
    jobs: Arc<JobBoard>,
}

impl Inbox {
    /// An inbox and its other end.
    pub(crate) fn new() -> io::Result<(Self, Outbox)> {
        let (messages, receiver) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let info = Arc::new(ArcSwapOption::empty());
        let meters = Arc::new(Meters::new());
        let events = EventLog::new();
        Ok((
            Self {
                messages,
                wake: wake.clone(),
                info: info.clone(),
                meters: meters.clone(),
                jobs: JobBoard::new(events.clone()),
                events,
            },
            Outbox {
                messages: receiver,
                wake,
                info,
                meters,
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
        let (sender, receiver) = sync_channel(1);
        // It fails only when nobody receives, and we do.
        let answer = Answer::new(move |result| drop(sender.send(result)));
        self.submit(request, answer);
        // An answer that is forgotten answers by itself.
        receiver
            .recv()
            .unwrap_or_else(|_| Err(ApiError::Failed("the request was lost".to_owned())))
    }
}

impl Handler for Inbox {
    fn submit(&self, request: Request, answer: Answer) {
        self.post(Message::Request(request, answer));
    }

    fn info(&self) -> Option<Arc<VmInfo>> {
        self.info.load_full()
    }

    fn metrics(&self) -> Metrics {
        self.meters.gather()
    }

    fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    fn jobs(&self) -> &Arc<JobBoard> {
        &self.jobs
    }
}

/// The controller's end.
pub(crate) struct Outbox {
    messages: Receiver<Message>,
    wake: Arc<EventFd>,
    info: Arc<ArcSwapOption<VmInfo>>,
    meters: Arc<Meters>,
}

impl Outbox {
    /// The next message, if there is one.
    pub(crate) fn next(&self) -> Option<Message> {
        self.messages.try_recv().ok()
    }

    /// Shows what `vm.info` tells from now on, to whoever asks without a message.
    pub(crate) fn publish(&self, info: Option<VmInfo>) {
        self.info.store(info.map(Arc::new));
    }

    /// What comes of snapshots and restores.
    pub(crate) fn snapshots(&self) -> &SnapshotMeters {
        &self.meters.snapshots
    }

    /// Shows what this guest counts from now on, or that there is none.
    pub(crate) fn show_meters(&self, guest: Option<GuestMeters>) {
        self.meters.show(guest);
    }

    /// Readable when there are messages.
    pub(crate) fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }
}
