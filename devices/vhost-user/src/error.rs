//! Why there is no connection to a daemon.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a connection to a daemon could not be made, or ended. Its text is whole: causes are told in it, since it goes to clients as a reason.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Nobody listens.
    #[error("cannot connect to {path}: {cause}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Cause.
        cause: io::Error,
    },
    /// Nobody connected.
    #[error("no daemon has connected to {0}")]
    Nobody(PathBuf),
    /// The daemon closed the connection, or died.
    #[error("the daemon closed the connection")]
    Closed,
    /// No answer in time.
    #[error("the daemon did not answer {0} in time")]
    Silent(&'static str),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    /// The daemon said what the protocol does not allow.
    #[error("the daemon does not keep to the protocol: {0}")]
    Nonsense(String),
    /// The daemon answered that it did not do it.
    #[error("the daemon failed {0}")]
    Failed(&'static str),
    /// The daemon is not one the guest can go on with.
    #[error("the daemon was refused: {0}")]
    Unfit(String),
    /// A resource of the host.
    #[error("cannot make {what}: {cause}")]
    Host {
        /// What could not be made.
        what: &'static str,
        /// Cause.
        cause: io::Error,
    },
    /// It has a part of a state, or does not go on with one.
    #[error("the transfer of its state failed: {0}")]
    State(String),
    /// Something more urgent came.
    #[error("the connection was given up for a change of the guest's device")]
    Interrupted,
}

impl LinkError {
    pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |cause| Self::Host { what, cause }
    }

    pub(crate) fn nonsense(text: impl Into<String>) -> Self {
        Self::Nonsense(text.into())
    }
}
