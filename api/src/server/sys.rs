//! The few calls that no safe wrapper offers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::Peer;

/// Who is at the other end of a connected unix socket (SO_PEERCRED, unix(7)). The pid is 0 when this process cannot see the peer's,
/// which rustix's type does not provide for.
pub(super) fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the option's value is a `ucred`, `credentials` is one and lives, and `len` is its size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer {
        pid: credentials.pid.unsigned_abs(),
        uid: credentials.uid,
        gid: credentials.gid,
    })
}

/// Takes over a descriptor that this process inherited; from then on it is closed on exec. An error means there is none of that number.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call only changes a flag, and fails when there is no such descriptor.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open. Whoever started the process says on the command line that it is meant for us, so nothing else
    // in the process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
