//! Connections of both sides.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

use crate::address::{Address, AddressError, Resolved};
use crate::stream::{Channel, Interrupt, Plain, Socket, Stream};
use crate::tls::{Begin, Tls, TlsError, TlsFiles};

/// How often whoever waits for a connection looks whether it still shall.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// TLS.
    #[error("cannot begin TLS")]
    Tls(#[from] TlsError),
    /// TLS was left out by accident.
    #[error(
        "{0} needs TLS: give a certificate, its key and the authority's certificate, or write tcp-plain: where nobody else reaches the network"
    )]
    Plain(Address),
    /// TLS was given, and left out by name.
    #[error("{0} is without TLS, but certificates were given; write tcp:")]
    NotPlain(Address),
    /// The host.
    #[error("cannot {what} {address}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// With which address.
        address: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// We were asked to stop.
    #[error("stopped")]
    Stopped,
}

/// How long what may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// A connection with all that is said before it is one: TCP, TLS, first messages.
    pub connect: Duration,
    /// One message, from its first byte to its last.
    pub message: Duration,
    /// Silence of the other side where it should say something, also while it restores a machine. To prepare one it may take longer, by how
    /// much memory it has.
    pub silence: Duration,
    /// What may pass after a session until nobody asks for its outcome, or answers, any more.
    pub outcome: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            message: Duration::from_secs(60),
            silence: Duration::from_secs(60),
            outcome: Duration::from_secs(60),
        }
    }
}

impl Deadlines {
    /// How long somebody whom we do not know yet may keep others waiting.
    pub(crate) fn hello(&self) -> Duration {
        self.connect / 4
    }

    /// How long a destination may take to make a machine with so many bytes of memory, all of which it may have to have before it answers
    /// (prefault). The guest runs meanwhile.
    pub(crate) fn prepare(&self, memory: u64) -> Duration {
        const A_SECOND: u64 = 256 << 20;
        self.silence + Duration::from_secs(memory / A_SECOND)
    }

    /// After how much silence a source that has given its guest away asks what became of it: well before nobody answers any more.
    pub(crate) fn ask(&self) -> Duration {
        self.silence.min(self.outcome / 2)
    }
}

fn host_error<E: Into<io::Error>>(what: &'static str, address: &dyn std::fmt::Display) -> impl Fn(E) -> ConnectError {
    let address = address.to_string();
    move |source| ConnectError::Host {
        what,
        address: address.clone(),
        source: source.into(),
    }
}

/// Whether TLS is as the address says.
fn check_tls(address: &Address, tls: Option<&TlsFiles>) -> Result<(), ConnectError> {
    match (address, tls) {
        (Address::Tcp { plain: false, .. }, None) => Err(ConnectError::Plain(address.clone())),
        (Address::Tcp { plain: true, .. }, Some(_)) => Err(ConnectError::NotPlain(address.clone())),
        _ => Ok(()),
    }
}

/// A socket that is open to one side of a session.
fn begin(
    kind: Plain,
    tls: Option<&Tls>,
    interrupt: &Interrupt,
    within: Duration,
    deadlines: &Deadlines,
) -> Result<Stream, Begin> {
    let mut socket = Socket::new(kind, interrupt.clone()).map_err(Begin::Io)?;
    socket.set_deadline(Instant::now() + within);
    let channel = match tls {
        Some(tls) => tls.begin(socket)?,
        None => Channel::Plain(socket),
    };
    Ok(Stream::new(channel, deadlines.message))
}

/// Connects to a destination, several times.
pub(crate) struct Dialer {
    address: Address,
    resolved: Resolved,
    tls: Option<Tls>,
    pub(crate) deadlines: Deadlines,
}

impl Dialer {
    /// Reads files and resolves names, so that connecting does no such thing.
    pub(crate) fn new(address: &Address, tls: Option<&TlsFiles>, deadlines: Deadlines) -> Result<Self, ConnectError> {
        check_tls(address, tls)?;
        let host = match address {
            Address::Tcp { host, .. } => Some(host.as_str()),
            Address::Unix(_) => None,
        };
        Ok(Self {
            address: address.clone(),
            resolved: address.resolve()?,
            tls: tls.map(|files| Tls::client(files, host)).transpose()?,
            deadlines,
        })
    }

    pub(crate) fn connect(&self, interrupt: &Interrupt) -> Result<Stream, ConnectError> {
        let failed = host_error("connect to", &self.address);
        let kind = match &self.resolved {
            Resolved::Unix(path) => Plain::Unix(self.connect_unix(path).map_err(failed)?),
            Resolved::Tcp(addresses) => Plain::Tcp(self.connect_tcp(addresses).map_err(failed)?),
        };
        let within = self.deadlines.connect;
        begin(kind, self.tls.as_ref(), interrupt, within, &self.deadlines).map_err(|error| match error {
            Begin::Tls(source) => ConnectError::Tls(source),
            Begin::Io(source) => host_error("begin a conversation with", &self.address)(source),
        })
    }

    /// A destination that takes no connections would make a blocking call wait for ever.
    fn connect_unix(&self, path: &Path) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(path)?;
        let end = Instant::now() + self.deadlines.connect;
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            match connect(&socket, &address) {
                Ok(()) => return Ok(socket.into()),
                // Its queue is full.
                Err(Errno::AGAIN) if Instant::now() < end => thread::sleep(Duration::from_millis(50)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn connect_tcp(&self, addresses: &[SocketAddr]) -> io::Result<TcpStream> {
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for address in addresses {
            match TcpStream::connect_timeout(address, self.deadlines.connect) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

enum Listening {
    /// The file is removed in the end.
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// Takes connections of a source.
pub(crate) struct Listener {
    listening: Listening,
    address: Address,
    tls: Option<Tls>,
    pub(crate) deadlines: Deadlines,
}

impl Listener {
    pub(crate) fn bind(address: &Address, tls: Option<&TlsFiles>, deadlines: Deadlines) -> Result<Self, ConnectError> {
        check_tls(address, tls)?;
        let tls = tls.map(Tls::server).transpose()?;
        let failed = host_error("listen on", address);
        let (listening, address) = match address.resolve()? {
            Resolved::Unix(path) => {
                let listener = UnixListener::bind(&path).map_err(&failed)?;
                listener.set_nonblocking(true).map_err(&failed)?;
                (Listening::Unix(listener, path), address.clone())
            }
            Resolved::Tcp(addresses) => {
                let listener = TcpListener::bind(&addresses[..]).map_err(&failed)?;
                listener.set_nonblocking(true).map_err(&failed)?;
                let bound = listener.local_addr().map_err(&failed)?;
                let plain = matches!(address, Address::Tcp { plain: true, .. });
                let address = Address::Tcp {
                    host: bound.ip().to_string(),
                    port: bound.port(),
                    plain,
                };
                (Listening::Tcp(listener), address)
            }
        };
        Ok(Self {
            listening,
            address,
            tls,
            deadlines,
        })
    }

    /// Where it listens, with the port that the kernel chose.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection that is one of whom we expect; `None` when none came until `end`. Those that are of somebody else are
    /// dropped with a line in the log.
    pub(crate) fn accept(&self, interrupt: &Interrupt, end: Option<Instant>) -> Result<Option<Stream>, ConnectError> {
        let failed = host_error("wait for a connection on", &self.address);
        loop {
            if interrupt.is_raised() {
                return Err(ConnectError::Stopped);
            }
            let accepted = match &self.listening {
                Listening::Unix(listener, _) => listener.accept().map(|(socket, _)| Plain::Unix(socket)),
                Listening::Tcp(listener) => listener.accept().map(|(socket, _)| Plain::Tcp(socket)),
            };
            let kind = match accepted {
                Ok(kind) => kind,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if end.is_some_and(|end| Instant::now() >= end) {
                        return Ok(None);
                    }
                    self.wait()
                        .map_err(host_error("wait for a connection on", &self.address))?;
                    continue;
                }
                // Whoever knocked is gone again.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(failed(error)),
            };
            match begin(
                kind,
                self.tls.as_ref(),
                interrupt,
                self.deadlines.hello(),
                &self.deadlines,
            ) {
                Ok(stream) => return Ok(Some(stream)),
                Err(Begin::Tls(error)) => tracing::warn!("a connection for a migration was refused: {error}"),
                Err(Begin::Io(error)) => tracing::warn!("a connection for a migration did not begin: {error}"),
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = [match &self.listening {
            Listening::Unix(listener, _) => PollFd::new(listener, PollFlags::IN),
            Listening::Tcp(listener) => PollFd::new(listener, PollFlags::IN),
        }];
        match poll(&mut fds, Some(&TICK)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listening::Unix(_, path) = &self.listening {
            let _ = rustix::fs::unlink(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_that_takes_no_connection_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let _listens = UnixListener::bind(&path).expect("listens");
        let deadlines = Deadlines {
            connect: Duration::from_millis(200),
            ..Deadlines::default()
        };
        let dialer = Dialer::new(&Address::Unix(path), None, deadlines).expect("an address");
        // Nobody accepts: at some time the queue is full.
        let taken: Vec<_> = (0..10_000)
            .map_while(|_| dialer.connect(&Interrupt::default()).ok())
            .collect();
        assert!(!taken.is_empty() && taken.len() < 10_000, "{} connections", taken.len());
    }
}
