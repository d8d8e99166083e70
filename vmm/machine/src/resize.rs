//! Sizes that a running guest has to bring about itself.
//!
//! Each is a target: it is answered at once, and a job follows the guest until it is there. The same target again is free, another one
//! replaces it. A guest that stands still for too long has failed; what it was asked for stays, and it may get there later.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use triarch_api::jobs::{JobBoard, JobHandle};
use vmm_sys_util::timerfd::TimerFd;

use crate::control::watch;
use crate::{Inbox, MachineError, Message, plug};

/// How long a guest may stand still before it reaches a target.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How often a guest is looked at that may do something unasked.
const WATCH: Duration = Duration::from_secs(1);

/// What of a guest has a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Its vCPUs.
    Vcpus,
    /// Bytes in the balloon.
    Balloon,
    /// Bytes plugged in a memory device.
    Memory(usize),
    /// Bytes of its memory devices.
    Dimms,
}

impl Part {
    /// What it is counted in.
    fn unit(self) -> &'static str {
        match self {
            Self::Vcpus => "vCPUs",
            Self::Balloon | Self::Memory(_) | Self::Dimms => "bytes",
        }
    }

    /// How often a guest that is on its way is looked at. One that should hear of vCPUs or memory is told again by it.
    fn every(self) -> Duration {
        match self {
            Self::Vcpus | Self::Dimms => Duration::from_millis(250),
            Self::Balloon | Self::Memory(_) => Duration::from_secs(1),
        }
    }
}

/// What a guest is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Goal {
    /// Which size it should have.
    pub(crate) target: u64,
    /// How far it is.
    pub(crate) now: u64,
    /// How far it is when it is there: of vCPUs those that come or go are counted, of the balloon all its bytes.
    pub(crate) end: u64,
}

/// What the guest was asked for and has not done yet.
struct Pending {
    target: u64,
    end: u64,
    /// Where it stood last, and since when.
    last: u64,
    since: Instant,
    /// How often it was told again since then.
    told: u32,
    job: JobHandle,
}

/// The targets that the guest has not reached.
pub(crate) struct Resizes {
    parts: BTreeMap<Part, Pending>,
    begun: u64,
    /// Whether the guest may do something without a target that nobody tells of.
    watched: bool,
    /// Devices come or go.
    devices: bool,
    alarm: Arc<Mutex<Alarm>>,
}

impl Resizes {
    /// Without a target. The alarm in it wants to be a subscriber of the event loop.
    pub(crate) fn new(inbox: Inbox) -> Result<(Self, Arc<Mutex<Alarm>>), MachineError> {
        let timer = TimerFd::new().map_err(|error| MachineError::host("make a timer")(error.into()))?;
        let alarm = Arc::new(Mutex::new(Alarm {
            timer,
            every: None,
            inbox,
        }));
        let resizes = Self {
            parts: BTreeMap::new(),
            begun: 0,
            watched: false,
            devices: false,
            alarm: alarm.clone(),
        };
        Ok((resizes, alarm))
    }

    /// Whether the guest is on its way to anything.
    pub(crate) fn any(&self) -> bool {
        !self.parts.is_empty()
    }

    /// How many jobs there were.
    pub(crate) fn begun(&self) -> u64 {
        self.begun
    }

    /// What it is on its way to.
    pub(crate) fn parts(&self) -> Vec<Part> {
        self.parts.keys().copied().collect()
    }

    /// Where the guest is on its way to.
    pub(crate) fn target(&self, part: Part) -> Option<u64> {
        self.parts.get(&part).map(|pending| pending.target)
    }

    /// Follows the guest to `goal`, by a job of `kind` that is in `phase`, instead of what it was asked for before.
    pub(crate) fn begin(&mut self, jobs: &Arc<JobBoard>, kind: &str, part: Part, phase: &str, goal: Goal) {
        self.replace(part, goal.target);
        self.begun += 1;
        let job = jobs.begin(kind);
        job.note(phase);
        job.progress(goal.now, goal.end, part.unit());
        let pending = Pending {
            target: goal.target,
            end: goal.end,
            last: goal.now,
            since: Instant::now(),
            told: 0,
            job,
        };
        self.parts.insert(part, pending);
        self.set_alarm();
    }

    /// Has the time looked at also while devices come or go, or not any more.
    pub(crate) fn watch_devices(&mut self, wanted: bool) {
        self.devices = wanted;
        self.set_alarm();
    }

    /// Ends the job for another target than `target`, if there is one.
    pub(crate) fn replace(&mut self, part: Part, target: u64) {
        let other = self.target(part).is_some_and(|before| before != target);
        if other && let Some(before) = self.parts.remove(&part) {
            let reason = format!("it was replaced by a target of {target} {}", part.unit());
            before.job.finish(Err(&reason));
        }
        self.set_alarm();
    }

    /// The guest is so far now. Returns whether that is where it should be, and its job is still to be [`end`](Self::end)ed.
    pub(crate) fn stands(&mut self, part: Part, now: u64) -> bool {
        let Some(pending) = self.parts.get_mut(&part) else {
            return false;
        };
        if pending.last != now {
            (pending.last, pending.since, pending.told) = (now, Instant::now(), 0);
            pending.job.progress(now, pending.end, part.unit());
        }
        pending.end == now
    }

    /// The guest is not on its way any more; returns the job that tells of it. Whoever sees that it has ended should see what it changed
    /// as well, so this has to be shown before the job is finished.
    pub(crate) fn end(&mut self, part: Part) -> Option<JobHandle> {
        let pending = self.parts.remove(&part)?;
        self.set_alarm();
        Some(pending.job)
    }

    /// There is no guest any more that could do it.
    pub(crate) fn abandon(&mut self, part: Part) {
        if let Some(job) = self.end(part) {
            job.finish(Err("the guest ended before it was there"));
        }
    }

    /// Has the guest looked at now and then, also without a target, or not any more.
    pub(crate) fn watch(&mut self, watched: bool) {
        self.watched = watched;
        self.set_alarm();
    }

    /// Where the guest has stood still for too long. While it stands still itself, it has all the time.
    pub(crate) fn late(&mut self, guest_runs: bool) -> Vec<Part> {
        let mut late = Vec::new();
        for (part, pending) in &mut self.parts {
            if !guest_runs {
                pending.since = Instant::now();
            } else if pending.since.elapsed() >= PATIENCE {
                late.push(*part);
            }
        }
        late
    }

    /// Whether the guest has stood still for another `pause`, and should be told again where it should be.
    pub(crate) fn is_to_be_told(&mut self, part: Part, pause: Duration) -> bool {
        let Some(pending) = self.parts.get_mut(&part) else {
            return false;
        };
        let due = pending.since.elapsed() >= pause * (pending.told + 1);
        pending.told += u32::from(due);
        due
    }

    /// How far the guest is, for whoever wonders why it is not there.
    pub(crate) fn so_far(&self, part: Part) -> String {
        let Some(Pending { last, end, .. }) = self.parts.get(&part) else {
            return String::new();
        };
        let (unit, seconds) = (part.unit(), PATIENCE.as_secs());
        format!("the guest is at {last} {unit} of {end} and has not moved for {seconds} s")
    }

    fn set_alarm(&self) {
        let every = self.parts.keys().map(|part| part.every());
        let devices = self.devices.then_some(plug::EVERY);
        let every = every.chain(self.watched.then_some(WATCH)).chain(devices).min();
        self.alarm.lock().unwrap_or_else(PoisonError::into_inner).set(every);
    }
}

/// Leaves [`Message::Patience`] in the inbox while it is set.
pub(crate) struct Alarm {
    timer: TimerFd,
    every: Option<Duration>,
    inbox: Inbox,
}

impl Alarm {
    fn set(&mut self, every: Option<Duration>) {
        if std::mem::replace(&mut self.every, every) == every {
            return;
        }
        let result = match every {
            Some(every) => self.timer.reset(every, Some(every)),
            None => self.timer.clear(),
        };
        if let Err(error) = result {
            tracing::error!("cannot set a timer, so nobody sees when the guest does nothing: {error}");
        }
    }
}

impl MutEventSubscriber for Alarm {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // A timer that was cleared meanwhile must not be waited for.
        if self.every.is_some() {
            let _ = self.timer.wait();
            self.inbox.post(Message::Patience);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.timer.as_raw_fd());
    }
}

#[cfg(test)]
mod tests {
    use triarch_api::Handler;
    use triarch_api::jobs::{Job, JobState};

    use super::*;

    fn resizes() -> (Resizes, Inbox) {
        let (inbox, _) = Inbox::new().expect("inbox");
        let (resizes, _) = Resizes::new(inbox.clone()).expect("timer");
        (resizes, inbox)
    }

    fn every(resizes: &Resizes) -> Option<u64> {
        let every = resizes.alarm.lock().expect("lock").every;
        every.map(|every| every.as_millis() as u64)
    }

    fn job(inbox: &Inbox, id: u64) -> Job {
        inbox.jobs().get(id).expect("a job")
    }

    fn begin(resizes: &mut Resizes, inbox: &Inbox, part: Part, now: u64, target: u64) {
        let end = target;
        resizes.begin(inbox.jobs(), "vm.resize", part, "phase", Goal { target, now, end });
    }

    #[test]
    fn a_job_follows_the_guest_to_its_target() {
        let (mut resizes, inbox) = resizes();
        assert_eq!(every(&resizes), None);
        begin(&mut resizes, &inbox, Part::Balloon, 10, 30);
        assert_eq!(every(&resizes), Some(1000));
        assert_eq!(resizes.target(Part::Balloon), Some(30));
        assert!(!resizes.stands(Part::Balloon, 20));
        let progress = job(&inbox, 1).progress.expect("progress");
        assert_eq!((progress.done, progress.total, &*progress.unit), (20, 30, "bytes"));
        assert!(resizes.stands(Part::Balloon, 30));
        let ended = resizes.end(Part::Balloon).expect("a job");
        assert_eq!(job(&inbox, 1).state, JobState::Running, "until it is finished");
        assert!(!resizes.any() && every(&resizes).is_none());
        ended.finish(Ok(()));
        assert_eq!(job(&inbox, 1).state, JobState::Done);
        assert!(!resizes.stands(Part::Balloon, 30), "once");
        assert!(resizes.end(Part::Balloon).is_none());
    }

    #[test]
    fn a_newer_target_replaces_one_and_the_same_does_not() {
        let (mut resizes, inbox) = resizes();
        begin(&mut resizes, &inbox, Part::Balloon, 0, 30);
        resizes.replace(Part::Balloon, 30);
        assert_eq!(job(&inbox, 1).state, JobState::Running);
        begin(&mut resizes, &inbox, Part::Balloon, 10, 0);
        let replaced = job(&inbox, 1).error.expect("an error");
        assert_eq!(replaced, "it was replaced by a target of 0 bytes");
        assert_eq!((job(&inbox, 2).state, resizes.begun()), (JobState::Running, 2));
        resizes.abandon(Part::Balloon);
        assert!(job(&inbox, 2).error.expect("an error").contains("guest ended"));
        assert_eq!(every(&resizes), None);
    }

    #[test]
    fn a_guest_that_stands_still_is_told_again() {
        let (mut resizes, inbox) = resizes();
        let pause = Duration::from_secs(5);
        let told = |resizes: &mut Resizes, seconds: u64| {
            let pending = resizes.parts.get_mut(&Part::Memory(0)).expect("pending");
            let ago = Duration::from_secs(seconds);
            pending.since = Instant::now()
                .checked_sub(ago)
                .expect("a machine that is up for so long");
            resizes.is_to_be_told(Part::Memory(0), pause)
        };
        assert!(!resizes.is_to_be_told(Part::Memory(0), pause), "it has no target");
        begin(&mut resizes, &inbox, Part::Memory(0), 0, 30);
        assert!(!told(&mut resizes, 4) && told(&mut resizes, 6) && !told(&mut resizes, 9) && told(&mut resizes, 11));
        resizes.stands(Part::Memory(0), 10);
        assert!(!told(&mut resizes, 4) && told(&mut resizes, 6), "it moved");
        resizes.abandon(Part::Memory(0));
    }

    #[test]
    fn a_guest_is_watched_without_a_target() {
        let (mut resizes, inbox) = resizes();
        resizes.watch(true);
        assert_eq!((every(&resizes), resizes.any()), (Some(1000), false));
        let goal = Goal {
            target: 2,
            now: 0,
            end: 1,
        };
        resizes.begin(inbox.jobs(), "vm.resize", Part::Vcpus, "phase", goal);
        assert_eq!(every(&resizes), Some(250));
        resizes.abandon(Part::Vcpus);
        assert_eq!(every(&resizes), Some(1000));
        resizes.watch(false);
        assert_eq!(every(&resizes), None);
    }

    #[test]
    fn parts_are_followed_side_by_side() {
        let (mut resizes, inbox) = resizes();
        begin(&mut resizes, &inbox, Part::Balloon, 0, 30);
        let goal = Goal {
            target: 4,
            now: 0,
            end: 3,
        };
        resizes.begin(inbox.jobs(), "vm.resize", Part::Vcpus, "phase", goal);
        assert_eq!(every(&resizes), Some(250));
        assert_eq!(resizes.target(Part::Vcpus), Some(4));
        assert!(!resizes.stands(Part::Vcpus, 2) && resizes.stands(Part::Vcpus, 3));
        drop(resizes.end(Part::Vcpus));
        assert_eq!(every(&resizes), Some(1000));
        assert_eq!(resizes.target(Part::Balloon), Some(30));
    }

    #[test]
    fn a_guest_that_stands_still_is_late_unless_it_is_paused() {
        let (mut resizes, inbox) = resizes();
        begin(&mut resizes, &inbox, Part::Balloon, 0, 30);
        resizes.stands(Part::Balloon, 10);
        let wait = |resizes: &mut Resizes| {
            let pending = resizes.parts.get_mut(&Part::Balloon).expect("pending");
            pending.since = Instant::now()
                .checked_sub(PATIENCE)
                .expect("a machine that is up for so long");
        };
        wait(&mut resizes);
        assert_eq!(resizes.late(false), [], "paused");
        assert_eq!(resizes.late(true), [], "and all the time again after it");
        wait(&mut resizes);
        resizes.stands(Part::Balloon, 11);
        assert_eq!(resizes.late(true), [], "it moves");
        wait(&mut resizes);
        assert_eq!(resizes.late(true), [Part::Balloon]);
        let text = resizes.so_far(Part::Balloon);
        assert_eq!(text, "the guest is at 11 bytes of 30 and has not moved for 30 s");
    }
}
