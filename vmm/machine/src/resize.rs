//! Sizes that a running guest has to bring about itself.
//!
//! Each is a target: it is answered at once, and a job follows the guest until it is there. The same target again is free, another one
//! replaces it. A guest that stands still for too long has failed; the target stays, and the guest may get there later.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use triarch_api::jobs::{JobBoard, JobHandle};
use vmm_sys_util::timerfd::TimerFd;

use crate::control::watch;
use crate::{Inbox, MachineError, Message};

/// How long a guest may stand still before it reaches a target.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often that is looked at.
const EVERY: Duration = Duration::from_secs(1);

/// What of a guest has a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Bytes in the balloon.
    Balloon,
}

impl Part {
    const ALL: [Self; 1] = [Self::Balloon];

    /// The phase of its jobs.
    fn name(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
        }
    }

    /// What it is counted in.
    fn unit(self) -> &'static str {
        match self {
            Self::Balloon => "bytes",
        }
    }
}

/// What the guest was asked for and has not done yet.
struct Pending {
    target: u64,
    /// Where it stood last, and since when.
    last: u64,
    since: Instant,
    job: JobHandle,
}

/// The targets that the guest has not reached.
pub(crate) struct Resizes {
    parts: [Option<Pending>; Part::ALL.len()],
    alarm: Arc<Mutex<Alarm>>,
}

impl Resizes {
    /// Without a target. The alarm in it wants to be a subscriber of the event loop.
    pub(crate) fn new(inbox: Inbox) -> Result<(Self, Arc<Mutex<Alarm>>), MachineError> {
        let timer = TimerFd::new().map_err(|error| MachineError::host("make a timer")(error.into()))?;
        let alarm = Arc::new(Mutex::new(Alarm {
            timer,
            armed: false,
            inbox,
        }));
        let parts = [const { None }; Part::ALL.len()];
        let resizes = Self {
            parts,
            alarm: alarm.clone(),
        };
        Ok((resizes, alarm))
    }

    /// Whether the guest is on its way to anything.
    pub(crate) fn any(&self) -> bool {
        self.parts.iter().any(Option::is_some)
    }

    /// Where the guest is on its way to.
    pub(crate) fn target(&self, part: Part) -> Option<u64> {
        self.parts[part as usize].as_ref().map(|pending| pending.target)
    }

    /// Follows the guest from `now` to `target`, by a job of `kind`, instead of what it was asked for before.
    pub(crate) fn begin(&mut self, jobs: &Arc<JobBoard>, kind: &str, part: Part, now: u64, target: u64) {
        self.replace(part, target);
        let job = jobs.begin(kind);
        job.note(part.name());
        job.progress(now, target, part.unit());
        self.parts[part as usize] = Some(Pending {
            target,
            last: now,
            since: Instant::now(),
            job,
        });
        self.set_alarm();
    }

    /// Ends the job for another target than `target`, if there is one.
    pub(crate) fn replace(&mut self, part: Part, target: u64) {
        if let Some(before) = self.parts[part as usize].take_if(|pending| pending.target != target) {
            let unit = part.unit();
            let reason = format!(
                "it was replaced by another target, {target} {unit}, when there were {}",
                before.last
            );
            before.job.finish(Err(&reason));
        }
        self.set_alarm();
    }

    /// The guest stands at `now`. Returns whether that is where it should be, and it was not before.
    pub(crate) fn stands(&mut self, part: Part, now: u64) -> bool {
        let slot = &mut self.parts[part as usize];
        let Some(pending) = slot else { return false };
        if pending.last != now {
            (pending.last, pending.since) = (now, Instant::now());
            pending.job.progress(now, pending.target, part.unit());
        }
        let Some(done) = slot.take_if(|pending| pending.target == now) else {
            return false;
        };
        done.job.finish(Ok(()));
        self.set_alarm();
        true
    }

    /// Fails what has stood still for too long; `why` tells what is known of a part. While the guest stands still itself, it has all the
    /// time.
    pub(crate) fn look(&mut self, guest_runs: bool, why: impl Fn(Part) -> Option<String>) {
        for part in Part::ALL {
            let slot = &mut self.parts[part as usize];
            if let Some(pending) = slot.as_mut().filter(|_| !guest_runs) {
                pending.since = Instant::now();
            }
            if let Some(failed) = slot.take_if(|pending| pending.since.elapsed() >= PATIENCE) {
                let (unit, seconds) = (part.unit(), PATIENCE.as_secs());
                let mut reason = format!(
                    "the guest is at {} {unit} of {} and has not moved for {seconds} s",
                    failed.last, failed.target
                );
                if let Some(why) = why(part) {
                    reason = format!("{reason}: {why}");
                }
                failed.job.finish(Err(&reason));
            }
        }
        self.set_alarm();
    }

    /// There is no guest any more that could do it.
    pub(crate) fn abandon(&mut self) {
        for pending in self.parts.iter_mut().filter_map(Option::take) {
            pending.job.finish(Err("the guest ended before it was there"));
        }
        self.set_alarm();
    }

    fn set_alarm(&self) {
        let on = self.any();
        self.alarm.lock().unwrap_or_else(PoisonError::into_inner).set(on);
    }
}

/// Leaves [`Message::Patience`] in the inbox while it is set.
pub(crate) struct Alarm {
    timer: TimerFd,
    armed: bool,
    inbox: Inbox,
}

impl Alarm {
    fn set(&mut self, on: bool) {
        if std::mem::replace(&mut self.armed, on) == on {
            return;
        }
        let result = match on {
            true => self.timer.reset(EVERY, Some(EVERY)),
            false => self.timer.clear(),
        };
        if let Err(error) = result {
            tracing::error!("cannot set a timer, so nobody sees when the guest does nothing: {error}");
        }
    }
}

impl MutEventSubscriber for Alarm {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // A timer that was cleared meanwhile must not be waited for.
        if self.armed {
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

    fn armed(resizes: &Resizes) -> bool {
        resizes.alarm.lock().expect("lock").armed
    }

    fn job(inbox: &Inbox, id: u64) -> Job {
        inbox.jobs().get(id).expect("a job")
    }

    #[test]
    fn a_job_follows_the_guest_to_its_target() {
        let (mut resizes, inbox) = resizes();
        assert!(!armed(&resizes));
        resizes.begin(inbox.jobs(), "vm.resize", Part::Balloon, 10, 30);
        assert!(armed(&resizes) && resizes.target(Part::Balloon) == Some(30));
        assert!(!resizes.stands(Part::Balloon, 20));
        let progress = job(&inbox, 1).progress.expect("progress");
        assert_eq!((progress.done, progress.total, &*progress.unit), (20, 30, "bytes"));
        assert!(resizes.stands(Part::Balloon, 30));
        assert!(!resizes.stands(Part::Balloon, 30), "once");
        assert_eq!(job(&inbox, 1).state, JobState::Done);
        assert!(!armed(&resizes));
    }

    #[test]
    fn a_newer_target_replaces_one_and_the_same_does_not() {
        let (mut resizes, inbox) = resizes();
        resizes.begin(inbox.jobs(), "vm.resize", Part::Balloon, 0, 30);
        resizes.replace(Part::Balloon, 30);
        assert_eq!(job(&inbox, 1).state, JobState::Running);
        resizes.begin(inbox.jobs(), "vm.resize", Part::Balloon, 10, 0);
        let replaced = job(&inbox, 1).error.expect("an error");
        assert!(
            replaced.contains("replaced") && replaced.contains("0 bytes"),
            "{replaced}"
        );
        resizes.abandon();
        assert!(job(&inbox, 2).error.expect("an error").contains("guest ended"));
        assert!(!armed(&resizes));
    }

    #[test]
    fn a_guest_that_stands_still_fails_unless_it_is_paused() {
        let (mut resizes, inbox) = resizes();
        resizes.begin(inbox.jobs(), "vm.resize", Part::Balloon, 0, 30);
        resizes.stands(Part::Balloon, 10);
        let late = |resizes: &mut Resizes| {
            let pending = resizes.parts[0].as_mut().expect("pending");
            pending.since = Instant::now()
                .checked_sub(PATIENCE)
                .expect("a machine that is up for so long");
        };
        late(&mut resizes);
        resizes.look(false, |_| None);
        assert_eq!(job(&inbox, 1).state, JobState::Running, "paused");
        late(&mut resizes);
        resizes.look(true, |_| Some("no driver".into()));
        let error = job(&inbox, 1).error.expect("an error");
        assert!(
            error.contains("at 10 bytes of 30") && error.ends_with("no driver"),
            "{error}"
        );
        assert!(!armed(&resizes));
    }
}
