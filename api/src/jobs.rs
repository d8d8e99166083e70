//! Long work: what is under way, how far it is, and how it ended.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::events::{EventLog, kind};

/// Jobs that are remembered when they have ended.
const ENDED: usize = 64;
/// Bytes of an error's text that are kept.
const ERROR: usize = 2000;

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum JobState {
    /// It is under way.
    Running,
    /// It succeeded.
    Done,
    /// It failed.
    Failed,
}

/// A point in time on the clock of events: since the VMM's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct Timestamp {
    /// Whole seconds.
    pub secs: u64,
    /// Nanoseconds beside them.
    pub nanos: u32,
}

impl From<Duration> for Timestamp {
    fn from(time: Duration) -> Self {
        Self {
            secs: time.as_secs(),
            nanos: time.subsec_nanos(),
        }
    }
}

/// How far a phase of a job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct Progress {
    /// What is done, in `unit`s.
    pub done: u64,
    /// What there is to do.
    pub total: u64,
    /// What is counted: `bytes`, `devices`.
    pub unit: String,
}

/// A job, as `vm.job/{id}` tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// The request that it carries out.
    pub kind: String,
    /// How it stands.
    pub state: JobState,
    /// What it does now, or did last.
    pub phase: Option<String>,
    /// How far that is, if it can be told.
    pub progress: Option<Progress>,
    /// When it began.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// Why it failed.
    pub error: Option<String>,
}

#[derive(Default)]
struct State {
    last: u64,
    jobs: VecDeque<Job>,
}

/// All jobs of the VMM. They can be looked at from any thread at any time.
pub struct JobBoard {
    events: Arc<EventLog>,
    state: Mutex<State>,
}

impl JobBoard {
    /// A board without jobs, which reports beginnings and ends to `events`.
    pub fn new(events: Arc<EventLog>) -> Arc<Self> {
        let state = Mutex::default();
        Arc::new(Self { events, state })
    }

    /// Begins a job that carries out the request `kind`.
    pub fn begin(self: &Arc<Self>, kind: &str) -> JobHandle {
        let id = {
            let mut state = self.state();
            state.last += 1;
            let id = state.last;
            state.jobs.push_back(Job {
                id,
                kind: kind.to_owned(),
                state: JobState::Running,
                phase: None,
                progress: None,
                started: self.events.clock().into(),
                ended: None,
                error: None,
            });
            id
        };
        self.events
            .post(&kind::JOB_STARTED, &[("job", id.into()), ("kind", kind.into())]);
        JobHandle {
            board: self.clone(),
            id,
            ended: false,
        }
    }

    /// Every job that is under way or remembered, oldest first.
    pub fn list(&self) -> Vec<Job> {
        self.state().jobs.iter().cloned().collect()
    }

    /// The job number `id`.
    pub fn get(&self, id: u64) -> Option<Job> {
        self.state().jobs.iter().find(|job| job.id == id).cloned()
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Job)) {
        if let Some(job) = self.state().jobs.iter_mut().find(|job| job.id == id) {
            change(job);
        }
    }

    fn end(&self, id: u64, result: Result<(), &str>) {
        let kind = {
            let mut state = self.state();
            let Some(job) = state.jobs.iter_mut().find(|job| job.id == id) else {
                return;
            };
            job.ended = Some(self.events.clock().into());
            job.state = if result.is_ok() {
                JobState::Done
            } else {
                JobState::Failed
            };
            job.error = result.err().map(|text| text.chars().take(ERROR).collect());
            let kind = job.kind.clone();
            let ended = |job: &Job| job.ended.is_some();
            if state.jobs.iter().filter(|job| ended(job)).count() > ENDED
                && let Some(oldest) = state.jobs.iter().position(ended)
            {
                state.jobs.remove(oldest);
            }
            kind
        };
        let (job, kind) = (("job", id.into()), ("kind", kind.as_str().into()));
        match result {
            Ok(()) => self.events.post(&kind::JOB_DONE, &[job, kind]),
            Err(error) => self
                .events
                .post(&kind::JOB_FAILED, &[job, kind, ("error", error.into())]),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The duty to end a job. Dropped without an end, it has failed.
pub struct JobHandle {
    board: Arc<JobBoard>,
    id: u64,
    ended: bool,
}

impl JobHandle {
    /// The job's number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The job enters a phase, whose progress is not known yet.
    pub fn note(&self, phase: &str) {
        self.board.change(self.id, |job| {
            job.phase = Some(phase.to_owned());
            job.progress = None;
        });
    }

    /// The phase is so far: `done` of `total` `unit`s.
    pub fn progress(&self, done: u64, total: u64, unit: &str) {
        self.board.change(self.id, |job| match &mut job.progress {
            Some(progress) if progress.unit == unit => (progress.done, progress.total) = (done, total),
            progress => {
                let unit = unit.to_owned();
                *progress = Some(Progress { done, total, unit });
            }
        });
    }

    /// Ends the job; an error is the text that whoever asked for it gets.
    pub fn finish(mut self, result: Result<(), &str>) {
        self.ended = true;
        self.board.end(self.id, result);
    }
}

impl Drop for JobHandle {
    fn drop(&mut self) {
        if !self.ended {
            self.board.end(self.id, Err("it was given up"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board() -> (Arc<JobBoard>, Arc<EventLog>) {
        let events = EventLog::new();
        (JobBoard::new(events.clone()), events)
    }

    #[test]
    fn a_job_tells_how_far_it_is_and_how_it_ended() {
        let (board, _) = board();
        let job = board.begin("vm.boot");
        let got = || board.get(1).expect("job 1");
        assert_eq!((got().state, got().phase, got().ended), (JobState::Running, None, None));
        job.note("devices");
        job.progress(1, 4, "devices");
        job.progress(2, 4, "devices");
        let progress = got().progress.expect("progress");
        assert_eq!(
            (progress.done, progress.total, progress.unit.as_str()),
            (2, 4, "devices")
        );
        job.note("kernel");
        assert_eq!((got().phase.as_deref(), got().progress), (Some("kernel"), None));
        job.finish(Ok(()));
        assert_eq!((got().state, got().error), (JobState::Done, None));
        assert!(got().ended >= Some(got().started));
        board.begin("vm.boot").finish(Err("no kernel"));
        let failed = board.get(2).expect("job 2");
        assert_eq!(
            (failed.state, failed.error.as_deref()),
            (JobState::Failed, Some("no kernel"))
        );
        assert_eq!(board.get(3), None);
    }

    #[test]
    fn jobs_that_were_given_up_have_failed() {
        let (board, _) = board();
        drop(board.begin("vm.boot"));
        assert_eq!(board.get(1).expect("job 1").state, JobState::Failed);
    }

    #[test]
    fn the_running_and_the_last_ended_are_kept() {
        let (board, _) = board();
        let running = board.begin("vm.boot");
        for _ in 0..200 {
            board.begin("vm.shutdown").finish(Err(&"x".repeat(10_000)));
        }
        let jobs = board.list();
        assert_eq!(jobs.len(), ENDED + 1);
        assert_eq!(
            (jobs[0].id, jobs[1].id, jobs[ENDED].id),
            (1, 201 - ENDED as u64 + 1, 201)
        );
        assert!(jobs[1].error.as_ref().is_some_and(|error| error.len() == ERROR));
        running.finish(Ok(()));
        assert_eq!(board.list().len(), ENDED);
    }

    #[test]
    fn beginnings_and_ends_are_events() {
        let (board, events) = board();
        board.begin("vm.boot").finish(Ok(()));
        board.begin("vm.reboot").finish(Err("no"));
        let mut text = Vec::new();
        let mut cursor = events.after(0).expect("the start");
        assert!(events.read(&mut cursor, usize::MAX, &mut text));
        let lines: Vec<serde_json::Value> = text
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).expect("JSON"))
            .collect();
        let names: Vec<_> = lines
            .iter()
            .map(|line| line["event"].as_str().expect("a name"))
            .collect();
        assert_eq!(names, ["started", "done", "started", "failed"]);
        assert_eq!(
            lines[3]["properties"],
            serde_json::json!({"job": 2, "kind": "vm.reboot", "error": "no"})
        );
    }

    #[test]
    fn a_job_is_spelled_as_documented() {
        let (board, _) = board();
        let job = board.begin("vm.boot");
        let text = serde_json::to_value(board.get(job.id())).expect("JSON");
        let names: Vec<_> = text.as_object().expect("an object").keys().collect();
        let mut documented = ["id", "kind", "state", "phase", "progress", "started", "ended", "error"];
        documented.sort_unstable();
        assert_eq!(names, documented);
        assert_eq!(
            (&text["state"], &text["ended"]),
            (&"running".into(), &serde_json::Value::Null)
        );
    }
}
