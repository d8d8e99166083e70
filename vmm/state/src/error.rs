//! Why a snapshot could not be written or read.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::MAX_BASES;

/// Why a snapshot could not be written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// There is one already.
    #[error("{} already holds a snapshot; name another directory, or remove what is in it", .0.display())]
    Exists(PathBuf),
    /// Somebody else writes there.
    #[error("another process is writing a snapshot into {}", .0.display())]
    InUse(PathBuf),
    /// There is none.
    #[error("{} holds no snapshot: it has no state.json, which is written last", .0.display())]
    Missing(PathBuf),
    /// The host's file system.
    #[error("cannot {what} {}", .path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A file is larger than any of its kind.
    #[error("{} has more than {limit} bytes", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes it may have.
        limit: u64,
    },
    /// It is something else.
    #[error("state.json is not that of a snapshot of Triarch")]
    Format,
    /// It was changed after it was written.
    #[error("state.json was changed or damaged after it was written: its checksum differs")]
    Damaged,
    /// Another version of the container.
    #[error("the snapshot was written by Triarch {vmm} in format {found}; this version reads formats up to {known}")]
    Version {
        /// The version of the VMM that wrote it.
        vmm: String,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Another processor architecture.
    #[error("the snapshot is of a guest on {found}, this host is {here}")]
    Architecture {
        /// The guest's.
        found: String,
        /// The host's.
        here: String,
    },
    /// `state.json` has another shape.
    #[error("state.json cannot be understood")]
    Document(#[source] serde_json::Error),
    /// The payloads contradict each other.
    #[error("the saved state is invalid")]
    Payloads(#[from] PayloadError),
    /// The memory table contradicts itself, or the guest it is for.
    #[error("the saved memory is invalid: {0}")]
    Memory(String),
    /// Saved memory was changed.
    #[error("the saved memory at {gpa:#x} in {} was changed or damaged after it was written: its checksum differs", .directory.display())]
    MemoryDamaged {
        /// GPA of the chunk.
        gpa: u64,
        /// Whose it is: one that was opened, or one that that builds on.
        directory: PathBuf,
    },
    /// The state of a device was changed.
    #[error("{} was changed or damaged after it was written: its length or checksum differs", .0.display())]
    DeviceDamaged(PathBuf),
    /// One that it builds on is not there, or not fit.
    #[error("the snapshot in {} cannot be followed without the one in {} that it builds on", .of.display(), .base.display())]
    Base {
        /// The one that builds on it.
        of: PathBuf,
        /// Where it should be.
        base: PathBuf,
        /// Cause.
        #[source]
        source: Box<SnapshotError>,
    },
    /// There is another one in its place.
    #[error("{} holds another snapshot by now; put the right one there", .0.display())]
    Other(PathBuf),
    /// It builds on too many.
    #[error("the snapshot in {} builds on more than {MAX_BASES} others; save the guest as a whole", .0.display())]
    Chain(PathBuf),
}

impl SnapshotError {
    /// For use with `map_err`.
    pub(crate) fn host<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl Fn(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Host {
            what,
            path: path.clone(),
            source: source.into(),
        }
    }
}

/// Why saved state could not be taken. `id` is empty where there is one of a kind.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// It is not there.
    #[error("there is no saved state of {}", name(.kind, .id))]
    Missing {
        /// Kind of what it is of.
        kind: String,
        /// Its id.
        id: String,
    },
    /// It is of a version that is not known.
    #[error("the saved state of {} has version {found}; this version of Triarch reads {known}", name(.kind, .id))]
    Version {
        /// Kind of what it is of.
        kind: String,
        /// Its id.
        id: String,
        /// Its version.
        found: u32,
        /// What is read.
        known: u32,
    },
    /// It has another shape.
    #[error("the saved state of {} cannot be understood", name(.kind, .id))]
    Shape {
        /// Kind of what it is of.
        kind: String,
        /// Its id.
        id: String,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// What was sent is none.
    #[error("what was sent as saved state cannot be understood")]
    Sent(#[source] serde_json::Error),
    /// It is there twice.
    #[error("there are two saved states of {}", name(.kind, .id))]
    Twice {
        /// Kind of what it is of.
        kind: String,
        /// Its id.
        id: String,
    },
    /// The guest that it was saved of had what the one to be restored has not.
    #[error("nothing of this guest has the saved state of {0}; its config.json does not fit")]
    Unread(String),
}

/// `serial`, or `virtio-pci _disk0`.
pub(crate) fn name(kind: &str, id: &str) -> String {
    match id {
        "" => kind.to_owned(),
        id => format!("{kind} {id}"),
    }
}
