//! Memory devices of ACPI that come and go while the guest runs.
//!
//! A resize is a target. What it adds is there for KVM, devices and daemons before the guest hears of it; then the guest is told, and what it
//! says is observed: that it takes memory, gives some back, or refuses. What it refuses to take is taken away again.

use std::ops::Range;
use std::sync::Arc;

use triarch_api::events::kind;
use triarch_api::{ApiError, Handler, MemoryCounts, Operation, VmConfig};
use triarch_arch::layout;
use triarch_legacy::{MemoryHotplug, MemoryPlace, MemorySlot, Removal};

use super::sizing::{BLOCK, Dimm, News, Sizing, bytes, mib, news, present};
use crate::Machine;
use crate::changes::{ChangeMeters, Changing, Direction, Outcome};
use crate::control::Controller;
use crate::cpus::status_name;
use crate::resize::{Goal, PATIENCE, Part};

/// What the controller knows of the guest's memory devices.
#[derive(Default)]
pub(crate) struct Dimms {
    /// How the slots stood when they were looked at last.
    known: Vec<MemorySlot>,
    /// What the guest was asked for and has not done yet.
    open: Option<Sizing>,
    pub(crate) meters: Arc<MemoryMeters>,
}

/// How much memory there is and what came of resizes, for whoever asks.
pub(crate) type MemoryMeters = ChangeMeters<MemoryCounts>;

impl Changing for MemoryCounts {
    const OUTCOMES: &'static [Outcome] = &[
        Outcome::Done,
        Outcome::Refused,
        Outcome::Timeout,
        Outcome::Replaced,
        Outcome::Reset,
    ];
}

/// Counts everything about `sizing`; `end` is what became of those of which nothing was heard.
pub(super) fn count_all(meters: &MemoryMeters, sizing: &Sizing, end: Outcome) {
    meters.count(sizing.direction, Outcome::Done, sizing.done.len());
    meters.count(sizing.direction, Outcome::Refused, sizing.refused.len());
    meters.count(sizing.direction, end, sizing.waiting.len());
}

impl Dimms {
    /// Begins with a guest that has just been built.
    pub(crate) fn begin(&mut self, memory: Option<&Arc<MemoryHotplug>>) {
        self.known = memory.map(|memory| memory.slots()).unwrap_or_default();
    }
}

/// A change of which the guest has not heard, and for which everything is there.
pub(crate) struct MemoryChange(Sizing);

impl Controller {
    /// `vm.resize` of a running guest to `target` bytes, as far as it can fail. [`commit_memory`](Self::commit_memory) or
    /// [`undo_memory`](Self::undo_memory) follows. `None`: there is nothing to do.
    pub(crate) fn prepare_memory(&mut self, target: u64) -> Result<Option<MemoryChange>, ApiError> {
        let Some((boot, room)) = self.memory_room(target)? else {
            return Ok(None);
        };
        self.look_at_dimms();
        if let Some(open) = &self.dimms.open {
            if open.target == target {
                return Ok(None);
            }
            if open.direction == Direction::Remove {
                // Agents know these three words, and ask again later.
                let waiting = mib(bytes(&open.waiting));
                return Err(ApiError::Busy(format!(
                    "Too Many Requests: the guest has not given back {waiting} yet"
                )));
            }
        }
        self.withdraw_unseen(boot, target);
        let Some(machine) = &self.machine else {
            return Ok(None);
        };
        let gaps = machine.memory_gaps(&room);
        let sizing = Sizing::plan(&self.dimms.known, boot, target, &gaps)
            .map_err(|error| ApiError::BadRequest(format!("desired_ram is {target}: {error}")))?;
        provide(machine, &sizing.added)?;
        Ok(Some(MemoryChange(sizing)))
    }

    /// How much memory the guest started with and where more may come, if it can get to `target` that way.
    fn memory_room(&self, target: u64) -> Result<Option<(u64, Range<u64>)>, ApiError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Ok(None);
        };
        let (boot, size) = (config.memory.size, config.memory.hotplug_room());
        if machine.memory_slots().is_none() {
            return match (target == boot, size) {
                (true, _) => Ok(None),
                (false, 0) => Err(ApiError::BadRequest(format!(
                    "desired_ram is {target}; the memory of a running guest changes only within memory.hotplug_size, and this VM has \
                     none; shut it down first, or give it some"
                ))),
                (false, _) => Err(ApiError::Unsupported(
                    "a guest that a device tree describes cannot get memory; leave --platform dtb out".to_owned(),
                )),
            };
        }
        check_target(target, boot, size)?;
        Ok(layout::hotplug(boot, size).map(|room| (boot, room)))
    }

    /// Takes away what the guest never saw if it should have less than it has with that: nobody waits for it any more.
    fn withdraw_unseen(&mut self, boot: u64, target: u64) {
        let Some(memory) = self.memory_devices() else {
            return;
        };
        let known = &self.dimms.known;
        let now = boot + present(known).map(|(dimm, _)| dimm.place.size).sum::<u64>();
        let unseen: Vec<_> = present(known)
            .filter(|(_, slot)| !slot.seen)
            .map(|(dimm, _)| dimm)
            .collect();
        if target >= now || unseen.is_empty() {
            return;
        }
        // The guest may just have looked: then it is asked.
        unseen.iter().for_each(|dimm| match memory.ask_back(dimm.slot) {
            Removal::Asked | Removal::Withdrawn => {}
        });
        if let Some(open) = self.dimms.open.take() {
            count_all(&self.dimms.meters, &open, Outcome::Replaced);
        }
        self.resizes.replace(Part::Dimms, target);
        self.look_at_dimms();
    }

    /// The other half of [`prepare_memory`](Self::prepare_memory): the guest hears of it.
    pub(crate) fn commit_memory(&mut self, MemoryChange(sizing): MemoryChange) {
        let before = self.dimms.open.take();
        if let Some(open) = &before {
            count_all(&self.dimms.meters, open, Outcome::Replaced);
        }
        self.resizes.replace(Part::Dimms, sizing.target);
        let memory = self.memory_devices();
        let Some(memory) = memory.filter(|_| !sizing.waiting.is_empty()) else {
            return;
        };
        sizing.ask(&memory, before.as_ref().map_or(&[], |open| &open.waiting));
        let goal = Goal {
            target: sizing.target,
            now: 0,
            end: sizing.total(),
        };
        let (jobs, kind) = (self.inbox.jobs(), Operation::Resize.name());
        self.resizes
            .begin(jobs, kind, Part::Dimms, sizing.direction.phase(), goal);
        self.dimms.open = Some(sizing);
        self.look_at_dimms();
    }

    /// Forgets a change of which the guest never hears.
    pub(crate) fn undo_memory(&mut self, MemoryChange(sizing): &MemoryChange) {
        if let Some(machine) = &self.machine {
            sizing
                .added
                .iter()
                .for_each(|dimm| machine.remove_memory(dimm.place.start));
        }
    }

    /// The guest did something about memory, or may have.
    pub(crate) fn look_at_dimms(&mut self) {
        let Some(memory) = self.memory_devices() else {
            return;
        };
        loop {
            let slots = memory.slots();
            let all = news(&self.dimms.known, &slots);
            let mut again = false;
            for one in &all {
                again |= self.report_memory(&memory, one);
                if let Some(open) = &mut self.dimms.open {
                    open.hear(one);
                }
            }
            self.dimms.known = slots;
            if !again {
                break;
            }
        }
        if let Some(open) = &self.dimms.open {
            self.resizes.stands(Part::Dimms, bytes(&open.done));
            if open.waiting.is_empty() {
                self.end_memory_sizing();
            }
        }
    }

    /// Does what follows from `news`. Returns whether there is more to see.
    fn report_memory(&self, memory: &MemoryHotplug, news: &News) -> bool {
        let events = self.inbox.events();
        let place = |dimm: &Dimm| [("address", dimm.place.start.into()), ("size", dimm.place.size.into())];
        match news {
            News::Taken(dimm) => events.post_guest("memory", &kind::MEMORY_ADDED, &place(dimm)),
            News::Gone(dimm) => {
                if let Some(machine) = &self.machine {
                    machine.remove_memory(dimm.place.start);
                }
                let before = self.dimms.known.get(dimm.slot);
                // Of what it never took nobody was told that it had come.
                if before.is_some_and(|slot| slot.taken && slot.place == Some(dimm.place)) {
                    events.post_guest("memory", &kind::MEMORY_REMOVED, &place(dimm));
                }
            }
            News::Refused(dimm, status) => {
                let reason = status_name(*status);
                let [address, size] = place(dimm);
                let properties = [address, size, ("reason", reason.as_str().into())];
                events.post_guest("memory", &kind::MEMORY_REFUSED, &properties);
                let arriving = self.dimms.known.get(dimm.slot).is_none_or(|slot| !slot.taken);
                if arriving {
                    memory.withdraw(dimm.slot);
                }
                return arriving;
            }
        }
        false
    }

    /// Time has passed while the guest runs and may have been asked for something.
    pub(crate) fn remind_of_dimms(&mut self) {
        if self.dimms.open.is_some()
            && let Some(memory) = self.machine.as_ref().and_then(Machine::memory_slots)
        {
            memory.remind();
        }
        self.look_at_dimms();
    }

    /// All has been answered.
    fn end_memory_sizing(&mut self) {
        let Some(sizing) = self.dimms.open.take() else {
            return;
        };
        count_all(&self.dimms.meters, &sizing, Outcome::Done);
        let phase = sizing.direction.outcome(&sizing.done);
        if sizing.refused.is_empty() {
            self.end_resize(Part::Dimms, Some(&phase), Ok(()));
        } else {
            self.end_resize(Part::Dimms, Some(&phase), Err(&sizing.failure()));
        }
    }

    /// The guest has not answered everything, and the time is over.
    pub(crate) fn give_up_on_dimms(&mut self) {
        let memory = self.machine.as_ref().and_then(Machine::memory_slots);
        let (Some(sizing), Some(memory)) = (self.dimms.open.take(), memory) else {
            return;
        };
        if sizing.direction == Direction::Remove {
            sizing.waiting.iter().for_each(|dimm| memory.leave(dimm.slot));
        }
        count_all(&self.dimms.meters, &sizing, Outcome::Timeout);
        let text = sizing.late(&self.dimms.known, PATIENCE);
        let phase = sizing.direction.outcome(&sizing.done);
        self.end_resize(Part::Dimms, Some(&phase), Err(&text));
    }

    /// The guest is gone: what it was asked for ends. One that is built anew has as much as was asked for.
    pub(crate) fn end_dimms(&mut self, rebuilt: bool) {
        let Some(sizing) = self.dimms.open.take() else {
            return;
        };
        count_all(&self.dimms.meters, &sizing, Outcome::Reset);
        if rebuilt {
            let phase = format!("the guest was reset and has {}", mib(sizing.target));
            self.end_resize(Part::Dimms, Some(&phase), Ok(()));
        } else {
            self.resizes.abandon(Part::Dimms);
        }
    }

    /// The memory devices that a guest that is reset starts with.
    pub(crate) fn memory_places(&self) -> Vec<MemoryPlace> {
        let unwanted = match &self.dimms.open {
            Some(open) if open.direction == Direction::Remove => open.waiting.as_slice(),
            _ => &[],
        };
        let kept = present(&self.dimms.known).filter(|(dimm, _)| !unwanted.contains(dimm));
        kept.map(|(dimm, _)| dimm.place).collect()
    }

    /// Shows how much memory the guest has now, also in the `shown` configuration; `None` if it cannot change.
    pub(crate) fn publish_memory(&self, shown: &mut VmConfig) -> Option<MemoryCounts> {
        let counts = self.memory_counts();
        self.dimms.meters.show(counts);
        if let Some(counts) = counts {
            shown.memory.size = counts.taken;
        }
        counts
    }

    /// The slots of the guest's memory devices, if it has any.
    fn memory_devices(&self) -> Option<Arc<MemoryHotplug>> {
        self.machine.as_ref()?.memory_slots().cloned()
    }

    /// Bytes the guest should have; `None` if that cannot change.
    pub(crate) fn memory_target(&self) -> Option<u64> {
        Some(self.memory_counts()?.target)
    }

    fn memory_counts(&self) -> Option<MemoryCounts> {
        self.machine.as_ref()?.memory_slots()?;
        let boot = self.config.as_ref()?.memory.size;
        let all = |wanted: fn(&MemorySlot) -> bool| {
            let dimms = present(&self.dimms.known).filter(|(_, slot)| wanted(slot));
            boot + dimms.map(|(dimm, _)| dimm.place.size).sum::<u64>()
        };
        let given = all(|_| true);
        Some(MemoryCounts {
            target: self.dimms.open.as_ref().map_or(given, |open| open.target),
            present: given,
            taken: all(|slot| slot.taken),
        })
    }
}

/// Makes all of `added`, or nothing.
fn provide(machine: &Machine, added: &[Dimm]) -> Result<(), ApiError> {
    for (index, dimm) in added.iter().enumerate() {
        if let Err(error) = machine.add_memory(dimm.place) {
            added
                .iter()
                .take(index)
                .for_each(|made| machine.remove_memory(made.place.start));
            return Err(error.into());
        }
    }
    Ok(())
}

pub(super) fn check_target(target: u64, boot: u64, room: u64) -> Result<(), ApiError> {
    let most = boot.saturating_add(room / BLOCK * BLOCK);
    if !(boot..=most).contains(&target) {
        return Err(ApiError::BadRequest(format!(
            "desired_ram is {target}; for this guest it must be between {boot}, which it started with, and {most} (hotplug_size)"
        )));
    }
    if !(target - boot).is_multiple_of(BLOCK) {
        return Err(ApiError::BadRequest(format!(
            "desired_ram is {target}; it must be {boot}, which the guest started with, and a multiple of {BLOCK} (128 MiB) more"
        )));
    }
    Ok(())
}
