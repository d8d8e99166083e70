//! Runs one command for the agent and streams what it prints.

use crate::proto::{CHUNK, Command, Exit};
use crate::sys::{self, For};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Child, ChildStderr, ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long output may still trickle in after a command ended: a daemon that it left behind keeps
/// its standard output open for ever.
const GRACE: Duration = Duration::from_millis(500);

/// Where a piece of output came from.
#[derive(Clone, Copy)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// A started command, leader of its own process group.
pub struct Running {
    child: Child,
    ended: OwnedFd,
    input: Option<(ChildStdin, Vec<u8>)>,
    deadline: Option<Instant>,
}

impl Running {
    /// Starts `command` with `input` as its standard input.
    pub fn start(command: &Command, input: Vec<u8>) -> io::Result<Self> {
        let (program, arguments) = command
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "argv is empty"))?;
        let output = || {
            if command.detach { Stdio::null() } else { Stdio::piped() }
        };
        let mut child = process::Command::new(program)
            .args(arguments)
            .envs(&command.env)
            .current_dir(command.cwd.as_deref().unwrap_or("/"))
            .stdin(if input.is_empty() {
                Stdio::null()
            } else {
                Stdio::piped()
            })
            .stdout(output())
            .stderr(output())
            .process_group(0)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))?;
        let input = child.stdin.take().map(|pipe| (pipe, input));
        let prepared = sys::pidfd(child.id()).and_then(|ended| {
            if let Some((pipe, _)) = &input {
                sys::set_nonblocking(pipe.as_fd())?;
            }
            Ok(ended)
        });
        let ended = prepared.inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let limit = command.timeout_ms.map(Duration::from_millis);
        Ok(Self {
            child,
            ended,
            input,
            deadline: limit.map(|limit| Instant::now() + limit),
        })
    }

    /// Its process, and the group that it leads.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Feeds the command, hands each piece of its output to `output`, and waits for its end. When
    /// `output` fails, nobody listens any more, and the command is killed.
    pub fn finish(mut self, mut output: impl FnMut(Stream, &[u8]) -> io::Result<()>) -> io::Result<Exit> {
        let mut pipes = (self.child.stdout.take(), self.child.stderr.take());
        let result = self.stream(&mut pipes, &mut output);
        if result.is_err() {
            let _ = sys::kill_group(self.pid());
            self.child.wait()?;
        }
        let (status, timed_out) = result?;
        Ok(Exit {
            code: status.code(),
            signal: status.signal(),
            timed_out,
        })
    }

    fn stream(
        &mut self,
        (stdout, stderr): &mut (Option<ChildStdout>, Option<ChildStderr>),
        output: &mut impl FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> io::Result<(ExitStatus, bool)> {
        let mut buffer = vec![0; CHUNK];
        let mut timed_out = false;
        let mut status = None;
        loop {
            let until = if status.is_some() {
                Some(Instant::now() + GRACE)
            } else {
                self.deadline
            };
            let wait = until.map(|t| t.saturating_duration_since(Instant::now()));
            let [more, errors, room, end] = sys::poll(
                [
                    stdout.as_ref().map(|f| (f.as_fd(), For::Reading)),
                    stderr.as_ref().map(|f| (f.as_fd(), For::Reading)),
                    self.input.as_ref().map(|(f, _)| (f.as_fd(), For::Writing)),
                    status.is_none().then_some((self.ended.as_fd(), For::Reading)),
                ],
                wait,
            )?;
            if more {
                pump(stdout, &mut buffer, |data| output(Stream::Stdout, data))?;
            }
            if errors {
                pump(stderr, &mut buffer, |data| output(Stream::Stderr, data))?;
            }
            if room {
                self.feed();
            }
            if end {
                status = Some(self.child.wait()?);
                self.input = None;
            }
            let quiet = !(more || errors || end);
            match status {
                Some(status) if quiet || (stdout.is_none() && stderr.is_none()) => {
                    return Ok((status, timed_out));
                }
                None if self.deadline.is_some_and(|t| t <= Instant::now()) => {
                    timed_out = true;
                    self.deadline = None;
                    sys::kill_group(self.pid())?;
                }
                _ => {}
            }
        }
    }

    /// Writes as much input as fits; drops the pipe at the end, or when the command closed it.
    fn feed(&mut self) {
        let Some((pipe, data)) = &mut self.input else {
            return;
        };
        match pipe.write(data) {
            Ok(n) if n < data.len() => drop(data.drain(..n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.input = None,
        }
    }
}

/// Passes on what one read gives; forgets the pipe at its end.
fn pump(
    pipe: &mut Option<impl Read>,
    buffer: &mut [u8],
    output: impl FnOnce(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let Some(reader) = pipe else { return Ok(()) };
    let n = reader.read(buffer)?;
    if n == 0 {
        *pipe = None;
        return Ok(());
    }
    output(&buffer[..n])
}
