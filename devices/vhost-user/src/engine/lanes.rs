//! The queues of a device, and who works on them.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::PoisonError;
use std::time::Instant;

use triarch_virtio::{QueueStateV1, VirtQueue};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{CALL, DRAIN, Engine, KICK, Link, Way};
use crate::LinkError;
use crate::direct::{Direct, record_failed};
use crate::relay::{Parked, Relay};

/// A queue that runs.
pub(super) enum Lane {
    /// Its requests pass through the device's thread, which also knows them while there is no daemon.
    Relay(Relay),
    /// A daemon works on its rings, or did and will be followed by another that does.
    Direct(Direct),
}

/// What is known of a queue that does not run, for when it runs again.
pub(super) enum Pause {
    /// Its requests without an answer.
    Requests(Parked),
    /// They stand in the daemon's record; how the queue was handed back.
    Record(QueueStateV1),
    /// Their heads, in order: the daemon served another process.
    Heads(Vec<u16>),
}

impl Lane {
    fn queue(&self) -> &VirtQueue {
        match self {
            Self::Relay(relay) => relay.queue(),
            Self::Direct(direct) => direct.queue(),
        }
    }
}

impl Engine {
    /// Hands queue `index` to the daemon, with what is open.
    pub(super) fn hand_over(&mut self, index: usize) -> Result<(), LinkError> {
        match &self.link {
            Link::Up { way: Some(way), .. } => match way {
                Way::Direct => self.lend(index),
                Way::Relay(_) => self.relay(index),
            },
            _ => Ok(()),
        }
    }

    /// Lets the daemon work on the rings of queue `index`.
    fn lend(&mut self, index: usize) -> Result<(), LinkError> {
        let mut again = 0;
        let record = self.record.as_ref();
        match self.lanes.get_mut(index).and_then(Option::take) {
            None => return Ok(()),
            Some(Lane::Direct(direct)) => {
                let queue = direct.queue();
                if let (Some(record), Ok(used)) = (record, queue.completed()) {
                    // What the daemon after it makes of a wrong one is its own matter.
                    again = record
                        .read(queue.index(), queue.size(), used)
                        .map_or(0, |list| list.len());
                }
                self.lanes[index] = Some(Lane::Direct(direct));
            }
            Some(Lane::Relay(relay)) => {
                self.unwatch(relay.queue().kick().as_raw_fd());
                let (queue, heads) = relay.into_heads();
                let used = queue.state().next_used;
                let noted = record.map_or(Ok(()), |record| record.write(index as u16, queue.size(), used, &heads));
                again = heads.len();
                self.lanes[index] = Some(Lane::Direct(Direct::new(queue)));
                noted.map_err(record_failed)?;
            }
        }
        let (Some(Lane::Direct(direct)), Link::Up { session, .. }) = (&mut self.lanes[index], &mut self.link) else {
            return Ok(());
        };
        let Some(ring) = direct.lend()? else {
            return Ok(());
        };
        session.start(&ring, &self.shared.wake)?;
        session.enable(
            index as u16,
            self.shared.peer.kind.enabled(index as u16),
            &self.shared.wake,
        )?;
        direct.nudge();
        let own = direct.own_call().map(AsRawFd::as_raw_fd);
        self.watch_call(own, index)?;
        self.resubmitted(again);
        Ok(())
    }

    /// Passes the requests of queue `index` on to the daemon.
    fn relay(&mut self, index: usize) -> Result<(), LinkError> {
        self.bring_home(index);
        let Link::Up {
            session,
            way: Some(Way::Relay(shadow)),
            ..
        } = &mut self.link
        else {
            return Ok(());
        };
        let Some(Some(Lane::Relay(relay))) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        relay.connect(shadow)?;
        if let Some(ring) = relay.ring() {
            session.start(&ring, &self.shared.wake)?;
            session.enable(
                index as u16,
                self.shared.peer.kind.enabled(index as u16),
                &self.shared.wake,
            )?;
        }
        let answers = self.shared.peer.kind.answers(index as u16);
        let open = if answers { relay.open() } else { 0 };
        let call = relay.call().map(AsRawFd::as_raw_fd);
        self.watch_call(call, index)?;
        self.resubmitted(open.into());
        match self.lanes.get_mut(index) {
            Some(Some(Lane::Relay(relay))) => {
                relay.nudge();
                relay.forward()
            }
            _ => Ok(()),
        }
    }

    fn watch_call(&self, call: Option<std::os::fd::RawFd>, index: usize) -> Result<(), LinkError> {
        let Some(call) = call else { return Ok(()) };
        let event = EpollEvent::new(EventSet::IN, CALL | index as u64);
        let watched = self.epoll.ctl(ControlOperation::Add, call, event);
        watched.map_err(LinkError::host("a watch on a ring"))
    }

    fn resubmitted(&self, requests: usize) {
        if requests > 0 {
            let mut status = self.shared.status.lock().unwrap_or_else(PoisonError::into_inner);
            status.resubmitted += requests as u64;
        }
    }

    /// Takes over what the daemon before had of queue `index`, whose rings no daemon has any more.
    fn bring_home(&mut self, index: usize) {
        let Some(slot) = self.lanes.get_mut(index) else {
            return;
        };
        let direct = match slot.take() {
            Some(Lane::Direct(direct)) => direct,
            other => {
                *slot = other;
                return;
            }
        };
        let (queue, state) = direct.into_queue(0);
        let heads = match &self.record {
            Some(record) => record.read(queue.index(), queue.size(), state.next_used),
            None => Ok(Vec::new()),
        };
        let relay = Relay::adopt(self.shared.peer.kind.clone(), queue, heads);
        *slot = Some(Lane::Relay(relay));
        self.watch_kick(index);
    }

    fn watch_kick(&self, index: usize) {
        let Some(Some(lane)) = self.lanes.get(index) else {
            return;
        };
        if let Err(error) = self.watch(lane.queue().kick().as_raw_fd(), KICK | index as u64) {
            tracing::error!(device = %self.shared.id, %error, "cannot wait for the driver, the queue stands still");
        }
    }

    pub(super) fn start(&mut self, queue: VirtQueue) {
        let index = usize::from(queue.index());
        let pause = self.paused.get_mut(index).and_then(Option::take);
        let Some(slot) = self.lanes.get_mut(index) else {
            return;
        };
        let kind = self.shared.peer.kind.clone();
        // A queue that was reset meanwhile begins anew.
        let same = |state: &QueueStateV1| *state == queue.state() && (state.next_avail, state.next_used) != (0, 0);
        *slot = Some(match pause {
            Some(Pause::Record(state)) if same(&state) => Lane::Direct(Direct::new(queue)),
            Some(Pause::Requests(parked)) => Lane::Relay(Relay::new(kind, queue, Some(parked))),
            Some(Pause::Heads(heads)) => Lane::Relay(Relay::adopt(kind, queue, Ok(heads))),
            _ => Lane::Relay(Relay::new(kind, queue, None)),
        });
        if matches!(slot, Some(Lane::Relay(_))) {
            self.watch_kick(index);
        }
        if self.failing {
            self.bring_home(index);
        }
        let done = self.hand_over(index);
        self.check(done);
        // The notification of what is there already may have been taken before.
        self.kicked(index);
    }

    /// Takes a queue back, if possible with nothing open.
    pub(super) fn stop(&mut self, index: usize) -> Option<VirtQueue> {
        let base = match self.lanes.get_mut(index)? {
            Some(Lane::Relay(_)) => self.drain(index).map(|()| None),
            Some(Lane::Direct(_)) => self.recall(index),
            None => return None,
        };
        let base = base.unwrap_or_else(|error| {
            self.lost(&error);
            None
        });
        match self.lanes.get_mut(index)?.take()? {
            Lane::Relay(mut relay) => {
                self.unwatch(relay.queue().kick().as_raw_fd());
                if let Some(call) = relay.call() {
                    self.unwatch(call.as_raw_fd());
                }
                relay.disconnect();
                let (queue, parked) = relay.into_parts();
                self.paused[index] = Some(Pause::Requests(parked));
                Some(queue)
            }
            Lane::Direct(mut direct) => {
                if let Some(call) = direct.own_call() {
                    self.unwatch(call.as_raw_fd());
                }
                direct.disconnect();
                let used = direct.queue().completed();
                if self.record.is_none() || base.is_some() && base == used.as_ref().ok().copied() {
                    return Some(direct.into_queue(0).0);
                }
                // Somebody may still complete some of them: the record is looked at when the queue starts again.
                let queue = direct.queue();
                let open = match (&self.record, used) {
                    (Some(record), Ok(used)) => record
                        .read(queue.index(), queue.size(), used)
                        .map_or(0, |list| list.len()),
                    _ => 0,
                };
                let (queue, state) = direct.into_queue(open as u16);
                self.paused[index] = Some(Pause::Record(state));
                Some(queue)
            }
        }
    }

    /// Takes the rings of a queue from the daemon; how many requests it had taken in all.
    fn recall(&mut self, index: usize) -> Result<Option<u16>, LinkError> {
        let (Some(Some(Lane::Direct(direct))), Link::Up { session, .. }) = (self.lanes.get(index), &mut self.link)
        else {
            return Ok(None);
        };
        if !direct.is_lent() {
            return Ok(None);
        }
        session.stop(index as u16, &self.shared.wake).map(Some)
    }

    /// Waits until the daemon has answered all requests of a queue that are passed on to it, and takes the ring from it.
    fn drain(&mut self, index: usize) -> Result<(), LinkError> {
        let Link::Up { session, .. } = &mut self.link else {
            return Ok(());
        };
        let Some(Some(Lane::Relay(relay))) = self.lanes.get_mut(index) else {
            return Ok(());
        };
        if relay.call().is_none() {
            return Ok(());
        }
        let deadline = Instant::now() + DRAIN;
        relay.collect()?;
        while relay.open() > 0 && self.shared.peer.kind.answers(index as u16) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Silent("the requests it had"));
            }
            let mut fds: Vec<_> = session.sockets().collect();
            fds.extend(relay.call().map(AsFd::as_fd));
            crate::connection::wait_any(&fds, left)?;
            session.look()?;
            relay.collect()?;
        }
        session.stop(index as u16, &self.shared.wake).map(|_| ())
    }

    /// The driver notified, of a queue whose requests pass through here.
    pub(super) fn kicked(&mut self, index: usize) {
        let failing = self.failing;
        let Some(Some(Lane::Relay(relay))) = self.lanes.get_mut(index) else {
            return;
        };
        let _ = relay.queue().kick().read();
        if failing {
            return relay.fail();
        }
        let done = relay.forward();
        self.check(done);
    }

    /// The daemon completed something.
    pub(super) fn called(&mut self, index: usize) {
        let collected = match self.lanes.get_mut(index) {
            Some(Some(Lane::Relay(relay))) => relay.collect(),
            Some(Some(Lane::Direct(direct))) => return direct.called(),
            _ => return,
        };
        match collected {
            Ok(count) => {
                if let Link::Up { useful, .. } = &mut self.link {
                    *useful |= count > 0;
                }
            }
            Err(error) => self.lost(&error),
        }
    }

    /// Answers all requests in the daemon's place.
    pub(super) fn fail(&mut self) {
        (0..self.lanes.len()).for_each(|index| self.bring_home(index));
        for lane in self.lanes.iter_mut().flatten() {
            if let Lane::Relay(relay) = lane {
                relay.fail();
            }
        }
    }

    /// The driver chose other interrupts.
    pub(super) fn redirect(&mut self) -> Result<(), LinkError> {
        for index in 0..self.lanes.len() {
            let (Some(Some(Lane::Direct(direct))), Link::Up { session, .. }) = (self.lanes.get_mut(index), &self.link)
            else {
                continue;
            };
            if let Some(own) = direct.own_call() {
                // As `unwatch`.
                let _ = self
                    .epoll
                    .ctl(ControlOperation::Delete, own.as_raw_fd(), EpollEvent::default());
            }
            let Some(call) = direct.renew_call()? else {
                continue;
            };
            session.set_call(index as u16, call, &self.shared.wake)?;
            // One that went the old way may have come to nobody.
            direct.queue().interrupt();
            let own = direct.own_call().map(AsRawFd::as_raw_fd);
            self.watch_call(own, index)?;
        }
        Ok(())
    }

    /// Takes everything back from the daemon.
    pub(super) fn leave(&mut self) {
        let (mut worked, mut lent) = (false, false);
        for lane in self.lanes.iter_mut().flatten() {
            let (call, has) = match lane {
                Lane::Relay(relay) => (relay.call(), relay.call().is_some()),
                Lane::Direct(direct) => (direct.own_call(), direct.is_lent()),
            };
            lent |= has;
            if let Some(call) = call {
                // As `unwatch`.
                let _ = self
                    .epoll
                    .ctl(ControlOperation::Delete, call.as_raw_fd(), EpollEvent::default());
            }
            match lane {
                Lane::Relay(relay) => relay.disconnect(),
                Lane::Direct(direct) => worked |= direct.disconnect(),
            }
        }
        if lent && let Some(log) = &self.pages {
            // It may have been killed between writing and marking.
            log.leave_gaps();
        }
        if let Link::Up { session, useful, .. } = &mut self.link {
            *useful |= worked;
            for socket in session.sockets() {
                // As `unwatch`.
                let _ = self
                    .epoll
                    .ctl(ControlOperation::Delete, socket.as_raw_fd(), EpollEvent::default());
            }
        }
    }
}
