//! Threads that write what others must not wait for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;
use triarch_device_core::{Event, Sandbox, ThreadClass};

/// How long the end of the process waits for an outlet whose receiver does not take anything.
const FAREWELL: Duration = Duration::from_millis(300);

/// Waits until one of `fds` is ready or `timeout` is over; `None` waits for ever. An interrupted wait ends early.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) {
    // Rounded up: waking too early would only mean to wait again.
    let timeout = timeout.and_then(|t| Timespec::try_from(t + Duration::from_millis(1)).ok());
    let _ = rustix::event::poll(fds, timeout.as_ref());
}

/// A poll entry that waits for something to read.
pub(crate) fn readable<'a>(fd: &'a impl AsFd) -> PollFd<'a> {
    PollFd::new(fd, PollFlags::IN)
}

/// Opens a file to append to, made with `mode` if it is not there, or a named pipe. The pipe is opened for reading too: so there is no need
/// for a reader to be there first, and none to go on; what the pipe holds is there for the next one. Writing to neither waits.
pub(crate) fn open_append(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    options.append(true).custom_flags(flags.bits() as i32).mode(mode);
    match path.metadata() {
        Ok(found) if found.file_type().is_fifo() => options.read(true),
        _ => options.create(true),
    };
    options.open(path)
}

/// A thread that ends when this is dropped. One that hangs in a write is left behind: the process ends anyway.
pub(crate) struct Outlet {
    stop: Event,
    ended: Receiver<()>,
}

impl Outlet {
    /// Runs `body` on a thread called `name`. It must return soon after the event it is given was rung.
    pub(crate) fn spawn(
        name: &str,
        sandbox: &Arc<dyn Sandbox>,
        body: impl FnOnce(&Event) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Event::new()?;
        let (end, ended) = sync_channel::<()>(1);
        let (confine, stopped) = (sandbox.clone(), stop.clone());
        let run = move || {
            if let Err(error) = confine.enter(ThreadClass::Report) {
                tracing::error!("cannot confine a thread that reports: {error}");
                std::process::abort();
            }
            body(&stopped);
            drop(end);
        };
        sandbox.spawn(name.to_owned(), Box::new(run))?;
        Ok(Self { stop, ended })
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.stop.ring();
        // Nothing is ever sent: it ends when the other side is gone, or time is over.
        let _ = self.ended.recv_timeout(FAREWELL);
    }
}

/// Patience at the end of a thread, for what was not written yet.
pub(crate) struct Patience(Option<Instant>);

impl Patience {
    pub(crate) fn new() -> Self {
        Self(None)
    }

    /// The process ends: from now on patience is short.
    pub(crate) fn shorten(&mut self) {
        self.0.get_or_insert_with(|| Instant::now() + FAREWELL / 2);
    }

    /// Whether the process ends.
    pub(crate) fn is_short(&self) -> bool {
        self.0.is_some()
    }

    /// What is left of it; `None` is without end.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.0.map(|end| end.saturating_duration_since(Instant::now()))
    }
}

/// Whether a write failed only because the receiver is slow.
pub(crate) fn is_full(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::NOBUFS | Errno::INTR)
}
