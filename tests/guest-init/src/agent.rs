//! The agent: answers the requests of one client on one stream.

use crate::exec::{Running, Stream};
use crate::power;
use crate::proto::{self, CHUNK, Command, MAX_STDIN, Reply, Request};
use crate::setup;
use crate::sys;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Time for the last reply to reach the host before the machine ends.
const FAREWELL: Duration = Duration::from_millis(100);

/// One client's session.
struct Session<W> {
    writer: Mutex<W>,
    /// Process groups of the commands that run, by the request's `id`.
    running: Mutex<HashMap<u64, u32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves a client until its stream ends. Commands that still run then are killed, unless they
/// were detached.
///
/// # Errors
/// The reader's. Errors of the writer end the command whose output it was.
pub fn serve<W: Write + Send + 'static>(reader: impl Read, writer: W) -> io::Result<()> {
    let session = Arc::new(Session {
        writer: Mutex::new(writer),
        running: Mutex::new(HashMap::new()),
    });
    let mut reader = BufReader::with_capacity(CHUNK, reader);
    let result = loop {
        match proto::read(&mut reader) {
            Ok(Some((request, size))) => {
                if let Err(e) = session.handle(request, size, &mut reader) {
                    break Err(e);
                }
            }
            Ok(None) => break Ok(()),
            Err(e) => break Err(e),
        }
    };
    session.kill_all();
    result
}

impl<W: Write + Send + 'static> Session<W> {
    fn reply(&self, reply: &Reply, data: &[u8]) -> io::Result<()> {
        proto::write(&mut *lock(&self.writer), reply, data)
    }

    fn outcome(&self, id: u64, result: io::Result<()>) -> io::Result<()> {
        match result {
            Ok(()) => self.reply(&Reply::Done { id }, b""),
            Err(e) => self.reply(
                &Reply::Error {
                    id,
                    message: e.to_string(),
                },
                b"",
            ),
        }
    }

    /// Carries out one request. Reads the `size` bytes that belong to it, whatever happens, so that
    /// the next header is found. An error means that the stream is of no more use.
    fn handle(self: &Arc<Self>, request: Request, size: u64, reader: &mut impl BufRead) -> io::Result<()> {
        let mut data = reader.take(size);
        match request {
            Request::Hello { token } => {
                // A serial line shows no end of the last client: the new one's start is it.
                self.kill_all();
                self.reply(
                    &Reply::Hello {
                        token,
                        machine: setup::machine(),
                    },
                    b"",
                )?;
            }
            Request::Exec { id, command } => {
                if size > MAX_STDIN {
                    let message = format!("standard input is limited to {MAX_STDIN} bytes");
                    self.reply(&Reply::Error { id, message }, b"")?;
                } else {
                    let mut input = Vec::new();
                    data.read_to_end(&mut input)?;
                    self.exec(id, &command, input)?;
                }
            }
            Request::Put { id, path, mode } => {
                let result = store(Path::new(&path), mode, &mut data);
                let result = result.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")));
                self.outcome(id, result)?;
            }
            Request::Get { id, path } => {
                let this = Arc::clone(self);
                thread::Builder::new().name(format!("get{id}")).spawn(move || {
                    let result = this.send_file(id, Path::new(&path));
                    let result = result.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")));
                    // If this fails, the reading side of the session notices too.
                    let _ = this.outcome(id, result);
                })?;
            }
            Request::Kill { id, exec } => {
                let group = lock(&self.running).get(&exec).copied();
                let result = group.map_or(Ok(()), sys::kill_group);
                self.outcome(id, result)?;
            }
            Request::Power { id, action } => {
                self.reply(&Reply::Done { id }, b"")?;
                thread::sleep(FAREWELL);
                if let Err(e) = power::end(action) {
                    self.reply(
                        &Reply::Error {
                            id,
                            message: e.to_string(),
                        },
                        b"",
                    )?;
                }
            }
        }
        io::copy(&mut data, &mut io::sink())?;
        Ok(())
    }

    fn exec(self: &Arc<Self>, id: u64, command: &Command, input: Vec<u8>) -> io::Result<()> {
        let running = match Running::start(command, input) {
            Ok(running) => running,
            Err(e) => {
                return self.reply(
                    &Reply::Error {
                        id,
                        message: e.to_string(),
                    },
                    b"",
                );
            }
        };
        let detached = command.detach;
        if detached {
            self.reply(&Reply::Started { id, pid: running.pid() }, b"")?;
        } else {
            lock(&self.running).insert(id, running.pid());
        }
        let this = Arc::clone(self);
        thread::Builder::new().name(format!("exec{id}")).spawn(move || {
            let exit = running.finish(|stream, data| match stream {
                Stream::Stdout => this.reply(&Reply::Stdout { id }, data),
                Stream::Stderr => this.reply(&Reply::Stderr { id }, data),
            });
            if detached {
                return;
            }
            lock(&this.running).remove(&id);
            // If this fails, the reading side of the session notices too.
            let _ = match exit {
                Ok(exit) => this.reply(&Reply::Exit { id, exit }, b""),
                Err(e) => this.reply(
                    &Reply::Error {
                        id,
                        message: e.to_string(),
                    },
                    b"",
                ),
            };
        })?;
        Ok(())
    }

    fn send_file(&self, id: u64, path: &Path) -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            self.reply(&Reply::Data { id }, &buffer[..n])?;
        }
    }

    fn kill_all(&self) {
        for group in lock(&self.running).values() {
            // One that has just ended by itself is no error.
            let _ = sys::kill_group(*group);
        }
    }
}

fn store(path: &Path, mode: u32, data: &mut impl Read) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // A program that runs cannot be overwritten, only replaced.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path)?;
    io::copy(data, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests;
