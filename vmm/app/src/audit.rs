//! `--audit-log`: one line for each call that changes something, to a file, syslog or the journal.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use triarch_api::audit::{AuditRecord, AuditSink, rfc3339};
use triarch_device_core::{Event, Sandbox};

use crate::outlet::{Outlet, Patience, readable, wait};
use crate::places::AuditLog;

/// Lines that wait to be written.
const WAITING: usize = 1024;
/// How long a write that failed is not tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// Facility authpriv, severity info (RFC 5424, section 6.2.1).
const PRIORITY: u32 = 10 * 8 + 6;

/// The audit log: takes records without waiting, and writes them on a thread of its own.
pub(crate) struct Audit {
    queue: Arc<Queue>,
    /// Its file, if it goes to one.
    file: Option<PathBuf>,
    _outlet: Outlet,
}

/// Opens the file of the audit log again, on a thread that may open files.
pub(crate) struct Reopener {
    path: PathBuf,
    queue: Arc<Queue>,
}

impl Reopener {
    /// Lines that are not written yet go to the file that has the path now. On error they go where they went.
    pub(crate) fn reopen(&self) -> io::Result<()> {
        let file = open_file(&self.path)?;
        *self.queue.new_file.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        self.queue.news.ring();
        Ok(())
    }
}

impl Audit {
    /// Opens the log and starts its thread.
    pub(crate) fn start(log: &AuditLog, sandbox: &Arc<dyn Sandbox>) -> anyhow::Result<Self> {
        let mut writer = Writer::open(log)?;
        let failed = "cannot start the thread of --audit-log";
        let queue = Arc::new(Queue {
            items: Mutex::default(),
            new_file: Mutex::default(),
            news: Event::new().context(failed)?,
        });
        let file = match log {
            AuditLog::File(path) => Some(path.clone()),
            AuditLog::Syslog(_) | AuditLog::Journal(_) => None,
        };
        let theirs = queue.clone();
        let outlet = Outlet::spawn("audit-log", sandbox, move |stop| write_all(&theirs, &mut writer, stop));
        Ok(Self {
            queue,
            file,
            _outlet: outlet.context(failed)?,
        })
    }

    /// What opens the file again, if there is one.
    pub(crate) fn reopener(&self) -> Option<Reopener> {
        let path = self.file.clone()?;
        let queue = self.queue.clone();
        Some(Reopener { path, queue })
    }

    /// Where records go.
    pub(crate) fn sink(&self) -> Arc<dyn AuditSink> {
        self.queue.clone()
    }
}

/// What waits to be written.
#[derive(Debug, PartialEq)]
enum Item {
    Record(AuditRecord),
    /// So many records found no room here.
    Lost(u64),
}

struct Queue {
    items: Mutex<VecDeque<Item>>,
    /// The file to go on with.
    new_file: Mutex<Option<File>>,
    news: Event,
}

impl Queue {
    fn items(&self) -> MutexGuard<'_, VecDeque<Item>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AuditSink for Queue {
    fn record(&self, record: &AuditRecord) {
        let mut items = self.items();
        if items.len() < WAITING {
            items.push_back(Item::Record(record.clone()));
        } else if let Some(Item::Lost(count)) = items.back_mut() {
            *count += 1;
        } else {
            items.push_back(Item::Lost(1));
        }
        drop(items);
        self.news.ring();
    }
}

/// The thread: writes what waits. What cannot be written is tried again, and waits until then.
fn write_all(queue: &Queue, writer: &mut Writer, stop: &Event) {
    let mut patience = Patience::new();
    let mut failing = false;
    loop {
        queue.news.clear();
        let result = write_some(queue, writer);
        if let Err(error) = &result
            && !failing
        {
            tracing::warn!("cannot write to --audit-log: {error}; trying again every second");
        }
        if result.is_ok() && failing {
            tracing::warn!("--audit-log works again");
        }
        failing = result.is_err();
        if patience.is_short() {
            let left = queue.items().len();
            if left > 0 {
                tracing::warn!(
                    left,
                    "the audit log is not complete: the last lines could not be written"
                );
            }
            return;
        }
        let mut fds = vec![readable(stop)];
        if !failing {
            fds.push(readable(&queue.news));
        }
        wait(&mut fds, failing.then_some(PAUSE));
        if !fds[0].revents().is_empty() {
            patience.shorten();
        }
    }
}

fn write_some(queue: &Queue, writer: &mut Writer) -> io::Result<()> {
    let file = queue.new_file.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(file) = file {
        writer.replace(file);
    }
    loop {
        // It stays there while it is written: the queue is what limits how much waits.
        let message = match queue.items().front() {
            None => return writer.finish(),
            Some(item) => writer.message(item),
        };
        writer.write(&message)?;
        let mut items = queue.items();
        // More may have been lost meanwhile: the rest of the count stays.
        match (items.front_mut(), message.lost) {
            (Some(Item::Lost(count)), told) if *count > told => *count -= told,
            _ => drop(items.pop_front()),
        }
    }
}

/// A line, in the form its receiver wants.
struct Message {
    bytes: Vec<u8>,
    /// How many lost records it tells of.
    lost: u64,
}

/// Where lines go.
enum Writer {
    File {
        file: File,
        /// The rest of a line of which a full disk took the beginning.
        rest: Vec<u8>,
    },
    Syslog(Datagrams),
    Journal(Datagrams),
}

impl Writer {
    fn open(log: &AuditLog) -> anyhow::Result<Self> {
        let cannot = |path: &Path| format!("--audit-log: cannot write {}", path.display());
        let connect = |path: &PathBuf| Datagrams::connect(path).with_context(|| cannot(path));
        Ok(match log {
            AuditLog::File(path) => {
                let file = open_file(path).with_context(|| cannot(path))?;
                let rest = Vec::new();
                Self::File { file, rest }
            }
            AuditLog::Syslog(path) => Self::Syslog(connect(path)?),
            AuditLog::Journal(path) => Self::Journal(connect(path)?),
        })
    }

    fn message(&self, item: &Item) -> Message {
        let (time, lost, json) = match item {
            Item::Record(record) => (record.time.clone(), 0, record.to_json()),
            Item::Lost(count) => {
                let time = rfc3339(SystemTime::now());
                let json = serde_json::json!({ "time": time, "lost": count }).to_string();
                (time, *count, json)
            }
        };
        let bytes = match self {
            Self::File { .. } => format!("{json}\n"),
            Self::Syslog(_) => syslog(&time, &json),
            Self::Journal(_) => journal(item, &json),
        };
        Message {
            bytes: bytes.into_bytes(),
            lost,
        }
    }

    /// Goes on in another file. The rest of a line stays with its beginning as far as that is possible.
    fn replace(&mut self, new: File) {
        if let Self::File { file, rest } = self {
            let _ = write_rest(file, rest);
            rest.clear();
            *file = new;
        }
    }

    /// Writes the rest of a line, if there is one.
    fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::File { file, rest } => write_rest(file, rest),
            Self::Syslog(_) | Self::Journal(_) => Ok(()),
        }
    }

    fn write(&mut self, message: &Message) -> io::Result<()> {
        match self {
            Self::File { file, rest } => {
                write_rest(file, rest)?;
                rest.extend_from_slice(&message.bytes);
                match write_rest(file, rest) {
                    // Not a byte of it is there: it is tried again as a whole.
                    Err(error) if rest.len() == message.bytes.len() => {
                        rest.clear();
                        Err(error)
                    }
                    // The rest of it comes before the next one.
                    _ => Ok(()),
                }
            }
            Self::Syslog(socket) | Self::Journal(socket) => socket.send(&message.bytes),
        }
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK);
    options.open(path)
}

fn write_rest(file: &mut impl Write, rest: &mut Vec<u8>) -> io::Result<()> {
    while !rest.is_empty() {
        match file.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => drop(rest.drain(..n)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A line as syslog daemons take it from their socket (RFC 3164, section 4.1). The time is UTC, and stands whole in the JSON text.
fn syslog(time: &str, json: &str) -> String {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let part = |range: std::ops::Range<usize>| time.get(range).unwrap_or_default();
    let number = |range: std::ops::Range<usize>| part(range).parse::<usize>().unwrap_or_default();
    let month = MONTHS.get(number(5..7).wrapping_sub(1)).unwrap_or(&"Jan");
    let (day, clock, pid) = (number(8..10), part(11..19), std::process::id());
    format!("<{PRIORITY}>{month} {day:>2} {clock} triarch[{pid}]: {json}")
}

/// A line in the journal's own protocol: fields, one a line. No value has a newline.
fn journal(item: &Item, json: &str) -> String {
    let mut text = format!("MESSAGE={json}\nPRIORITY=6\nSYSLOG_FACILITY=10\nSYSLOG_IDENTIFIER=triarch\n");
    match item {
        Item::Record(record) => {
            let AuditRecord {
                uid,
                gid,
                pid,
                request,
                status,
                duration_us,
                ..
            } = record;
            text += &format!("TRIARCH_REQUEST={request}\nTRIARCH_STATUS={status}\nTRIARCH_DURATION_US={duration_us}\n");
            text += &format!("TRIARCH_UID={uid}\nTRIARCH_GID={gid}\nTRIARCH_PID={pid}\n");
        }
        Item::Lost(count) => text += &format!("TRIARCH_LOST={count}\n"),
    }
    text
}

/// A daemon's socket.
struct Datagrams {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Datagrams {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Sends `bytes`, to the daemon that is there now if the last one is gone.
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self.socket.send(bytes) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                self.socket.connect(&self.path)?;
                self.socket.send(bytes).map(drop)
            }
            result => result.map(drop),
        }
    }
}

#[cfg(test)]
mod tests;
