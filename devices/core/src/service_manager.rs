//! Telling a service manager how the process does (sd_notify(3)).
//!
//! The protocol is one datagram a message. No crate is used for it because a manager that does not read must not make anybody wait, and
//! because names of sockets have to be looked up anew: a manager that restarts makes another one.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The way to the service manager.
pub struct ServiceManager {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl ServiceManager {
    /// The manager the environment tells of (`NOTIFY_SOCKET`), if any. One that cannot be understood is worth a warning, but no reason
    /// not to run.
    pub fn from_env() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        let open = || -> io::Result<_> {
            let address = address(&name)?;
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok(Self { socket, address })
        };
        match open() {
            Ok(manager) => Some(manager),
            Err(error) => {
                tracing::warn!("NOTIFY_SOCKET={}: {error}", name.display());
                None
            }
        }
    }

    /// Sends a message: assignments like `READY=1`, one a line. A manager that does not take it is not waited for.
    pub fn send(&self, message: &str) {
        if let Err(error) = self.socket.send_to_addr(message.as_bytes(), &self.address) {
            tracing::debug!("cannot notify the service manager: {error}");
        }
    }
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(name),
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        _ => Err(io::Error::other("it is neither a path nor an abstract name like @name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_names_are_understood() {
        let path = address(OsStr::new("/run/notify")).expect("a path");
        assert_eq!(path.as_pathname(), Some(std::path::Path::new("/run/notify")));
        let hidden = address(OsStr::new("@/org/x")).expect("an abstract name");
        assert_eq!(hidden.as_abstract_name(), Some(&b"/org/x"[..]));
        for bad in ["vsock:2:1", "notify", &format!("/{}", "a".repeat(200))] {
            address(OsStr::new(bad)).expect_err(bad);
        }
    }
}
