//! Processors that come and go while the guest runs.
//!
//! A resize is a target. The guest is told which processors it gets or should give back, and what it does about each is observed:
//! that it starts one, gives one back, or refuses. [`Sizing`] knows what is still open; the controller keeps it, with the job that
//! tells of it, until everything has been answered or the time is over.

mod sizing;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use triarch_api::events::kind;
use triarch_api::jobs::JobHandle;
use triarch_api::metrics::CpuHotplugMetrics;
use triarch_api::{ApiError, Handler, Operation, Phase, VcpuCounts};
use triarch_legacy::{CpuHotplug, CpuSlot};
use vmm_sys_util::timerfd::TimerFd;

use crate::control::{Controller, watch};
use crate::{Inbox, MachineError, Message};
use sizing::{Direction, News, Sizing, listed, news};

/// How often an open resize is looked after.
const TICK: Duration = Duration::from_millis(250);
/// Ticks that a guest has for its answer, those of a pause not counted.
const PATIENCE: u32 = 120;

/// A resize that is under way.
struct Open {
    sizing: Sizing,
    job: JobHandle,
    timer: SubscriberId,
    ticks: u32,
}

/// What the controller knows of the guest's processors.
#[derive(Default)]
pub(crate) struct Processors {
    /// How they stood when they were looked at last.
    known: Vec<CpuSlot>,
    open: Option<Open>,
    pub(crate) meters: Arc<CpuMeters>,
}

/// How many processors there are and what came of resizes, for whoever asks.
#[derive(Default)]
pub(crate) struct CpuMeters {
    counts: Mutex<Option<VcpuCounts>>,
    changes: [[AtomicU64; RESULTS.len()]; DIRECTIONS.len()],
}

const DIRECTIONS: [(Direction, &str); 2] = [(Direction::Add, "add"), (Direction::Remove, "remove")];

/// What came of one processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused,
    Timeout,
    Replaced,
    Reset,
}

const RESULTS: [&str; 5] = ["done", "refused", "timeout", "replaced", "reset"];

impl CpuMeters {
    fn count(&self, direction: Direction, outcome: Outcome, processors: usize) {
        self.changes[direction as usize][outcome as usize].fetch_add(processors as u64, Ordering::Relaxed);
    }

    fn show(&self, counts: Option<VcpuCounts>) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// Everything, while there is a guest.
    pub(crate) fn read(&self) -> Option<CpuHotplugMetrics> {
        let counts = (*self.counts.lock().unwrap_or_else(PoisonError::into_inner))?;
        let mut changes = Vec::new();
        for (direction, name) in DIRECTIONS {
            let counted = RESULTS.iter().zip(&self.changes[direction as usize]);
            changes.extend(counted.map(|(result, count)| (name, *result, count.load(Ordering::Relaxed))));
        }
        Some(CpuHotplugMetrics { counts, changes })
    }
}

impl Processors {
    /// Whether the guest was asked for something and has not done it yet.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Begins with a guest that has just been built.
    pub(crate) fn begin(&mut self, cpus: Option<&Arc<CpuHotplug>>) {
        self.known = cpus.map(|cpus| cpus.slots()).unwrap_or_default();
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
            if open.sizing.target == target {
                return Ok(());
            }
            if open.sizing.direction == Direction::Remove {
                // Agents know these three words, and ask again later.
                let waiting = listed(&open.sizing.waiting);
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
        if let Some(open) = self.take_open() {
            let meters = &self.processors.meters;
            meters.count(open.sizing.direction, Outcome::Replaced, open.sizing.waiting.len());
            open.job
                .finish(Err(&format!("it was replaced by one to {target} vCPUs")));
        }
        if sizing.waiting.is_empty() {
            return Ok(());
        }
        Ok(self.begin_resize(sizing, &cpus)?)
    }

    fn begin_resize(&mut self, mut sizing: Sizing, cpus: &CpuHotplug) -> Result<(), MachineError> {
        let ticker = Ticker::new(self.inbox()).map_err(MachineError::host("make a timer"))?;
        if let Some(machine) = &self.machine {
            // Those that run are shown with the others.
            self.outbox.show_meters(self.meters(machine));
            sizing.added.iter().for_each(|index| machine.plug_vcpu(*index));
        }
        sizing.ask(cpus);
        let job = self.inbox.jobs().begin(Operation::Resize.name());
        job.note(sizing.direction.phase());
        job.progress(0, sizing.total() as u64, "vCPUs");
        let timer = self.events.add_subscriber(Arc::new(Mutex::new(ticker)));
        self.processors.open = Some(Open {
            sizing,
            job,
            timer,
            ticks: 0,
        });
        self.look_at_processors();
        Ok(())
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
        let Some(open) = &mut self.processors.open else {
            return;
        };
        all.iter().for_each(|one| open.sizing.hear(one));
        let done = open.sizing.done.len();
        open.job.progress(done as u64, open.sizing.total() as u64, "vCPUs");
        if open.sizing.waiting.is_empty() {
            self.end_resize();
        }
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
                events.post_guest("vcpu", &kind::VCPU_EJECTED, &[index(*gone)]);
            }
            News::Refused(refused, status) => {
                let reason = sizing::status_name(*status);
                let properties = [index(*refused), ("reason", reason.as_str().into())];
                events.post_guest("vcpu", &kind::VCPU_REFUSED, &properties);
            }
        }
    }

    /// Time has passed while a resize is open.
    pub(crate) fn tick(&mut self) {
        let Some(machine) = self.machine.as_ref().filter(|_| self.phase == Phase::Running) else {
            return;
        };
        if let (Some(open), Some(cpus)) = (&mut self.processors.open, machine.cpus()) {
            open.ticks += 1;
            cpus.remind();
            if open.sizing.direction == Direction::Add {
                // Not every KVM tells when a vCPU is started; one that leaves it looks by itself.
                open.sizing.waiting.iter().for_each(|index| machine.nudge_vcpu(*index));
            }
        }
        self.look_at_processors();
        if self.processors.open.as_ref().is_some_and(|open| open.ticks >= PATIENCE) {
            self.give_up();
        }
    }

    /// All has been answered.
    fn end_resize(&mut self) {
        let Some(open) = self.take_open() else {
            return;
        };
        let Sizing {
            direction,
            done,
            refused,
            ..
        } = &open.sizing;
        let meters = &self.processors.meters;
        meters.count(*direction, Outcome::Done, done.len());
        meters.count(*direction, Outcome::Refused, refused.len());
        open.job.note(&direction.outcome(done));
        if refused.is_empty() {
            open.job.finish(Ok(()));
            self.inbox.events().post(&kind::VM_RESIZED, &[]);
        } else {
            open.job.finish(Err(&open.sizing.refusal()));
        }
    }

    /// The time is over.
    fn give_up(&mut self) {
        let (Some(open), Some(cpus)) = (
            self.take_open(),
            self.machine.as_ref().and_then(|machine| machine.cpus().cloned()),
        ) else {
            return;
        };
        let sizing = &open.sizing;
        if sizing.direction == Direction::Remove {
            sizing.waiting.iter().for_each(|index| cpus.leave(*index));
        }
        let meters = &self.processors.meters;
        meters.count(sizing.direction, Outcome::Done, sizing.done.len());
        meters.count(sizing.direction, Outcome::Refused, sizing.refused.len());
        meters.count(sizing.direction, Outcome::Timeout, sizing.waiting.len());
        open.job.note(&sizing.direction.outcome(&sizing.done));
        let text = sizing.late(&self.processors.known, TICK * PATIENCE);
        open.job.finish(Err(&text));
    }

    /// The guest is gone: an open resize ends. One that is built anew has what was asked for.
    pub(crate) fn end_resize_with_guest(&mut self, rebuilt: bool) {
        let Some(open) = self.take_open() else {
            return;
        };
        let Sizing {
            direction,
            target,
            waiting,
            ..
        } = &open.sizing;
        self.processors.meters.count(*direction, Outcome::Reset, waiting.len());
        if rebuilt {
            open.job.note(&format!("the guest was reset and has {target} vCPUs"));
            open.job.finish(Ok(()));
        } else {
            open.job.finish(Err("the guest has ended"));
        }
    }

    fn take_open(&mut self) -> Option<Open> {
        let open = self.processors.open.take()?;
        // It was added by us and is removed nowhere else.
        let _ = self.events.remove_subscriber(open.timer);
        Some(open)
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
            target: self.processors.open.as_ref().map_or(present, |open| open.sizing.target),
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

/// Leaves [`Message::Tick`] in the inbox again and again.
struct Ticker {
    timer: TimerFd,
    inbox: Inbox,
}

impl Ticker {
    fn new(inbox: Inbox) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(TICK, Some(TICK))?;
        Ok(Self { timer, inbox })
    }
}

impl MutEventSubscriber for Ticker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // How many were missed does not matter.
        let _ = self.timer.wait();
        self.inbox.post(Message::Tick);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        use std::os::fd::AsRawFd;
        watch(ops, self.timer.as_raw_fd());
    }
}
