//! Memory that comes from the host where the guest was (post-copy): what is missing of it, and who waits.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use triarch_api::events::EventLog;
use triarch_device_core::Sandbox;
use triarch_memory::{GuestMemory, Userfault};
use triarch_migration::{Lacking, PageSet};
use triarch_state::{CHUNK, PAGE};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Lost, Pager, Supply, What, Work};
use crate::MachineError;
use crate::build::Report;

/// What the thread is told.
pub(super) enum Order {
    /// Bytes for this GPA.
    Bytes(u64, Vec<u8>, SyncSender<io::Result<()>>),
    /// So many zeroes for it.
    Zeroes(u64, u64, SyncSender<io::Result<()>>),
    /// To say what is missing.
    Missing(SyncSender<Vec<Range<u64>>>),
}

#[derive(Default)]
struct State {
    /// Bytes that are missing.
    lacks: u64,
    /// Pages that somebody waits for, by their GPAs; whether whoever fetches them was told.
    waiting: BTreeMap<u64, bool>,
    abandoned: bool,
    /// The thread has ended.
    closed: bool,
}

/// What the thread and those who fetch memory share.
#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lacks(&self) -> bool {
        self.state().lacks > 0
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.state().abandoned
    }

    /// Somebody waits for the page at `gpa`.
    pub(super) fn want(&self, gpa: u64) {
        self.state().waiting.entry(gpa).or_insert(false);
        self.changed.notify_all();
    }

    /// `bytes` of the `len` at `gpa` were missing, and are not any more.
    pub(super) fn came(&self, gpa: u64, len: u64, bytes: u64) {
        let mut state = self.state();
        state.lacks = state.lacks.saturating_sub(bytes);
        let there: Vec<_> = state.waiting.range(gpa..gpa + len).map(|(gpa, _)| *gpa).collect();
        for gpa in there {
            state.waiting.remove(&gpa);
        }
        if state.lacks == 0 {
            self.changed.notify_all();
        }
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }
}

/// The other end: of whoever fetches the memory.
pub(crate) struct Coming {
    orders: Sender<super::Order>,
    wake: EventFd,
    shared: Arc<Shared>,
}

impl Coming {
    /// Makes sure that `memory` can be had page by page.
    ///
    /// # Errors
    /// The host does not let us, or not with this memory.
    pub(crate) fn check(memory: &GuestMemory) -> Result<(), MachineError> {
        if Userfault::page_size() != PAGE {
            return Err(MachineError::Moved(format!(
                "post-copy needs pages of {PAGE} bytes, and this host's have {}",
                Userfault::page_size()
            )));
        }
        let mut userfault = Userfault::new()?;
        for region in memory.iter() {
            userfault.register(region)?;
        }
        Ok(())
    }

    fn order<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> io::Result<T> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let (reply, answer) = sync_channel(1);
        let sent = self.orders.send(super::Order::Coming(order(reply)));
        sent.map_err(|_| gone())?;
        self.wake.write(1)?;
        answer.recv().map_err(|_| gone())
    }
}

impl Lacking for Coming {
    fn missing(&self) -> io::Result<Vec<Range<u64>>> {
        self.shared.state().waiting.values_mut().for_each(|told| *told = false);
        self.order(Order::Missing)
    }

    fn remaining(&self) -> Option<u64> {
        let state = self.shared.state();
        let gone = state.closed || state.abandoned;
        (state.lacks == 0 || !gone).then_some(state.lacks)
    }

    fn wanted(&self, most: usize, wait: Duration) -> Vec<u64> {
        let none = |state: &mut State| {
            state.lacks > 0 && !state.closed && !state.abandoned && state.waiting.values().all(|told| *told)
        };
        let waited = self.shared.changed.wait_timeout_while(self.shared.state(), wait, none);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let new = state.waiting.iter_mut().filter(|(_, told)| !**told).take(most);
        new.map(|(gpa, told)| {
            *told = true;
            *gpa
        })
        .collect()
    }

    fn provide(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let bytes = bytes.to_vec();
        self.order(|reply| Order::Bytes(gpa, bytes, reply))?
    }

    fn provide_zeroes(&self, gpa: u64, len: u64) -> io::Result<()> {
        // Those who wait for other pages are served in between.
        (gpa..gpa + len).step_by(CHUNK).try_for_each(|at| {
            let len = (CHUNK as u64).min(gpa + len - at);
            self.order(|reply| Order::Zeroes(at, len, reply))?
        })
    }

    fn abandon(&self) {
        self.shared.state().abandoned = true;
        self.shared.changed.notify_all();
        let _ = self.wake.write(1);
    }
}

impl Pager {
    /// Begins for all of `memory`, of which `missing` comes later, runs of GPAs that are in one region each. Nothing may be there of that.
    pub(crate) fn coming(
        memory: &GuestMemory,
        missing: &[Range<u64>],
        sandbox: &Arc<dyn Sandbox>,
        events: &Arc<EventLog>,
        report: &Report,
    ) -> Result<(Self, Arc<Coming>), MachineError> {
        let shared = Arc::<Shared>::default();
        shared.state().lacks = missing.iter().map(|run| run.end - run.start).sum();
        let supply = Supply::Coming(shared.clone());
        let pager = Self::begin(Userfault::new()?, supply, sandbox, events, report)?;
        for region in memory.iter() {
            let (gpa, size) = (region.start_addr().raw_value(), region.len());
            let mut lacks = PageSet::none(size / PAGE);
            let from = missing.partition_point(|run| run.end <= gpa);
            for run in missing[from..].iter().take_while(|run| run.start < gpa + size) {
                lacks.insert(run.start.saturating_sub(gpa) / PAGE..(run.end - gpa) / PAGE);
            }
            pager.place(memory, What::Region(gpa, size), lacks)?;
        }
        pager.seal();
        let wake = pager.wake.try_clone();
        let coming = Coming {
            orders: pager.orders.clone(),
            wake: wake.map_err(MachineError::host("copy an event descriptor"))?,
            shared,
        };
        Ok((pager, Arc::new(coming)))
    }
}

impl Work {
    pub(super) fn obey_coming(&mut self, order: Order) {
        let failed = |lost: Lost| match lost {
            Lost::Host(error) => error,
            other => io::Error::other(other),
        };
        match order {
            Order::Bytes(gpa, bytes, reply) => {
                let put = self.put(gpa, bytes.len() as u64, |work, place, offset| {
                    work.copy(place, offset, &bytes)
                });
                let _ = reply.send(put.map_err(failed));
            }
            Order::Zeroes(gpa, len, reply) => {
                let put = self.put(gpa, len, |work, place, offset| work.zeroes(place, offset, len));
                let _ = reply.send(put.map_err(failed));
            }
            Order::Missing(reply) => {
                let _ = reply.send(self.missing());
            }
        }
    }

    fn missing(&self) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        for place in &self.places {
            let (gpa, mut at) = (place.range.gpa(), 0);
            while let Some(run) = place.lacks.first(at..u64::MAX) {
                at = run.end;
                runs.push(gpa + run.start * self.page..gpa + run.end * self.page);
            }
        }
        runs.sort_unstable_by_key(|run| run.start);
        runs
    }

    /// Puts something at `gpa`, and wakes whoever waits for it.
    fn put(
        &mut self,
        gpa: u64,
        len: u64,
        how: impl FnOnce(&mut Self, usize, u64) -> Result<(), Lost>,
    ) -> Result<(), Lost> {
        let inside = |place: &super::Place| {
            let offset = gpa.checked_sub(place.range.gpa())?;
            (offset + len <= place.range.size()).then_some(offset)
        };
        let mut found = self.places.iter().enumerate();
        let found = found.find_map(|(at, place)| Some((at, inside(place)?)));
        let (place, offset) = found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let before = self.places[place].lacks.count();
        let done = how(self, place, offset);
        let known = &self.places[place];
        self.userfault.wake(known.start + offset, len)?;
        if known.lacks.count() < before {
            let chunks = offset / CHUNK as u64..(offset + len).div_ceil(CHUNK as u64);
            self.release_whole(place, chunks)?;
        }
        done
    }

    fn zeroes(&mut self, place: usize, offset: u64, len: u64) -> Result<(), Lost> {
        let (mut at, end) = (offset / self.page, (offset + len) / self.page);
        while let Some(run) = self.places[place].lacks.first(at..end) {
            at = run.start + 1;
            self.zero(self.places[place].start + run.start * self.page)?;
            self.there(place, run.start * self.page, self.page);
        }
        Ok(())
    }

    /// Those of `chunks` of which nothing is missing are the kernel's from now on.
    pub(super) fn release_whole(&mut self, place: usize, chunks: Range<u64>) -> Result<(), Lost> {
        let known = &self.places[place];
        let each = CHUNK as u64 / self.page;
        let whole = |chunk: &u64| known.lacks.first(chunk * each..(chunk + 1) * each).is_none();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for chunk in chunks.filter(whole) {
            match runs.last_mut() {
                Some(last) if last.end == chunk => last.end = chunk + 1,
                _ => runs.push(chunk..chunk + 1),
            }
        }
        runs.into_iter().try_for_each(|run| self.release(place, run))
    }
}
