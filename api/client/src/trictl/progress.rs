//! How far a call is that takes long, on the terminal of whoever waits for it.

use std::io::{self, IsTerminal, Write};
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use triarch_api::jobs::{Job, JobState};
use triarch_api::server::Method;
use triarch_client::{Client, Error, Response};

use crate::jobs::progress;
use crate::units::clean;

/// What takes less long is not worth a word.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often the job is looked at.
const PERIOD: Duration = Duration::from_millis(100);
/// An answer about the job is waited for so long; it is only for show.
const LIMIT: Duration = Duration::from_secs(1);
/// Characters of a full bar.
const BAR: usize = 20;
/// Back to the line's start, and empty it (ECMA-48, EL).
const CLEAR: &str = "\r\u{1b}[K";

/// A request to be sent.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) target: &'a str,
    pub(crate) body: Option<&'a str>,
    pub(crate) fds: &'a [BorrowedFd<'a>],
}

impl Request<'_> {
    fn send(self, client: &mut Client) -> Result<Response, Error> {
        client.request(self.method, self.target, self.body, self.fds)
    }
}

/// Sends a request and waits for its answer. If that takes long and there is a terminal, it shows how far the work is.
pub(crate) fn perform(client: &mut Client, request: Request<'_>) -> Result<Response, Error> {
    if request.method != Method::Put || !io::stderr().is_terminal() {
        return request.send(client);
    }
    let mut observer = client.another().limit(LIMIT);
    let (sender, answer) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver lives until there is an answer.
            let _ = sender.send(request.send(client));
        });
        watch(&answer, &mut observer, request.target, &mut io::stderr().lock())
    })
}

/// Waits for `answer`; shows on `output` what the VMM tells `observer`.
fn watch<T>(
    answer: &Receiver<Result<T, Error>>,
    observer: &mut Client,
    kind: &str,
    output: &mut dyn Write,
) -> Result<T, Error> {
    let start = Instant::now();
    let mut period = PATIENCE;
    let result = loop {
        match answer.recv_timeout(period) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Disconnected) => {
                let target = kind.to_owned();
                break Err(Error::Closed { target });
            }
            Err(RecvTimeoutError::Timeout) => {
                period = PERIOD;
                // A VMM that does not know jobs is waited for all the same.
                let jobs: Vec<Job> = observer.get_as("vm.jobs").unwrap_or_default();
                let text = line(kind, current(&jobs, kind), start.elapsed());
                // The terminal may be gone; the answer counts.
                let _ = write!(output, "{CLEAR}{text}").and_then(|()| output.flush());
            }
        }
    };
    if period == PERIOD {
        let _ = write!(output, "{CLEAR}").and_then(|()| output.flush());
    }
    result
}

/// The job that carries out `kind`: the latest of that name that runs.
fn current<'a>(jobs: &'a [Job], kind: &str) -> Option<&'a Job> {
    let running = |job: &&Job| job.kind == kind && job.state == JobState::Running;
    jobs.iter().rev().find(running)
}

fn line(kind: &str, job: Option<&Job>, elapsed: Duration) -> String {
    let mut text = format!("{kind} {:.1} s", elapsed.as_secs_f64());
    if let Some(job) = job {
        if let Some(phase) = &job.phase {
            text.push_str(&format!("  {phase}"));
        }
        if let Some(progress) = &job.progress
            && progress.total > 0
        {
            text.push_str(&format!(
                "  [{}]",
                bar(progress.done as f64 / progress.total as f64, BAR)
            ));
        }
        text.push_str(&format!("  {}", progress(job)));
    }
    // In one line of a terminal of 80 columns, or it could not be taken back.
    clean(text.trim_end()).chars().take(79).collect()
}

/// A bar of `width` characters, filled by `part` of 1.
pub(crate) fn bar(part: f64, width: usize) -> String {
    let part = if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
    let full = (part * width as f64).round() as usize;
    format!("{}{}", "#".repeat(full), ".".repeat(width - full))
}

#[cfg(test)]
mod tests {
    use triarch_api::jobs::{Progress, Timestamp};

    use super::*;

    fn job(id: u64, state: JobState) -> Job {
        Job {
            id,
            kind: "vm.boot".into(),
            state,
            phase: Some("devices".into()),
            progress: Some(Progress {
                done: 3,
                total: 4,
                unit: "devices".into(),
            }),
            started: Timestamp { secs: 0, nanos: 0 },
            ended: None,
            error: None,
        }
    }

    #[test]
    fn the_running_job_is_shown() {
        let jobs = [
            job(1, JobState::Running),
            job(2, JobState::Running),
            job(3, JobState::Done),
        ];
        assert_eq!(current(&jobs, "vm.boot").map(|job| job.id), Some(2));
        assert!(current(&jobs, "vm.delete").is_none());
        assert_eq!(
            line("vm.boot", Some(&jobs[0]), Duration::from_millis(1250)),
            "vm.boot 1.2 s  devices  [###############.....]  3 of 4 devices"
        );
        assert_eq!(line("vm.boot", None, Duration::from_secs(2)), "vm.boot 2.0 s");
        let mut long = job(1, JobState::Running);
        long.phase = Some("x\u{1b}".repeat(100));
        let text = line("vm.boot", Some(&long), Duration::ZERO);
        assert!(text.chars().count() == 79 && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn bars_are_never_too_long() {
        for part in [-1.0, 0.0, 0.5, 1.0, 7.0, f64::NAN, f64::INFINITY] {
            assert_eq!(bar(part, 10).len(), 10);
        }
        assert_eq!(bar(0.5, 10), "#####.....");
    }

    /// Somebody who waits for the answer, which comes when they see that it takes long.
    struct Answering {
        text: Vec<u8>,
        sender: Option<mpsc::Sender<Result<i32, Error>>>,
    }

    impl Write for Answering {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.text.extend_from_slice(text);
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            if let Some(sender) = self.sender.take() {
                sender.send(Ok(2)).expect("send");
            }
            Ok(())
        }
    }

    #[test]
    fn short_calls_are_silent_and_long_ones_leave_nothing_behind() {
        let mut observer = Client::new("/nonexistent.sock");
        let (sender, answer) = mpsc::channel();
        sender.send(Ok(1)).expect("send");
        let mut output = Vec::new();
        assert_eq!(
            watch(&answer, &mut observer, "vm.boot", &mut output).expect("an answer"),
            1
        );
        assert!(output.is_empty());
        let mut output = Answering {
            text: Vec::new(),
            sender: Some(sender),
        };
        assert_eq!(
            watch(&answer, &mut observer, "vm.boot", &mut output).expect("an answer"),
            2
        );
        let text = String::from_utf8(output.text).expect("UTF-8");
        let shown = text.strip_suffix(CLEAR).expect("nothing is left behind");
        assert!(shown.contains("vm.boot ") && shown.ends_with(" s"), "{text:?}");
    }
}
