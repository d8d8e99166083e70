//! Opening a console.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64};

use thiserror::Error;
use triarch_device_core::RateLimit;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::channel::Channel;
use super::port::{INPUT, Peer, Port};
use super::terminal::RawMode;
use super::{Backend, Console, sys};

/// Why a console could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// An event descriptor could not be made.
    #[error("cannot make the console's event descriptors")]
    Events(#[source] io::Error),
    /// stdin or stdout cannot be used.
    #[error("cannot use the terminal")]
    Terminal(#[source] io::Error),
    /// No pseudo-terminal could be made.
    #[error("cannot make a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// The output file cannot be written.
    #[error("cannot write the console to {}; give a file in a directory that exists and may be written", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Another process listens at the path.
    #[error("another process listens on the socket {}; stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something else is at the path.
    #[error("{} exists and is no socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The socket cannot be listened on.
    #[error("cannot listen for console clients at {}; give a short path in a directory that exists and may be written", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl Console {
    /// Opens `backend`. The terminal is in raw mode until the console is dropped or the process ends.
    pub fn open(backend: &Backend) -> Result<Self, OpenError> {
        let epoll = Epoll::new().map_err(OpenError::Events)?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(OpenError::Events)?;
        add(&epoll, &wake, EventSet::IN | EventSet::EDGE_TRIGGERED).map_err(OpenError::Events)?;
        let (peer, path) = match backend {
            Backend::Null | Backend::Off => (Peer::Null, None),
            Backend::Tty => (terminal(&epoll).map_err(OpenError::Terminal)?, None),
            Backend::Pty => pty(&epoll).map_err(OpenError::Pty)?,
            Backend::File(path) => {
                let peer = file(path).map_err(|source| OpenError::File {
                    path: path.clone(),
                    source,
                })?;
                (peer, Some(path.clone()))
            }
            Backend::Socket(path) => {
                let peer = socket(&epoll, path).map_err(|source| socket_error(path, source))?;
                (peer, Some(path.clone()))
            }
        };
        let console = Self {
            epoll,
            wake,
            port: Mutex::new(Port::new(peer)),
            path,
            starved: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            log: RateLimit::default(),
        };
        // A file on stdin gives no events, and what is already there is worth a look.
        console.wake();
        Ok(console)
    }
}

fn add(epoll: &Epoll, fd: &impl AsRawFd, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, 0))
}

fn terminal(epoll: &Epoll) -> io::Result<Peer> {
    let output = Channel::inherit(&sys::STDOUT, true)?;
    let input = Channel::inherit(&sys::STDIN, false)?;
    match add(epoll, &input.as_fd(), INPUT) {
        // A regular file or /dev/null: always ready, so the first look at it reads it.
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
        other => other?,
    }
    sys::ignore_background_reads();
    Ok(Peer::Stream {
        input: Some(input),
        output: Some(output),
        terminal: sys::attributes(sys::STDIN).is_ok(),
        _raw: RawMode::enter()?,
    })
}

fn pty(epoll: &Epoll) -> io::Result<(Peer, Option<PathBuf>)> {
    let (master, slave, path) = sys::open_pty()?;
    // Line discipline is the guest's business: an echo here would come back as its input.
    let mut attributes = sys::attributes(slave.as_fd())?;
    sys::fully_raw(&mut attributes);
    sys::set_attributes(slave.as_fd(), &attributes)?;
    // Only a slave that was open once and closed counts as hung up.
    drop(slave);
    add(epoll, &master, INPUT)?;
    Ok((Peer::Pty(Channel::Direct(master)), Some(path)))
}

fn file(path: &Path) -> io::Result<Peer> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    // A named pipe is opened for reading too: that works before its reader comes, and outlasts it.
    match fs::metadata(path) {
        Ok(found) if found.file_type().is_fifo() => options.read(true),
        _ => options.create(true).truncate(true),
    };
    Ok(Peer::Stream {
        input: None,
        output: Some(Channel::Direct(options.open(path)?)),
        terminal: false,
        _raw: None,
    })
}

fn socket(epoll: &Epoll, path: &Path) -> io::Result<Peer> {
    let listener = match UnixListener::bind(path) {
        // The socket of a process that was killed; one that still listens is left alone.
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && abandoned(path) => {
            sys::remove(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    listener.set_nonblocking(true)?;
    add(epoll, &listener, INPUT)?;
    Ok(Peer::Socket {
        listener,
        client: None,
        path: path.to_owned(),
    })
}

fn socket_error(path: &Path, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match fs::metadata(&path) {
        _ if source.kind() != io::ErrorKind::AddrInUse => OpenError::Socket { path, source },
        Ok(found) if !found.file_type().is_socket() => OpenError::NotASocket(path),
        _ => OpenError::InUse(path),
    }
}

fn abandoned(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}
