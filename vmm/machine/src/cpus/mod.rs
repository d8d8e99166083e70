//! Processors that come and go while the guest runs.
//!
//! A resize is a target. The guest is told which processors it gets or should give back, and what it does about each is observed:
//! that it starts one, gives one back, or refuses. [`Sizing`] knows what is still open, [`Resizes`](crate::resize::Resizes) has the job
//! that tells of it: both until everything has been answered or the guest has stood still for too long.

mod sizing;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use triarch_api::events::kind;
use triarch_api::{ApiError, Handler, Operation, VcpuCounts};
use triarch_legacy::{CpuHotplug, CpuSlot};

use crate::changes::{ChangeMeters, Changing, Outcome};
use crate::control::Controller;
use crate::resize::{Goal, PATIENCE, Part};
pub(crate) use sizing::status_name;
use sizing::{News, Sizing, listed, news};

/// What the controller knows of the guest's processors.
#[derive(Default)]
pub(crate) struct Processors {
    /// How they stood when they were looked at last.
    known: Vec<CpuSlot>,
    /// What the guest was asked for and has not done yet.
    open: Option<Sizing>,
    /// How many a guest that was shut down was to have: as many as the next one starts with.
    kept: Option<u32>,
    pub(crate) meters: Arc<CpuMeters>,
}

/// How many processors there are and what came of resizes, for whoever asks.
pub(crate) type CpuMeters = ChangeMeters<VcpuCounts>;

impl Changing for VcpuCounts {
    const OUTCOMES: &'static [Outcome] = &[
        Outcome::Done,
        Outcome::Refused,
        Outcome::Timeout,
        Outcome::Replaced,
        Outcome::Reset,
    ];
}

/// Counts everything about `sizing`; `end` is what became of those of which nothing was heard.
fn count_all(meters: &CpuMeters, sizing: &Sizing, end: Outcome) {
    for (direction, side, done) in sizing.sides() {
        meters.count(direction, Outcome::Done, done);
        meters.count(direction, Outcome::Refused, side.refused.len());
        meters.count(direction, end, side.waiting.len());
    }
}

impl Processors {
    /// Begins with a guest that has just been built.
    pub(crate) fn begin(&mut self, cpus: Option<&Arc<CpuHotplug>>) {
        self.known = cpus.map(|cpus| cpus.slots()).unwrap_or_default();
    }

    /// How many a guest starts with that is configured to have `boot`.
    pub(crate) fn at_boot(&self, boot: u32) -> u32 {
        self.kept.unwrap_or(boot)
    }

    /// The next guest starts with what is configured.
    pub(crate) fn forget_size(&mut self) {
        self.kept = None;
    }
}

impl Controller {
    /// `vm.resize` of a running guest to `target` vCPUs.
    pub(crate) fn resize_vcpus(&mut self, target: u32) -> Result<(), ApiError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Ok(());
        };
        let Some(cpus) = machine.cpus().cloned() else {
            if target == config.cpus.boot_vcpus {
                return Ok(());
            }
            return Err(ApiError::Unsupported(
                "a guest that a device tree describes cannot get or give back vCPUs; leave --platform dtb out"
                    .to_owned(),
            ));
        };
        check_range(target, &cpus)?;
        self.look_at_processors();
        if let Some(open) = &self.processors.open {
            if open.target == target {
                return Ok(());
            }
            if !open.going.waiting.is_empty() {
                // Agents know these three words, and ask again later.
                let waiting = listed(&open.going.waiting);
                return Err(ApiError::Busy(format!(
                    "Too Many Requests: the guest has not given back {waiting} yet"
                )));
            }
        }
        let sizing = Sizing::plan(&self.processors.known, target);
        // What can fail comes first: then nothing has changed.
        if let Some(machine) = &mut self.machine {
            machine.ready_vcpus(&sizing.added)?;
        }
        if let Some(open) = self.processors.open.take() {
            count_all(&self.processors.meters, &open, Outcome::Replaced);
        }
        self.resizes.replace(Part::Vcpus, target.into());
        if !sizing.is_empty() {
            self.ask_for(sizing, &cpus);
        }
        Ok(())
    }

    fn ask_for(&mut self, mut sizing: Sizing, cpus: &CpuHotplug) {
        if let Some(machine) = &self.machine {
            // Those that run are shown with the others.
            self.outbox.show_meters(self.meters(machine));
            sizing.added.iter().for_each(|index| machine.plug_vcpu(*index));
        }
        sizing.ask(cpus);
        let goal = Goal {
            target: sizing.target.into(),
            now: 0,
            end: sizing.total() as u64,
        };
        let (jobs, kind) = (self.inbox.jobs(), Operation::Resize.name());
        self.resizes.begin(jobs, kind, Part::Vcpus, sizing.phase(), goal);
        self.processors.open = Some(sizing);
        self.look_at_processors();
    }

    /// The guest did something about a processor, or may have.
    pub(crate) fn look_at_processors(&mut self) {
        let Some(cpus) = self.machine.as_ref().and_then(|machine| machine.cpus().cloned()) else {
            return;
        };
        let slots = cpus.slots();
        let all = news(&self.processors.known, &slots);
        self.processors.known = slots;
        for one in &all {
            self.report(one);
        }
        self.watch_idle();
        let Some(open) = &mut self.processors.open else {
            return;
        };
        all.iter().for_each(|one| open.hear(one));
        self.resizes.stands(Part::Vcpus, open.done() as u64);
        if open.is_over() {
            self.end_sizing();
        }
    }

    /// vCPUs that the guest has and did not start.
    fn idle(&self) -> impl Iterator<Item = u32> {
        let idle = |(index, slot): (u32, &CpuSlot)| (slot.present && !slot.started).then_some(index);
        (0u32..).zip(&self.processors.known).filter_map(idle)
    }

    /// Not every KVM tells when a vCPU is started; one that leaves it looks by itself, so it is made to now and then.
    fn watch_idle(&mut self) {
        let machine = self.machine.as_ref();
        let watched = machine.is_some_and(|machine| self.idle().any(|index| machine.vcpu_waits(index)));
        self.resizes.watch(watched);
    }

    /// The guest has started vCPU `index`.
    pub(crate) fn vcpu_started(&mut self, index: usize) {
        if let Some(cpus) = self.machine.as_ref().and_then(|machine| machine.cpus()) {
            cpus.started(index as u32);
        }
        self.look_at_processors();
    }

    fn report(&self, news: &News) {
        let events = self.inbox.events();
        let index = |index: u32| ("index", u64::from(index).into());
        match news {
            News::Started(started) => events.post_guest("vcpu", &kind::VCPU_STARTED, &[index(*started)]),
            News::Gone(gone) => {
                if let Some(machine) = &self.machine {
                    machine.unplug_vcpu(*gone);
                }
                let open = self.processors.open.as_ref();
                let kind = match open.is_some_and(|open| open.withdrawn.contains(gone)) {
                    true => &kind::VCPU_WITHDRAWN,
                    false => &kind::VCPU_EJECTED,
                };
                events.post_guest("vcpu", kind, &[index(*gone)]);
            }
            News::Refused(refused, status) => {
                let reason = sizing::status_name(*status);
                let properties = [index(*refused), ("reason", reason.as_str().into())];
                events.post_guest("vcpu", &kind::VCPU_REFUSED, &properties);
            }
        }
    }

    /// Time has passed while the guest runs and may have been asked for something.
    pub(crate) fn remind_of_processors(&mut self) {
        let Some(machine) = &self.machine else {
            return;
        };
        if let (Some(_), Some(cpus)) = (&self.processors.open, machine.cpus()) {
            cpus.remind();
        }
        self.idle().for_each(|index| machine.nudge_vcpu(index));
        self.look_at_processors();
    }

    /// All has been answered.
    fn end_sizing(&mut self) {
        let Some(sizing) = self.processors.open.take() else {
            return;
        };
        count_all(&self.processors.meters, &sizing, Outcome::Done);
        let (phase, failure) = (sizing.outcome(), sizing.failure());
        self.end_resize(Part::Vcpus, Some(&phase), failure.as_deref().map_or(Ok(()), Err));
    }

    /// The guest has not answered everything, and the time is over.
    pub(crate) fn give_up_on_processors(&mut self) {
        let (Some(sizing), Some(cpus)) = (
            self.processors.open.take(),
            self.machine.as_ref().and_then(|machine| machine.cpus()),
        ) else {
            return;
        };
        sizing.going.waiting.iter().for_each(|index| cpus.leave(*index));
        count_all(&self.processors.meters, &sizing, Outcome::Timeout);
        let text = sizing.late(&self.processors.known, PATIENCE);
        let phase = sizing.outcome();
        self.end_resize(Part::Vcpus, Some(&phase), Err(&text));
    }

    /// The guest is gone: what it was asked for ends. One that is built anew has as many as were asked for.
    pub(crate) fn end_processors(&mut self, rebuilt: bool) {
        self.watch_idle();
        let Some(sizing) = self.processors.open.take() else {
            return;
        };
        count_all(&self.processors.meters, &sizing, Outcome::Reset);
        if rebuilt {
            let phase = format!("the guest was reset and has {}", counted(sizing.target));
            self.end_resize(Part::Vcpus, Some(&phase), Ok(()));
        } else {
            self.resizes.abandon(Part::Vcpus);
        }
    }

    /// The guest is about to be shut down; the next one starts with as many processors.
    pub(crate) fn keep_processors(&mut self) {
        self.processors.kept = self.vcpu_target().or(self.processors.kept);
    }

    /// How many processors a guest that is reset starts with.
    pub(crate) fn vcpu_target(&self) -> Option<u32> {
        Some(self.vcpu_counts()?.target)
    }

    /// How many processors the guest has; `None` without a guest.
    pub(crate) fn vcpu_counts(&self) -> Option<VcpuCounts> {
        let machine = self.machine.as_ref()?;
        if machine.cpus().is_none() {
            let all = machine.boot_vcpus();
            return Some(VcpuCounts {
                target: all,
                present: all,
                started: all,
            });
        }
        let count = |of: fn(&CpuSlot) -> bool| self.processors.known.iter().filter(|slot| of(slot)).count() as u32;
        let present = count(|slot| slot.present);
        Some(VcpuCounts {
            target: self.processors.open.as_ref().map_or(present, |open| open.target),
            present,
            started: count(|slot| slot.started),
        })
    }

    /// Shows how many processors there are now.
    pub(crate) fn publish_processors(&self) -> Option<VcpuCounts> {
        let counts = self.vcpu_counts();
        self.processors.meters.show(counts);
        counts
    }
}

fn check_range(target: u32, cpus: &CpuHotplug) -> Result<(), ApiError> {
    let (least, most) = (cpus.fixed(), cpus.max());
    if (least..=most).contains(&target) {
        return Ok(());
    }
    let least = match least {
        1 => "1".to_owned(),
        _ => format!("{least}, which it booted with and cannot give back,"),
    };
    Err(ApiError::BadRequest(format!(
        "desired_vcpus is {target}; for this guest it must be between {least} and {most} (max_vcpus)"
    )))
}

/// `1 vCPU`, `3 vCPUs`.
fn counted(vcpus: u32) -> String {
    format!("{vcpus} vCPU{}", if vcpus == 1 { "" } else { "s" })
}
