//! The unix sockets on the host's side.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::VsockError;

/// The longest path a unix socket can have, in bytes.
const MAX_PATH: usize = 107;
/// What `_4294967295` adds to it.
const MAX_SUFFIX: usize = 11;

/// The socket that programs of the host connect to. The file goes when this is dropped.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that only ours is removed.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path`; a socket that nobody listens on any more is replaced.
    pub(super) fn bind(path: &Path) -> Result<Self, VsockError> {
        let path = path.to_owned();
        let failed = |what| {
            let path = path.clone();
            move |source| VsockError::Socket { what, path, source }
        };
        if path.as_os_str().len() + MAX_SUFFIX > MAX_PATH {
            return Err(VsockError::PathTooLong(path));
        }
        if let Ok(there) = fs::symlink_metadata(&path) {
            if !there.file_type().is_socket() {
                return Err(VsockError::NotASocket(path));
            }
            match connect(&path) {
                Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => {
                    fs::remove_file(&path).map_err(failed("remove the stale socket"))?;
                }
                Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                    return Err(failed("find out whether anybody listens on the socket")(error));
                }
                _ => return Err(VsockError::InUse(path)),
            }
        }
        let socket = UnixListener::bind(&path).map_err(failed("listen on the socket"))?;
        let file = fs::symlink_metadata(&path).map_err(failed("look at the socket"))?;
        socket
            .set_nonblocking(true)
            .map_err(failed("make non-blocking the socket"))?;
        Ok(Self {
            socket,
            file: (file.dev(), file.ino()),
            path,
        })
    }

    /// The next connection; [`io::ErrorKind::WouldBlock`] when none waits.
    #[allow(unsafe_code)] // std needs a second call to make it non-blocking, which the sandbox of the thread does not have
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let nobody = std::ptr::null_mut();
        // SAFETY: the two null pointers say that the peer's address is of no interest.
        let fd = unsafe { libc::accept4(self.socket.as_raw_fd(), nobody, std::ptr::null_mut(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Connects to the program that serves port `port` for the guest.
    pub(super) fn connect_port(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|f| (f.dev(), f.ino()) == self.file);
        if ours {
            // What cannot be removed is found stale by the next one.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects without ever waiting: a listener whose backlog is full counts as one that refuses.
#[allow(unsafe_code)] // std has no non-blocking connect
fn connect(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: takes no pointers.
    let fd = unsafe {
        libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeroes is a valid `sockaddr_un`.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is a whole `sockaddr_un` that outlives the call; its path ends with a zero, since it is shorter than the
    // array.
    let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if done == 0 {
        Ok(UnixStream::from(socket))
    } else {
        Err(io::Error::last_os_error())
    }
}
