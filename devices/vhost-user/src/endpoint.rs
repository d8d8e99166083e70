//! Where a daemon is met.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::LinkError;
use crate::connection::Connection;

/// How a connection comes about.
#[derive(Clone)]
pub enum Endpoint {
    /// The daemon listens at this path.
    Connect(PathBuf),
    /// The VMM does, and the daemon connects.
    Accept(Door),
}

/// A listening socket.
#[derive(Clone)]
pub struct Door {
    /// Where daemons find it.
    path: PathBuf,
    /// The socket itself; it does not wait.
    socket: Arc<dyn AsFd + Send + Sync>,
}

impl Endpoint {
    /// Daemons connect to `socket`, which listens at `path` and whose `accept` does not wait. It stays open as long as somebody may accept
    /// on it.
    pub fn accept(path: PathBuf, socket: Arc<dyn AsFd + Send + Sync>) -> Self {
        Self::Accept(Door { path, socket })
    }

    /// A new connection, without waiting for one.
    pub(crate) fn connect(&self) -> Result<Connection, LinkError> {
        match self {
            Self::Connect(path) => Connection::open(path),
            Self::Accept(door) => Connection::accept(door.socket.as_fd(), &door.path),
        }
    }

    /// What becomes readable when a daemon connects.
    pub(crate) fn door(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Connect(_) => None,
            Self::Accept(door) => Some((*door.socket).as_fd()),
        }
    }

    /// How long the start of a VM waits for a daemon. Those that connect look now and then whether somebody listens.
    pub(crate) fn patience(&self) -> Duration {
        match self {
            Self::Connect(_) => Duration::from_secs(5),
            Self::Accept(_) => Duration::from_secs(30),
        }
    }
}

impl From<PathBuf> for Endpoint {
    fn from(path: PathBuf) -> Self {
        Self::Connect(path)
    }
}
