//! Why there is no connection to a daemon.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::message::Request;

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

impl Request {
    /// The protocol's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GET_FEATURES => "GET_FEATURES",
            Self::SET_FEATURES => "SET_FEATURES",
            Self::SET_OWNER => "SET_OWNER",
            Self::SET_MEM_TABLE => "SET_MEM_TABLE",
            Self::SET_LOG_BASE => "SET_LOG_BASE",
            Self::SET_VRING_NUM => "SET_VRING_NUM",
            Self::SET_VRING_ADDR => "SET_VRING_ADDR",
            Self::SET_VRING_BASE => "SET_VRING_BASE",
            Self::GET_VRING_BASE => "GET_VRING_BASE",
            Self::SET_VRING_KICK => "SET_VRING_KICK",
            Self::SET_VRING_CALL => "SET_VRING_CALL",
            Self::GET_PROTOCOL_FEATURES => "GET_PROTOCOL_FEATURES",
            Self::SET_PROTOCOL_FEATURES => "SET_PROTOCOL_FEATURES",
            Self::GET_QUEUE_NUM => "GET_QUEUE_NUM",
            Self::SET_VRING_ENABLE => "SET_VRING_ENABLE",
            Self::SEND_RARP => "SEND_RARP",
            Self::NET_SET_MTU => "NET_SET_MTU",
            Self::SET_BACKEND_REQ_FD => "SET_BACKEND_REQ_FD",
            Self::GET_CONFIG => "GET_CONFIG",
            Self::SET_CONFIG => "SET_CONFIG",
            Self::GET_INFLIGHT_FD => "GET_INFLIGHT_FD",
            Self::SET_INFLIGHT_FD => "SET_INFLIGHT_FD",
            Self::RESET_DEVICE => "RESET_DEVICE",
            Self::GET_MAX_MEM_SLOTS => "GET_MAX_MEM_SLOTS",
            Self::ADD_MEM_REG => "ADD_MEM_REG",
            Self::REM_MEM_REG => "REM_MEM_REG",
            Self::SET_STATUS => "SET_STATUS",
        }
    }
}
