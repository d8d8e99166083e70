//! Who started the process, and looks after it.

use std::io;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use triarch_api::Phase;
use vmm_sys_util::timerfd::TimerFd;

use crate::control::watch;
use crate::{Inbox, Message};

/// What a [`Controller`](crate::Controller) tells whoever started the process. All calls come from the controller's thread, and must
/// not wait for anybody.
pub trait Supervisor {
    /// Requests are served from now on; a guest that was described at the start runs.
    fn ready(&mut self);

    /// The guest is in another phase.
    fn phase(&mut self, phase: Phase);

    /// The VMM is about to end.
    fn stopping(&mut self);

    /// How often [`alive`](Self::alive) is wanted, if at all.
    fn alive_every(&self) -> Option<Duration>;

    /// The controller does its work: it is called from between two messages.
    fn alive(&mut self);

    /// Opens the log file again, whose name may belong to another file by now. Returns whether there is a log file.
    fn reopen_log(&mut self) -> bool;
}

/// A [`Supervisor`] that wants to know nothing.
pub struct Unsupervised;

impl Supervisor for Unsupervised {
    fn ready(&mut self) {}

    fn phase(&mut self, _phase: Phase) {}

    fn stopping(&mut self) {}

    fn alive_every(&self) -> Option<Duration> {
        None
    }

    fn alive(&mut self) {}

    fn reopen_log(&mut self) -> bool {
        false
    }
}

/// Leaves [`Message::Alive`] in the inbox again and again: only a controller that gets to its messages finds them.
pub(crate) struct Heartbeat {
    timer: TimerFd,
    inbox: Inbox,
}

impl Heartbeat {
    pub(crate) fn new(every: Duration, inbox: Inbox) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(every, Some(every))?;
        Ok(Self { timer, inbox })
    }
}

impl MutEventSubscriber for Heartbeat {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // How many were missed does not matter.
        let _ = self.timer.wait();
        self.inbox.post(Message::Alive);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        use std::os::fd::AsRawFd;
        watch(ops, self.timer.as_raw_fd());
    }
}
