//! One queue of a guest on whose rings a daemon works itself.
//!
//! The driver's notifications go to the daemon and the daemon's interrupts to the guest, past the VMM. Which requests the daemon has
//! stands in its record ([`Inflight`](crate::inflight::Inflight)), if its kind of device needs one, and how far it is in the used ring.

use std::io;
use std::os::fd::BorrowedFd;

use triarch_device_core::Event;
use triarch_virtio::{QueueStateV1, RingFault, VirtQueue};
use vmm_sys_util::eventfd::EventFd;

use crate::LinkError;
use crate::raw::borrow;
use crate::session::Ring;

/// What the daemon signals completions with.
enum Call {
    /// The guest's interrupt itself.
    Interrupt(EventFd),
    /// An event of ours, while the driver has no interrupt for the queue, or none that is an event.
    Own(Event),
}

/// A queue that a daemon has.
struct Far {
    call: Call,
    /// Index of the used ring when the daemon got it.
    begun: u16,
}

/// A queue that runs.
pub(crate) struct Direct {
    queue: VirtQueue,
    far: Option<Far>,
}

impl Direct {
    /// Takes over a queue that no daemon has.
    pub(crate) fn new(queue: VirtQueue) -> Self {
        Self { queue, far: None }
    }

    pub(crate) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Whether a daemon has it.
    pub(crate) fn is_lent(&self) -> bool {
        self.far.is_some()
    }

    /// The event that nobody but the device's thread waits for.
    pub(crate) fn own_call(&self) -> Option<&Event> {
        match &self.far {
            Some(Far {
                call: Call::Own(event), ..
            }) => Some(event),
            _ => None,
        }
    }

    /// Prepares the queue for a daemon, which is to begin behind what is in the used ring: it knows from its record what of the rest it
    /// has. `None` if the driver broke the queue: nobody can work on it any more.
    pub(crate) fn lend(&mut self) -> Result<Option<Ring<'_>>, LinkError> {
        if self.queue.faulted() {
            return Ok(None);
        }
        let used = match self.progress() {
            Ok(used) => used,
            Err(fault) => {
                self.queue.fault(&fault);
                return Ok(None);
            }
        };
        // What one before did not want to be notified of, this one may. The kick that follows covers what came meanwhile.
        self.queue.arm();
        let call = self.make_call()?;
        self.far = Some(Far { call, begun: used });
        Ok(self.ring())
    }

    /// The ring that a daemon has.
    pub(crate) fn ring(&self) -> Option<Ring<'_>> {
        let far = self.far.as_ref()?;
        Some(Ring {
            index: self.queue.index(),
            size: self.queue.size(),
            descriptors: self.queue.descriptors(),
            available: self.queue.driver_area(),
            used: self.queue.device_area(),
            logged: true,
            base: far.begun,
            kick: borrow(self.queue.kick()),
            call: far.call.descriptor(),
        })
    }

    /// Index of the used ring, which cannot be further behind the available ring's than the queue is long.
    fn progress(&self) -> Result<u16, RingFault> {
        let (offered, used) = (self.queue.offered()?, self.queue.completed()?);
        if offered.wrapping_sub(used) > self.queue.size() {
            return Err(RingFault::AvailIndex);
        }
        Ok(used)
    }

    fn make_call(&self) -> Result<Call, LinkError> {
        match self.queue.interrupt_event() {
            Some(event) => Ok(Call::Interrupt(event)),
            None => Event::new()
                .map(Call::Own)
                .map_err(LinkError::host("an event of a daemon's ring")),
        }
    }

    /// The driver chose another interrupt: the event that leads to it now. `None` if no daemon has the queue.
    pub(crate) fn renew_call(&mut self) -> Result<Option<BorrowedFd<'_>>, LinkError> {
        if self.far.is_none() {
            return Ok(None);
        }
        let call = self.make_call()?;
        Ok(self.far.as_mut().map(|far| {
            far.call = call;
            far.call.descriptor()
        }))
    }

    /// Makes the daemon look at the ring.
    pub(crate) fn nudge(&self) {
        // Fails only when it is readable already.
        let _ = self.queue.kick().write(1);
    }

    /// The daemon signalled the event of ours.
    pub(crate) fn called(&self) {
        if self.own_call().is_some_and(Event::clear) {
            self.queue.interrupt();
        }
    }

    /// The daemon is gone; whether it has completed anything.
    pub(crate) fn disconnect(&mut self) -> bool {
        let Some(far) = self.far.take() else {
            return false;
        };
        // It may have ended between a completion and the interrupt for it.
        self.queue.interrupt();
        self.queue.completed().is_ok_and(|used| used != far.begun)
    }

    /// Gives the queue back, `open` requests behind what is in the used ring.
    pub(crate) fn into_queue(mut self, open: u16) -> (VirtQueue, QueueStateV1) {
        let index = self.queue.index();
        // A ring that is gone is of no use to anybody; who starts it again sees that.
        let used = self.queue.completed().unwrap_or_else(|_| self.queue.state().next_used);
        let state = QueueStateV1 {
            index,
            next_avail: used.wrapping_add(open),
            next_used: used,
        };
        self.queue.restore(&state);
        (self.queue, state)
    }
}

impl Call {
    fn descriptor(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        match self {
            Self::Interrupt(event) => borrow(event),
            Self::Own(event) => event.as_fd(),
        }
    }
}

/// What of a record cannot be used is the host's trouble.
pub(crate) fn record_failed(error: crate::inflight::RecordError) -> LinkError {
    LinkError::Host {
        what: "a record of requests in flight",
        cause: io::Error::other(error),
    }
}
