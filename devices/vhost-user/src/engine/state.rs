//! The daemon's state, as far as it is agreed on over the connection. The state itself takes another way ([`crate::state`]).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use triarch_vhost_protocol::StateTransfer;

use super::lanes::Pause;
use super::{Engine, Link};
use crate::direct::record_failed;
use crate::inflight::Inflight;
use crate::{LinkError, StateError};

/// What is asked of the thread about the daemon's state, and about requests that no daemon has answered.
pub(crate) enum StateOrder {
    /// The daemon is given a channel; answered with another one, if it made one.
    Begin(StateTransfer, OwnedFd, SyncSender<Result<Option<OwnedFd>, StateError>>),
    /// Nothing goes through the channel any more.
    End(End, SyncSender<Result<(), StateError>>),
    /// Answered with the heads of the requests of a queue that has stopped, of so many entries, that have no answer.
    Unanswered(u16, u16, SyncSender<Result<Vec<u16>, LinkError>>),
    /// A queue starts with these next.
    Reopen(u16, Vec<u16>),
}

/// How a transfer ends.
pub(crate) enum End {
    /// The daemon is asked whether it worked, and has so long to answer.
    Check(Duration),
    /// The daemon is given up, for this reason: nobody could go on with it.
    Abandon(String),
}

impl Engine {
    pub(super) fn transfer(&mut self, order: StateOrder) {
        // Whoever asked waits for it.
        match order {
            StateOrder::Begin(transfer, channel, reply) => {
                let begun = self.begin_state(transfer, &channel);
                // The daemon alone has it now, so that its end shows.
                drop(channel);
                let _ = reply.send(begun);
            }
            StateOrder::End(end, reply) => {
                let _ = reply.send(self.end_state(end));
            }
            StateOrder::Unanswered(index, size, reply) => {
                self.shared.wake.taken();
                let _ = reply.send(self.unanswered(index, size));
            }
            StateOrder::Reopen(index, heads) => {
                if let Some(pause) = self.paused.get_mut(usize::from(index)) {
                    *pause = Some(Pause::Heads(heads));
                }
            }
        }
    }

    fn unanswered(&self, index: u16, size: u16) -> Result<Vec<u16>, LinkError> {
        match self.paused.get(usize::from(index)).and_then(Option::as_ref) {
            Some(Pause::Requests(parked)) => Ok(parked.heads()),
            Some(Pause::Heads(heads)) => Ok(heads.clone()),
            Some(Pause::Record(state)) => {
                let read = |record: &Inflight| record.read(index, size, state.next_used);
                let heads = self.record.as_ref().map_or(Ok(Vec::new()), read);
                heads.map_err(record_failed)
            }
            None => Ok(Vec::new()),
        }
    }

    fn begin_state(&mut self, transfer: StateTransfer, channel: &OwnedFd) -> Result<Option<OwnedFd>, StateError> {
        if self.lanes.iter().any(Option::is_some) {
            return Err(StateError::Running);
        }
        // A device that was just made is not connected yet.
        self.tend();
        let wake = &self.shared.wake;
        let begun = match &mut self.link {
            Link::Up { session, .. } => session.begin_state(transfer, channel.as_fd(), wake),
            Link::Down { .. } => return Err(StateError::NoDaemon),
        };
        self.check_state(begun)
    }

    fn end_state(&mut self, end: End) -> Result<(), StateError> {
        let wake = &self.shared.wake;
        // There may be another daemon by now, which knows nothing of it.
        let Link::Up { session, .. } = &mut self.link else {
            return Err(StateError::Lost);
        };
        match end {
            End::Check(patience) => {
                let done = session.check_state(patience, wake);
                self.check_state(done)
            }
            End::Abandon(reason) => {
                if session.end_state() {
                    self.lost(&LinkError::State(reason));
                }
                Ok(())
            }
        }
    }

    /// Gives the connection up if it was that which failed.
    fn check_state<T>(&mut self, done: Result<T, StateError>) -> Result<T, StateError> {
        if let Err(StateError::Link(error)) = &done {
            self.lost(error);
        }
        done
    }
}
