//! `--event-monitor`: events as they happen, to a file, a named pipe or an inherited descriptor.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use triarch_api::events::{Cursor, EventLog};
use triarch_device_core::{Event, Sandbox};

use crate::outlet::{Outlet, Patience, is_full, open_append, readable, wait};
use crate::places::Target;

/// How long a write that failed is not tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Starts the thread that writes what is in `log` and will be.
pub(crate) fn start(target: &Target, log: &Arc<EventLog>, sandbox: &Arc<dyn Sandbox>) -> anyhow::Result<Outlet> {
    let output = match target {
        Target::Path(path) => {
            let file = open_append(path, 0o600);
            file.with_context(|| format!("--event-monitor: cannot write {}", path.display()))?
                .into()
        }
        Target::Fd(fd) => {
            let wrong =
                || format!("--event-monitor: descriptor {fd} was not inherited; open it before starting this program");
            let output = triarch_api::server::inherited(*fd).with_context(wrong)?;
            without_blocking(&output).with_context(|| format!("--event-monitor: cannot use descriptor {fd}"))?;
            output
        }
    };
    let failed = "cannot start the thread of --event-monitor";
    let news = Event::new().context(failed)?;
    let bell = news.clone();
    log.subscribe(move || bell.ring());
    let mut monitor = Monitor {
        cursor: log.after(0)?,
        log: log.clone(),
        output,
        news,
        line: Vec::new(),
        sent: 0,
        retry_at: None,
    };
    Outlet::spawn("event-monitor", sandbox, move |stop| monitor.run(stop)).context(failed)
}

fn without_blocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

/// What keeps the monitor from going on.
enum Obstacle {
    /// There is nothing to write.
    Idle,
    /// The reader is slow.
    Full,
    /// It failed, and may work later: a disk is full.
    Failed(Errno),
    /// The reader is gone for good.
    Gone,
}

struct Monitor {
    log: Arc<EventLog>,
    cursor: Cursor,
    output: OwnedFd,
    news: Event,
    /// The line at hand: one a write, so that a pipe takes all of it or nothing.
    line: Vec<u8>,
    sent: usize,
    /// When a write that failed is tried again. What does not fit into the log meanwhile is counted there.
    retry_at: Option<Instant>,
}

impl Monitor {
    fn run(&mut self, stop: &Event) {
        let mut patience = Patience::new();
        loop {
            let obstacle = self.write();
            if patience.is_short() && (matches!(obstacle, Obstacle::Idle) || patience.left() == Some(Duration::ZERO)) {
                return;
            }
            match obstacle {
                Obstacle::Gone => {
                    tracing::warn!("the reader of --event-monitor is gone, it gets no more events");
                    return;
                }
                Obstacle::Failed(error) if self.retry_at.is_none() => {
                    tracing::warn!("cannot write to --event-monitor: {error}; trying again every second");
                }
                Obstacle::Failed(_) if patience.is_short() => return,
                _ => {}
            }
            self.wait(&obstacle, stop, &mut patience);
        }
    }

    fn wait(&mut self, obstacle: &Obstacle, stop: &Event, patience: &mut Patience) {
        let timeout = match obstacle {
            Obstacle::Idle => self.log.due().map(|due| due.saturating_duration_since(Instant::now())),
            Obstacle::Failed(_) => {
                self.retry_at = Some(Instant::now() + PAUSE);
                Some(PAUSE)
            }
            Obstacle::Full | Obstacle::Gone => None,
        };
        let timeout = timeout.into_iter().chain(patience.left()).min();
        let mut fds = Vec::with_capacity(2);
        match obstacle {
            Obstacle::Idle => fds.push(readable(&self.news)),
            Obstacle::Full => fds.push(PollFd::new(&self.output, PollFlags::OUT)),
            Obstacle::Failed(_) | Obstacle::Gone => {}
        }
        if !patience.is_short() {
            fds.push(readable(stop));
        }
        wait(&mut fds, timeout);
        let stopped = fds
            .pop()
            .is_some_and(|last| !patience.is_short() && !last.revents().is_empty());
        drop(fds);
        self.news.clear();
        if stopped {
            patience.shorten();
        }
    }

    /// Writes until something is in the way.
    fn write(&mut self) -> Obstacle {
        loop {
            if self.sent >= self.line.len() {
                self.line.clear();
                self.sent = 0;
                if !self.log.read(&mut self.cursor, 1, &mut self.line) {
                    return Obstacle::Idle;
                }
            }
            match rustix::io::write(&self.output, &self.line[self.sent..]) {
                Ok(n) => {
                    self.sent += n;
                    if self.retry_at.take().is_some() {
                        tracing::info!("--event-monitor works again");
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) if is_full(error) => return Obstacle::Full,
                Err(Errno::PIPE) => return Obstacle::Gone,
                Err(error) => return Obstacle::Failed(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use triarch_api::events::kind::{VM_BOOTED, VM_PAUSED};
    use triarch_device_core::NoSandbox;

    use super::*;

    fn begin(path: &Path) -> (Arc<EventLog>, Outlet) {
        let log = EventLog::new();
        log.post(&VM_BOOTED, &[]);
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let outlet = start(&Target::Path(path.into()), &log, &sandbox).expect("start");
        (log, outlet)
    }

    fn pipe(directory: &Path) -> std::path::PathBuf {
        let path = directory.join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).expect("a pipe");
        path
    }

    fn ids(text: &str) -> Vec<(u64, String)> {
        let events = text
            .lines()
            .map(|line| -> serde_json::Value { serde_json::from_str(line).expect("JSON") });
        events
            .map(|event| {
                let name = event["event"].as_str().expect("a name").to_owned();
                (event["id"].as_u64().expect("a number"), name)
            })
            .collect()
    }

    #[test]
    fn a_file_gets_every_event_from_the_first_on() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("events");
        let (log, outlet) = begin(&path);
        for _ in 0..500 {
            log.post(&VM_PAUSED, &[]);
        }
        drop(outlet);
        let seen = ids(&std::fs::read_to_string(&path).expect("read"));
        assert_eq!(
            seen.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            (1..=501).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_pipe_without_a_reader_holds_what_it_can_and_then_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = pipe(directory.path());
        let (log, outlet) = begin(&path);
        let pipe = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        wait(&mut [readable(&pipe)], Some(Duration::from_secs(10)));
        drop(pipe);
        // A pipe holds 64 KiB, and the log the last thousand.
        let began = Instant::now();
        for _ in 0..20_000 {
            log.post(&VM_PAUSED, &[]);
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .expect("open");
        let (mut text, mut seen) = (String::new(), Vec::new());
        let deadline = Instant::now() + Duration::from_secs(10);
        while seen.last().is_none_or(|(id, _)| *id < 20_001) {
            assert!(Instant::now() < deadline, "{:?}", seen.last());
            let mut buffer = [0; 65536];
            match reader.read(&mut buffer) {
                Ok(n) => text.push_str(std::str::from_utf8(&buffer[..n]).expect("ASCII")),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
            seen = ids(&text[..text.rfind('\n').map_or(0, |at| at + 1)]);
        }
        assert_eq!(seen[0], (1, "booted".into()));
        assert!(seen.iter().any(|(_, name)| name == "lost"));
        drop(outlet);
    }

    #[test]
    fn the_end_does_not_wait_for_a_reader() {
        let directory = tempfile::tempdir().expect("a directory");
        let (log, outlet) = begin(&pipe(directory.path()));
        for _ in 0..5000 {
            log.post(&VM_PAUSED, &[]);
        }
        let began = Instant::now();
        drop(outlet);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }

    #[test]
    fn a_full_disk_is_tried_again() {
        let (log, outlet) = begin(Path::new("/dev/full"));
        log.post(&VM_PAUSED, &[]);
        std::thread::sleep(Duration::from_millis(100));
        let began = Instant::now();
        drop(outlet);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}
