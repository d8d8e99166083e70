//! Telling a service manager how the process does (sd_notify(3)).
//!
//! The protocol is one datagram a message. No crate is used for it because a manager that does not read must not make the VMM wait,
//! and because names of sockets have to be looked up anew: a manager that restarts makes another one.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use triarch_api::Phase;

/// The way to the service manager.
pub(crate) struct Notify {
    socket: UnixDatagram,
    address: SocketAddr,
    watchdog: Option<Duration>,
}

impl Notify {
    /// The manager the environment tells of, if any. One that cannot be understood is worth a warning, but no reason not to run.
    pub(crate) fn from_env() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        let open = || -> io::Result<_> {
            let address = address(&name)?;
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        };
        match open() {
            Ok((socket, address)) => {
                let [usec, pid] = ["WATCHDOG_USEC", "WATCHDOG_PID"].map(|name| std::env::var(name).ok());
                let watchdog = watchdog(usec.as_deref(), pid.as_deref(), std::process::id());
                Some(Self {
                    socket,
                    address,
                    watchdog,
                })
            }
            Err(error) => {
                tracing::warn!("NOTIFY_SOCKET={}: {error}", name.display());
                None
            }
        }
    }

    /// How often [`alive`](Self::alive) is due.
    pub(crate) fn alive_every(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The start is over.
    pub(crate) fn ready(&self, phase: Phase) {
        self.send(&format!("READY=1\n{}", status(phase)));
    }

    /// The guest is in another phase.
    pub(crate) fn phase(&self, phase: Phase) {
        self.send(status(phase));
    }

    /// The process is about to end.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=Ending");
    }

    /// The process does its work.
    pub(crate) fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
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

/// Half the time after which the manager takes us for dead, if it watches this process.
fn watchdog(usec: Option<&str>, watched: Option<&str>, pid: u32) -> Option<Duration> {
    if watched.is_some_and(|watched| watched.parse() != Ok(pid)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok()?;
    (usec > 0).then(|| Duration::from_micros((usec / 2).max(1)))
}

fn status(phase: Phase) -> &'static str {
    match phase {
        Phase::Absent => "STATUS=Waiting for vm.create",
        Phase::Created => "STATUS=The VM is created",
        Phase::Running => "STATUS=The guest runs",
        Phase::Paused => "STATUS=The guest is paused",
        Phase::Shutdown => "STATUS=The guest is shut down",
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

    #[test]
    fn the_watchdog_is_fed_twice_a_period_and_only_if_it_is_ours() {
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(watchdog(Some("3000000"), None, 7), ms(1500));
        assert_eq!(watchdog(Some("3000000"), Some("7"), 7), ms(1500));
        assert_eq!(watchdog(Some("3000000"), Some("8"), 7), None);
        assert_eq!(watchdog(Some("1"), None, 7), Some(Duration::from_micros(1)));
        for bad in [None, Some("0"), Some("-1"), Some("soon")] {
            assert_eq!(watchdog(bad, None, 7), None);
        }
    }
}
