//! The socket clients connect to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use thiserror::Error;

use super::sys;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why there is no socket to listen on.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Somebody serves this path.
    #[error("another process listens on {0}; give this VM a socket of its own")]
    InUse(PathBuf),
    /// The path leads to something of value.
    #[error("{0} exists and is no socket; remove it or choose another path")]
    NoSocket(PathBuf),
    /// It could not be made.
    #[error("cannot {what} {path}")]
    Make {
        /// What failed.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor does not exist.
    #[error("descriptor {fd} was not inherited")]
    Inherit {
        /// Its number.
        fd: RawFd,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is something else.
    #[error("descriptor {0} is not a listening unix stream socket")]
    NotListening(RawFd),
}

/// A listening unix socket. A path it was made at is removed with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: Option<Place>,
    /// Its path stays when it is gone.
    left: Arc<AtomicBool>,
}

/// What another process needs to listen in this one's place.
#[derive(Debug)]
pub struct Passage {
    /// The same socket once more.
    pub socket: OwnedFd,
    /// The path it was made at, if this process made it.
    pub path: Option<PathBuf>,
    left: Arc<AtomicBool>,
}

impl Passage {
    /// The other process listens, and removes the path when it ends: this one will not.
    pub fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }

    /// It is this process that removes the path in the end, after all.
    pub fn own(&self) {
        self.left.store(false, Ordering::Relaxed);
    }
}

/// A path, and which file we made there.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Makes a socket at `path` that only this user can connect to (mode 0600). A socket there that nobody listens on is what a killed
    /// process left, and is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |what| {
            let path = path.to_owned();
            move |source: io::Error| ListenError::Make { what, path, source }
        };
        let address = SocketAddrUnix::new(path).map_err(|e| failed("make a socket at")(e.into()))?;
        remove_stale(path, &address)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| failed("make a socket for")(e.into()))?;
        // The mode of the socket becomes the mode of its file, less the umask, so nobody finds it wider than this. Where the kernel
        // does not do that, it is changed before anybody can connect.
        let _ = rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR);
        rustix::net::bind(&socket, &address).map_err(|e| failed("make a socket at")(e.into()))?;
        let file = fs::symlink_metadata(path).map_err(failed("find the new socket"))?;
        let listener = Self {
            socket,
            path: Some(Place {
                path: path.to_owned(),
                device: file.dev(),
                inode: file.ino(),
            }),
            left: Arc::default(),
        };
        if file.mode() & 0o777 != 0o600 {
            let mode = fs::Permissions::from_mode(0o600);
            fs::set_permissions(path, mode).map_err(failed("set the mode of"))?;
        }
        rustix::net::listen(&listener.socket, BACKLOG).map_err(|e| failed("listen on")(e.into()))?;
        Ok(listener)
    }

    /// Takes over a listening unix socket this process inherited as descriptor `fd`. Its mode and its path are the business of
    /// whoever made it.
    pub fn inherit(fd: RawFd) -> Result<Self, ListenError> {
        let socket = sys::inherited(fd).map_err(|source| ListenError::Inherit { fd, source })?;
        let unix_stream = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !unix_stream || sockopt::socket_acceptconn(&socket) != Ok(true) {
            // It is not ours to close, then.
            std::mem::forget(socket);
            return Err(ListenError::NotListening(fd));
        }
        let flags = rustix::fs::fcntl_getfl(&socket);
        flags
            .and_then(|flags| rustix::fs::fcntl_setfl(&socket, flags | OFlags::NONBLOCK))
            .map_err(|e| ListenError::Inherit { fd, source: e.into() })?;
        Ok(Self {
            socket,
            path: None,
            left: Arc::default(),
        })
    }

    /// For another process, which is to listen in this one's place.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn passage(&self) -> io::Result<Passage> {
        Ok(Passage {
            socket: self.socket.try_clone()?,
            path: self.path.as_ref().map(|place| place.path.clone()),
            left: self.left.clone(),
        })
    }

    /// Another process listens now, and removes the path when it ends: this one will not.
    pub fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }

    /// It is this process that removes the path in the end.
    pub fn own(&self) {
        self.left.store(false, Ordering::Relaxed);
    }

    /// Takes a socket over that another process listens on, at `path` if it is to be removed in the end: by the other process, until
    /// this one is told that it [owns](Self::own) it.
    pub fn adopt(socket: OwnedFd, path: Option<PathBuf>) -> Self {
        let place = path.and_then(|path| {
            let file = fs::symlink_metadata(&path).ok()?;
            Some(Place {
                path,
                device: file.dev(),
                inode: file.ino(),
            })
        });
        Self {
            socket,
            path: place,
            left: Arc::new(AtomicBool::new(true)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(place) = &self.path else { return };
        if self.left.load(Ordering::Relaxed) {
            return;
        }
        // Somebody may have put another one there meanwhile.
        let ours =
            fs::symlink_metadata(&place.path).is_ok_and(|file| (file.dev(), file.ino()) == (place.device, place.inode));
        if ours && let Err(error) = rustix::fs::unlinkat(CWD, &place.path, AtFlags::empty()) {
            tracing::warn!("cannot remove {}: {error}", place.path.display());
        }
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => return Err(ListenError::NoSocket(path.to_owned())),
        Ok(_) => {}
        // Whatever else is wrong with the path, making the socket tells.
        Err(_) => return Ok(()),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let attempt = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|socket| rustix::net::connect(&socket, address));
    // Only this error says that nobody listens: a busy listener lets us wait, a foreign one forbids it.
    if attempt != Err(rustix::io::Errno::CONNREFUSED) {
        return Err(ListenError::InUse(path.to_owned()));
    }
    rustix::fs::unlinkat(CWD, path, AtFlags::empty()).map_err(|e| ListenError::Make {
        what: "remove the abandoned socket",
        path: path.to_owned(),
        source: e.into(),
    })
}
