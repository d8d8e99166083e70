//! The process that starts daemons.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::net::{RecvFlags, SendFlags};
use tempfile::TempDir;

use super::message::{self, Answer, Order};
use super::ward::{PLACES, Ward};

/// Serves the VMM at standard input until it is gone; then ends all daemons, and leaves nothing behind.
pub(crate) fn run() -> ExitCode {
    close_inherited();
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    // Where daemons find their sockets, nothing else is ever put: between fork and exec it would be lost.
    let _kept = PLACES.map(|place| rustix::io::fcntl_dupfd_cloexec(socket, place));
    match Nursery::new() {
        Ok(mut nursery) => {
            nursery.serve(socket);
            ExitCode::SUCCESS
        }
        Err(error) => {
            answer(
                socket,
                &Answer::Failed(format!("there is no directory for the sockets of daemons: {error}")),
            );
            ExitCode::FAILURE
        }
    }
}

/// Closes what whoever started the VMM handed over to it, so that nothing stays open on its account.
fn close_inherited() {
    // SAFETY: nothing was opened yet in this process, so no object owns any of these descriptors.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

fn answer(socket: BorrowedFd<'_>, answer: &Answer) {
    // A VMM that is gone needs no answer.
    if let Ok(message) = serde_json::to_vec(answer) {
        let _ = rustix::net::send(socket, &message, SendFlags::NOSIGNAL);
    }
}

struct Nursery {
    /// Where the sockets are; only this user finds them.
    dir: TempDir,
    wards: BTreeMap<String, Ward>,
    /// How many were started, for names of sockets that nobody else has.
    started: u64,
}

impl Nursery {
    fn new() -> io::Result<Self> {
        let place = ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"]
            .into_iter()
            .filter_map(std::env::var_os)
            .map(PathBuf::from)
            .find(|place| place.is_dir())
            .unwrap_or_else(std::env::temp_dir);
        let dir = tempfile::Builder::new()
            .prefix("triarch-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(place)?;
        Ok(Self {
            dir,
            wards: BTreeMap::new(),
            started: 0,
        })
    }

    fn serve(&mut self, socket: BorrowedFd<'_>) {
        let mut buffer = vec![0; message::LARGEST];
        loop {
            let size = match rustix::net::recv(socket, &mut buffer, RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok((_, 0)) | Err(_) => break,
                Ok((_, size)) => size,
            };
            let order = buffer.get(..size).unwrap_or_default();
            let done = match serde_json::from_slice(order) {
                Ok(order) => self.obey(order),
                Err(error) => Answer::Failed(format!("the order makes no sense: {error}")),
            };
            answer(socket, &done);
        }
        // All at once: each may need a while.
        self.wards.values_mut().for_each(Ward::begin_end);
        self.wards.clear();
    }

    fn obey(&mut self, order: Order) -> Answer {
        match order {
            Order::Start {
                id,
                program,
                arguments,
                control,
            } => {
                // One that is there already is of another life of the device.
                self.wards.remove(&id);
                let device = self.dir.path().join(format!("{}.sock", self.started));
                self.started += 1;
                let control = control.then(|| device.with_extension("control"));
                match Ward::start(find(&program), arguments, &device, control.as_deref()) {
                    Ok(ward) => {
                        self.wards.insert(id, ward);
                        Answer::Serves { device, control }
                    }
                    Err(reason) => Answer::Failed(reason),
                }
            }
            Order::Stop { id } => match self.wards.remove(&id) {
                Some(ward) => {
                    drop(ward);
                    Answer::Done
                }
                None => Answer::Failed("it was not started".to_owned()),
            },
        }
    }
}

/// The program beside this one, or by its name where it is looked for.
fn find(program: &str) -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(|dir| dir.join(program));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(program))
}
