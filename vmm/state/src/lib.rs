//! Snapshots of a guest: a directory that an operator can look into, and that is never half of one.
//!
//! | file | what it holds |
//! |---|---|
//! | `config.json` | the VM's configuration; may be edited before a restore: sockets, taps, paths of disks |
//! | `memory-ranges` | guest memory, region after region, or those pages of it that were written since another snapshot; zero pages are holes |
//! | `device-N` | what a device of the host is that only its driver understands |
//! | `state.json` | everything else, and where in `memory-ranges` which memory is; written last, so that it is there or not |
//!
//! Saved state is a set of [`Payloads`], each of a [`Kind`] that has a version, for the one device of a kind or for the one called `id`.
//! A reader takes those it knows; one that nobody took is an error, as is one of a version that is not known.
//!
//! Nothing in the files is trusted: their sizes are bounded before anything is allocated, and what contradicts itself is refused.

mod chain;
mod devices;
mod document;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod message;
mod pages;
mod payload;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use chain::{Base, MAX_BASES, SavedMemory};
pub use devices::{DeviceFile, DeviceFiles};
pub use document::MemoryRange;
pub use error::{PayloadError, SnapshotError};
pub use pages::{CHUNK, Pages, filled};
pub use payload::{Kind, Payloads};
pub use read::Snapshot;
pub use write::{About, Part, SnapshotWriter, Source};

/// The VM's configuration.
pub const CONFIG: &str = "config.json";
/// Guest memory.
pub const MEMORY: &str = "memory-ranges";
/// Everything else.
pub const STATE: &str = "state.json";
/// [`STATE`] while it is written.
const UNFINISHED_STATE: &str = "state.json.tmp";

/// Bytes of a page: memory is kept, and left out, in these.
pub const PAGE: u64 = 4096;
/// Version of the container. It changes when a reader of this one would not understand what is written.
pub const VERSION: u32 = 2;
/// That of a snapshot which has nothing to do with others: readers of the first version understand it.
const VERSION_OF_ONE: u32 = 1;

/// Most bytes of a configuration.
const MAX_CONFIG: u64 = 16 << 20;
/// Most bytes of `state.json`: the checksums of 16 TiB of memory, and a few thousand devices.
const MAX_STATE: u64 = 256 << 20;
