//! A program under test: its output captured, its end certain.

use crate::capture::Capture;
use anyhow::{Context, Result, bail};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(2);
/// How long output may still come when a process has ended.
const DRAIN: Duration = Duration::from_secs(1);

/// A running program. Dropping it kills it.
pub struct Process {
    child: Child,
    name: String,
    stdout: Capture,
    stderr: Capture,
    readers: Vec<JoinHandle<()>>,
    started: Instant,
}

/// Limits the address space of this process, and of those that it starts from now on, to so many bytes.
///
/// # Errors
/// The kernel refused.
pub fn limit_address_space(bytes: u64) -> Result<()> {
    let limit = rustix::process::Rlimit {
        current: Some(bytes),
        maximum: Some(bytes),
    };
    rustix::process::setrlimit(rustix::process::Resource::As, limit).context("cannot limit the address space")
}

/// Runs a program to its end; what it printed, without white space around it.
///
/// # Errors
/// It cannot be started or fails: the message has what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

impl Process {
    /// Starts `command` without standard input.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let captured = || -> Result<_> {
            let stdout = child.stdout.take().context("no standard output")?;
            let stderr = child.stderr.take().context("no standard error")?;
            Ok((Capture::start(stdout)?, Capture::start(stderr)?))
        }();
        let ((stdout, out), (stderr, err)) = captured.inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Self {
            child,
            name,
            stdout,
            stderr,
            readers: vec![out, err],
            started,
        })
    }

    /// The same with less claim to a CPU than others, by `nice` steps (setpriority(2)): for what never sleeps.
    ///
    /// # Errors
    /// As [`Process::start`].
    pub fn start_nice(command: &mut Command, nice: i32) -> Result<Self> {
        // A process has it from the thread that starts it, and that keeps it.
        let start = || {
            rustix::process::setpriority_process(None, nice).context("cannot set the priority")?;
            Self::start(command)
        };
        let started = thread::scope(|scope| scope.spawn(start).join());
        started.unwrap_or_else(|_| bail!("the thread that starts a program panicked"))
    }

    /// Its standard output.
    pub fn stdout(&self) -> &Capture {
        &self.stdout
    }

    /// Its standard error.
    pub fn stderr(&self) -> &Capture {
        &self.stderr
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The moment just before it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Waits for its end, and for the last of its output.
    ///
    /// # Errors
    /// It does not end within `limit`; it still runs then.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.drain();
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} did not end in {limit:?}{}", self.name, self.last_words());
            }
            thread::sleep(POLL);
        }
    }

    /// Waits for the last output, but not for a process that it left behind with its pipes.
    fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN;
        while self.readers.iter().any(|r| !r.is_finished()) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        self.readers.clear();
    }

    /// Fails unless `status` is exit code `code`; the error shows what was printed.
    ///
    /// # Errors
    /// Another exit code, or a signal.
    pub fn expect(&self, status: ExitStatus, code: i32) -> Result<()> {
        if status.code() == Some(code) {
            return Ok(());
        }
        let how = match (status.code(), status.signal()) {
            (Some(other), _) => format!("with exit code {other}"),
            (_, Some(signal)) => format!("by signal {signal}"),
            _ => "in an unknown way".into(),
        };
        bail!(
            "{} ended {how}, not with exit code {code}{}",
            self.name,
            self.last_words()
        );
    }

    /// The end of all its output, for error messages.
    pub fn last_words(&self) -> String {
        let [out, err] = [&self.stdout, &self.stderr].map(|c| crate::capture::tail(c.text().as_bytes()));
        let part = |title: &str, text: &str| {
            if text.is_empty() {
                String::new()
            } else {
                format!("\n--- {title}:\n{text}")
            }
        };
        part("end of its standard output", &out) + &part("end of its standard error", &err)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The readers are left to end by themselves: a process that it started may hold the pipes.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn captures_output_and_exit_code() {
        let mut process = shell("echo out; echo err >&2; exit 3");
        let status = process.wait(Duration::from_secs(10)).unwrap();
        assert_eq!(
            (process.stdout().text(), process.stderr().text()),
            ("out\n".into(), "err\n".into())
        );
        process.expect(status, 3).unwrap();
        let error = process.expect(status, 0).unwrap_err().to_string();
        assert!(error.contains("exit code 3") && error.contains("err"), "{error}");
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let process = shell("echo up; exec sleep 60");
        process.stdout().wait_for("up", 0, Duration::from_secs(10)).unwrap();
        let proc = format!("/proc/{}", process.pid());
        drop(process);
        assert!(!std::path::Path::new(&proc).exists());
    }

    #[test]
    fn a_process_that_does_not_end_is_an_error() {
        let error = shell("exec sleep 60").wait(Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("did not end in 50ms"), "{error}");
    }
}
