//! A device on its way out.

use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use triarch_api::Handler;
use triarch_api::events::kind;
use triarch_api::jobs::JobHandle;

use crate::backends::End;
use crate::changes::{Direction, Outcome};
use crate::control::Controller;
use crate::devices::Taken;
use crate::{GuestEvent, Message, configured};

/// A device the guest was asked for.
pub(super) struct Asked {
    pub(super) id: String,
    pub(super) slot: u8,
    /// All that go with it, it among them.
    pub(super) with: Vec<String>,
    /// Since when the guest has had the time to give it back.
    pub(super) since: Instant,
    pub(super) job: JobHandle,
}

/// Why a device is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// The guest gave it back.
    Given,
    /// The guest never looked at it.
    Unseen,
    /// Somebody wanted it at once.
    Forced,
}

impl Manner {
    fn phase(self, id: &str) -> String {
        match self {
            Self::Given => format!("the guest gave back '{id}'"),
            Self::Unseen => format!("the guest had not looked at '{id}'"),
            Self::Forced => format!("'{id}' was taken by force"),
        }
    }
}

/// Devices of a slot that are taken together.
pub(super) struct Leaving {
    /// The one that was wanted is the last.
    ids: Vec<String>,
    pub(super) slot: u8,
    manner: Manner,
    job: Option<JobHandle>,
    thread: Option<JoinHandle<()>>,
    /// What came of it, for each.
    result: Receiver<Vec<Result<(), String>>>,
}

impl Leaving {
    pub(super) fn has(&self, id: &str) -> bool {
        self.ids.iter().any(|leaving| leaving == id)
    }
}

/// Finishes what is in flight and closes everything.
fn close(id: &str, taken: Option<Taken>, end: Option<End>) -> Result<(), String> {
    if let Some(taken) = taken {
        taken.remove();
    }
    let closed = end.map_or(Ok(()), End::close);
    closed.map_err(|error| format!("the device '{id}' is gone, but what was written to it may be lost: {error}"))
}

/// Does what there is to do, once.
fn run(work: &Mutex<Option<impl FnOnce()>>) {
    let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(work) = work {
        work();
    }
}

impl Controller {
    /// Takes device `id` from the guest, and what goes with it. What that needs to wait for a thread waits for.
    pub(super) fn take(&mut self, id: &str, manner: Manner) {
        let job = self.plugs.take_asked(id).map(|asked| asked.job);
        self.take_for(id, manner, job);
    }

    pub(super) fn take_for(&mut self, id: &str, manner: Manner, job: Option<JobHandle>) {
        let Some(devices) = self.machine.as_mut().map(|machine| machine.devices_mut()) else {
            return;
        };
        let ids = devices.going_with(id);
        let taken: Vec<_> = ids.iter().filter_map(|id| devices.take(id)).collect();
        let Some(slot) = taken.last().map(Taken::slot) else {
            return;
        };
        if let Some(job) = &job {
            job.note("the host lets go of it");
        }
        let mut parts = Vec::new();
        for (id, taken) in ids.iter().zip(taken) {
            let end = self.backends.as_mut().and_then(|backends| backends.remove(id));
            parts.push((id.clone(), taken, end, self.handed.remove(id)));
        }
        // Nobody counts any more what it does.
        self.show_meters();
        let (sender, result) = sync_channel(1);
        let (name, inbox, generation) = (id.to_owned(), self.inbox.clone(), self.generation);
        let work = Mutex::new(Some(move || {
            let closed = parts
                .into_iter()
                .map(|(id, taken, end, _handed)| close(&id, Some(taken), end));
            let done: Vec<_> = closed.collect();
            // Somebody who does not want it any more has ended.
            let _ = sender.send(done);
            inbox.post(Message::Guest(generation, GuestEvent::Unplugged(name)));
        }));
        let work = Arc::new(work);
        let theirs = work.clone();
        let body = move || run(&theirs);
        // It closes what this thread has opened, so it needs this thread's filter, and has it from its start.
        let thread = match self.sandbox.spawn(format!("{id}_remove"), Box::new(body)) {
            Ok(thread) => Some(thread),
            Err(error) => {
                tracing::warn!("cannot start a thread that takes {id} away, so everybody waits for that: {error}");
                run(&work);
                None
            }
        };
        self.plugs.leaving.push(Leaving {
            ids,
            slot,
            manner,
            job,
            thread,
            result,
        });
        self.watch_slots();
    }

    /// The host is done with device `id`.
    pub(crate) fn unplugged(&mut self, id: &str) {
        let Some(at) = self.plugs.leaving.iter().position(|leaving| leaving.has(id)) else {
            return;
        };
        let leaving = self.plugs.leaving.remove(at);
        self.end_leaving(leaving);
    }

    fn end_leaving(&mut self, leaving: Leaving) {
        let Leaving {
            ids,
            slot,
            manner,
            mut job,
            thread,
            result,
        } = leaving;
        let results = result.recv().unwrap_or_default();
        let _ = thread.map(JoinHandle::join);
        self.clear_slot(slot, manner);
        let mut results = results.into_iter();
        for (at, id) in (1..).zip(&ids) {
            // A thread that panicked has sent nothing.
            let lost = || Err(format!("the device '{id}' is gone, but not all of it could be closed"));
            let result = results.next().unwrap_or_else(lost);
            let outcome = match (&result, manner) {
                (Err(_), _) => Outcome::Failed,
                (Ok(()), Manner::Forced) => Outcome::Forced,
                (Ok(()), Manner::Given | Manner::Unseen) => Outcome::Done,
            };
            let job = if at == ids.len() { job.take() } else { None };
            self.forget_device(id, outcome, &manner.phase(id), job, result);
        }
    }

    /// Devices of `slot` are gone.
    fn clear_slot(&mut self, slot: u8, manner: Manner) {
        let forced = manner == Manner::Forced;
        if let Some(machine) = &self.machine
            && let Some(slots) = machine.slots()
        {
            let empty = machine.devices().removable_in(slot).is_empty() && !self.plugs.is_clearing(slot);
            match (empty, forced) {
                (true, _) => slots.gone(slot, forced),
                (false, true) => slots.shrank(slot),
                (false, false) => {}
            }
        }
        if forced {
            self.plugs.announced = Some(Instant::now());
            self.watch_slots();
        }
    }

    /// Device `id` is gone, in this way.
    fn forget_device(
        &mut self,
        id: &str,
        outcome: Outcome,
        phase: &str,
        job: Option<JobHandle>,
        result: Result<(), String>,
    ) {
        if let Some(config) = &mut self.config {
            configured::take(config, id);
        }
        self.plugs.wanted.remove(id);
        self.plugs.meters.count(Direction::Remove, outcome, 1);
        // Whoever sees that the job has ended sees what it changed.
        self.publish();
        self.inbox.events().post(&kind::PCI_REMOVED, &[("id", id.into())]);
        if let Err(error) = &result {
            tracing::warn!("{error}");
        }
        if let Some(job) = job {
            job.note(phase);
            job.finish(result.as_ref().copied().map_err(String::as_str));
        }
    }

    /// Waits until the host is done with what the guest has no more. Before the guest ends.
    pub(crate) fn finish_removals(&mut self) {
        for leaving in std::mem::take(&mut self.plugs.leaving) {
            self.end_leaving(leaving);
        }
        self.plugs.announced = None;
        self.plugs.wanted.clear();
    }

    /// The guest is gone and with it its devices: those it was asked for do not come back.
    pub(crate) fn end_removals(&mut self) {
        for Asked { with, job, .. } in std::mem::take(&mut self.plugs.asked) {
            let mut job = Some(job);
            for (at, id) in (1..).zip(&with) {
                let end = self.backends.as_mut().and_then(|backends| backends.remove(id));
                let result = close(id, None, end);
                self.handed.remove(id);
                let outcome = match &result {
                    Ok(()) => Outcome::Reset,
                    Err(_) => Outcome::Failed,
                };
                let phase = format!("the guest ended, and '{id}' was taken");
                let job = if at == with.len() { job.take() } else { None };
                self.forget_device(id, outcome, &phase, job, result);
            }
        }
        self.watch_slots();
    }
}
