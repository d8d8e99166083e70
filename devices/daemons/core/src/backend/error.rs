//! Why a session ends.

use thiserror::Error;
use triarch_virtio::{ActivateError, RingFault};

use super::channel::ChannelError;
use super::dirty::LogError;
use super::inflight::InflightError;
use super::memory::MemoryError;

/// Why a request, or a connection, failed.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The connection.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A request is none, or not now.
    #[error("{request}: {what}")]
    Request {
        /// Its name or number.
        request: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The log.
    #[error("cannot map the log of written pages")]
    Log(#[source] LogError),
    /// The inflight region.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// A ring cannot be used.
    #[error("ring {index} cannot be used")]
    Ring {
        /// Its number.
        index: u16,
        /// Why.
        #[source]
        source: RingFault,
    },
    /// The device refuses.
    #[error("the device cannot start")]
    Device(#[from] ActivateError),
    /// A descriptor that came is unusable.
    #[error("a descriptor of {request} is unusable")]
    Descriptor {
        /// The request's name.
        request: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
