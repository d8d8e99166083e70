//! What can go wrong between a client and a VMM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// Why there is no connection; each sentence says what to do.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// ENOENT.
    #[error("there is no such socket; start triarch with --api-socket, or name its socket")]
    Missing,
    /// ECONNREFUSED.
    #[error("nobody listens on it any more, the VMM has ended; start it again")]
    Dead,
    /// EACCES.
    #[error("this user may not use it; ask as the user who started the VMM")]
    Forbidden,
    /// ENOTSOCK and the like.
    #[error("it is no socket that streams; name the one that triarch was started with")]
    NoSocket,
    /// EAGAIN.
    #[error("the VMM does not accept connections at the moment; try again")]
    Busy,
    /// Anything else.
    #[error(transparent)]
    Other(io::Error),
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        use rustix::io::Errno;
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => Self::Missing,
            // What is no socket at all refuses connections, too.
            Some(Errno::CONNREFUSED) => Self::Dead,
            Some(Errno::ACCESS | Errno::PERM) => Self::Forbidden,
            Some(Errno::NOTSOCK | Errno::PROTOTYPE) => Self::NoSocket,
            Some(Errno::AGAIN) => Self::Busy,
            _ => Self::Other(error),
        }
    }
}

/// Why a call failed.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no connection; the request was not sent.
    #[error("cannot connect to {socket}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: ConnectError,
    },
    /// The VMM refused the request, or tried and failed.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The VMM's sentence.
        message: String,
    },
    /// No whole answer in time.
    #[error("{target}: no answer within {}; it may still be carried out", seconds(*.limit))]
    Timeout {
        /// What was asked.
        target: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The connection ended before the answer.
    #[error("{target}: the VMM closed the connection before it answered; it may have ended")]
    Closed {
        /// What was asked.
        target: String,
    },
    /// The connection failed.
    #[error("{target}: the connection failed")]
    Connection {
        /// What was asked.
        target: String,
        /// Why.
        source: io::Error,
    },
    /// The answer is not what a VMM says.
    #[error("{target}: the answer is not that of a VMM: {why}")]
    Malformed {
        /// What was asked.
        target: String,
        /// What is wrong with it.
        why: String,
    },
    /// The answer's body is of another form than expected.
    #[error("{target}: the answer is not understood")]
    Body {
        /// What was asked.
        target: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// What the caller wants to send is no request.
    #[error("{0}")]
    Request(String),
}

impl Error {
    /// Whether there was no answer at all: no connection, or none that lasted.
    pub fn is_unanswered(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. } | Self::Timeout { .. } | Self::Closed { .. } | Self::Connection { .. }
        )
    }
}

fn seconds(time: Duration) -> String {
    match time.as_millis() {
        millis if millis % 1000 == 0 => format!("{} s", millis / 1000),
        millis => format!("{millis} ms"),
    }
}

/// How a connection broke, whatever was asked on it.
#[derive(Debug)]
pub(crate) enum Broken {
    /// It ended; whether something of the answer had come.
    Closed,
    /// Not in time.
    Timeout,
    Failed(io::Error),
    Malformed(String),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // A socket's timeouts are reported as either.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Failed(error),
        }
    }
}

impl Broken {
    /// What the caller is told, who asked `target` and waited for `limit`.
    pub(crate) fn asking(self, target: &str, limit: Duration) -> Error {
        let target = target.to_owned();
        match self {
            Self::Closed => Error::Closed { target },
            Self::Timeout => Error::Timeout { target, limit },
            Self::Failed(source) => Error::Connection { target, source },
            Self::Malformed(why) => Error::Malformed { target, why },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_seconds_where_they_are() {
        assert_eq!(seconds(Duration::from_secs(60)), "60 s");
        assert_eq!(seconds(Duration::from_millis(1500)), "1500 ms");
    }
}
