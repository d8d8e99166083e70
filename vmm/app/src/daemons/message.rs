//! What VMM and nursery tell each other: one JSON text a datagram.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Bytes of the largest message: paths and a reason.
pub(crate) const LARGEST: usize = 64 << 10;

/// What the VMM wants.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// A daemon, which finds its listening socket as descriptor 3, and the one for orders, if it takes any, as descriptor 4.
    Start {
        /// The device it serves.
        id: String,
        /// Name of the program's file.
        program: String,
        /// Its arguments.
        arguments: Vec<String>,
        /// It takes orders.
        control: bool,
    },
    /// The end of a daemon.
    Stop {
        /// The device it serves.
        id: String,
    },
}

/// What became of an order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The daemon serves.
    Serves {
        /// Where it serves the device.
        device: PathBuf,
        /// Where it takes orders, if it was to.
        control: Option<PathBuf>,
    },
    /// It is done.
    Done,
    /// It is not; the reason, in a sentence.
    Failed(String),
}
