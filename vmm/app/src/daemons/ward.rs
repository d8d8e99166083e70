//! One daemon, with the thread that looks after it.

#![allow(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};

use triarch_device_core::Event;

use crate::outlet::{readable, wait};

/// How long a daemon may take until it serves.
const START: Duration = Duration::from_secs(5);
/// How long it may take to finish what it has, when it is to end.
const END: Duration = Duration::from_secs(5);
/// How long until one that ended is started again: from this, doubled each time, to that.
const FIRST_DELAY: Duration = Duration::from_millis(10);
const LAST_DELAY: Duration = Duration::from_secs(2);
/// One that ran this long was a good one.
const PROVEN: Duration = Duration::from_secs(2);
/// What is kept of the last line a daemon wrote.
const LINE: usize = 512;
/// The descriptors a daemon finds its listening sockets as: that of its device, and that for orders.
pub(crate) const PLACES: [RawFd; 2] = [3, 4];

/// A daemon that is looked after. Dropping it ends the daemon, and removes its sockets.
pub(crate) struct Ward {
    end: Event,
    thread: Option<JoinHandle<()>>,
    sockets: Vec<PathBuf>,
}

impl Ward {
    /// Starts `program` with `arguments`, its device at `socket`, and taking orders at `control` if it is to; returns when it serves.
    /// The error is a sentence.
    pub(crate) fn start(
        program: PathBuf,
        arguments: Vec<String>,
        socket: &Path,
        control: Option<&Path>,
    ) -> Result<Self, String> {
        let notify = socket.with_extension("notify");
        let failed = |error: io::Error| format!("cannot make the sockets of {}: {error}", program.display());
        let paths = || std::iter::once(socket).chain(control);
        let listeners: Result<Vec<_>, _> = paths().map(UnixListener::bind).collect();
        let listeners = listeners.map_err(failed)?;
        let news = UnixDatagram::bind(&notify).map_err(failed)?;
        news.set_nonblocking(true).map_err(failed)?;
        let end = Event::new().map_err(failed)?;
        let (first, outcome) = sync_channel(1);
        let mut keeper = Keeper {
            program,
            arguments,
            listeners,
            news,
            notify: notify.clone(),
            end: end.clone(),
            last_line: Vec::new(),
        };
        let thread = std::thread::spawn(move || keeper.keep(&first));
        let ward = Self {
            end,
            thread: Some(thread),
            sockets: paths().chain([&*notify]).map(Path::to_owned).collect(),
        };
        match outcome.recv() {
            Ok(Ok(())) => Ok(ward),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err("it was told to end before it was there".to_owned()),
        }
    }

    /// Tells it to end, and does not wait.
    pub(crate) fn begin_end(&mut self) {
        self.end.ring();
    }
}

impl Drop for Ward {
    fn drop(&mut self) {
        self.begin_end();
        if let Some(thread) = self.thread.take() {
            // A panic there has been told.
            let _ = thread.join();
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// The state of the thread. A daemon also ends with the thread that started it, so this one lives longer than each.
struct Keeper {
    program: PathBuf,
    arguments: Vec<String>,
    /// Where the VMM connects. They are the same for each daemon, so that nobody finds them closed.
    listeners: Vec<UnixListener>,
    /// Where the daemon says that it serves (sd_notify(3)).
    news: UnixDatagram,
    notify: PathBuf,
    end: Event,
    last_line: Vec<u8>,
}

/// Why a watch is over.
enum Over {
    /// The daemon ended.
    Ended(io::Result<ExitStatus>),
    /// It is to end, and has.
    Told,
}

impl Keeper {
    fn keep(&mut self, first: &SyncSender<Result<(), String>>) {
        let mut delay = FIRST_DELAY;
        let mut first = Some(first);
        loop {
            let since = Instant::now();
            let over = match self.spawn() {
                Ok(child) => self.watch(child, &mut first),
                Err(error) => Over::Ended(Err(error)),
            };
            let Over::Ended(how) = over else {
                return;
            };
            let reason = self.reason(how);
            if let Some(first) = first.take() {
                // Whoever asked for it waits.
                let _ = first.send(Err(reason));
                return;
            }
            if since.elapsed() >= PROVEN {
                delay = FIRST_DELAY;
            }
            complain(&format!("{reason}; it is started again"));
            let mut fds = [readable(&self.end)];
            wait(&mut fds, Some(delay));
            if !fds[0].revents().is_empty() {
                return;
            }
            delay = (delay * 2).min(LAST_DELAY);
        }
    }

    fn spawn(&mut self) -> io::Result<Child> {
        self.last_line.clear();
        let places = self
            .listeners
            .iter()
            .map(AsRawFd::as_raw_fd)
            .zip(PLACES)
            .collect::<Vec<_>>();
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env("NOTIFY_SOCKET", &self.notify)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only system calls are made; no memory is allocated and no lock taken.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                for (listener, place) in &places {
                    // A copy is not closed by exec. What is copied has another number: those are kept free (see the nursery).
                    if libc::dup2(*listener, *place) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command.spawn()
    }

    /// Watches a daemon until it has ended, and tells `first` when it serves.
    fn watch(&mut self, mut child: Child, first: &mut Option<&SyncSender<Result<(), String>>>) -> Over {
        let Some((life, errors)) = life(&mut child) else {
            let _ = child.kill();
            return Over::Ended(child.wait());
        };
        let mut errors = Some(errors);
        let mut deadline = first.is_some().then(|| Instant::now() + START);
        let mut told = false;
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let (ended, news, end) = self.wait(&life, errors.as_ref(), told, left);
            errors = errors.and_then(|pipe| self.relay(pipe));
            if news
                && self.is_ready()
                && let Some(first) = first.take()
            {
                deadline = None;
                let _ = first.send(Ok(()));
            }
            if ended {
                let status = child.wait();
                return if told { Over::Told } else { Over::Ended(status) };
            }
            if end {
                told = true;
                deadline = Some(Instant::now() + END);
                signal(&life, Signal::TERM);
            }
            if deadline.is_some_and(|at| Instant::now() >= at) {
                if !told {
                    self.last_line = b"it did not get ready in time".to_vec();
                }
                deadline = None;
                signal(&life, Signal::KILL);
            }
        }
    }

    /// Waits for something to happen: the daemon ended, it sent news, it is to end. One that was told to is not told again.
    fn wait(
        &self,
        life: &OwnedFd,
        errors: Option<&ChildStderr>,
        told: bool,
        left: Option<Duration>,
    ) -> (bool, bool, bool) {
        let mut fds = vec![readable(life), readable(&self.news)];
        if !told {
            fds.push(readable(&self.end));
        }
        fds.extend(errors.map(readable));
        wait(&mut fds, left);
        let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        (ready(0), ready(1), !told && ready(2))
    }

    /// Whether a message of the daemon says that it serves.
    fn is_ready(&self) -> bool {
        let mut buffer = [0; 1024];
        let mut ready = false;
        while let Ok(size) = self.news.recv(&mut buffer) {
            let text = buffer.get(..size).unwrap_or_default();
            ready |= text.split(|byte| *byte == b'\n').any(|line| line == b"READY=1");
        }
        ready
    }

    /// Passes on what the daemon wrote, and keeps the last line. Gives the pipe back unless the daemon closed it.
    fn relay(&mut self, mut errors: ChildStderr) -> Option<ChildStderr> {
        let mut buffer = [0; 4096];
        loop {
            let size = match errors.read(&mut buffer) {
                Ok(0) => return None,
                Ok(size) => size,
                Err(_) => return Some(errors),
            };
            let text = buffer.get(..size).unwrap_or_default();
            // Nobody could do anything about it.
            let _ = io::stderr().write_all(text);
            for byte in text {
                if self.last_line.last() == Some(&b'\n') {
                    self.last_line.clear();
                }
                if *byte == b'\n' || self.last_line.len() < LINE {
                    self.last_line.push(*byte);
                }
            }
        }
    }

    /// What is to be said of a daemon that ended.
    fn reason(&self, how: io::Result<ExitStatus>) -> String {
        let program = self.program.display();
        let how = match how {
            Err(error) => return format!("cannot start {program}: {error}"),
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("{program} ended with {code}"),
                (None, signal) => format!("{program} was ended by signal {}", signal.unwrap_or_default()),
            },
        };
        match String::from_utf8_lossy(&self.last_line).trim() {
            "" => how,
            line => format!("{how}: {line}"),
        }
    }
}

/// What tells of a child's end, and its standard error, which is read without waiting.
fn life(child: &mut Child) -> Option<(OwnedFd, ChildStderr)> {
    let errors = child.stderr.take()?;
    let flags = rustix::fs::fcntl_getfl(&errors).ok()?;
    rustix::fs::fcntl_setfl(&errors, flags | rustix::fs::OFlags::NONBLOCK).ok()?;
    let pid = Pid::from_child(child);
    let life = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    Some((life, errors))
}

fn signal(life: &impl AsFd, signal: Signal) {
    // It may have ended by itself.
    let _ = rustix::process::pidfd_send_signal(life, signal);
}

fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "triarch: {text}");
}
