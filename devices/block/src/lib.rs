//! Disk engine: raw files and block devices behind asynchronous I/O queues.
//!
//! The engine knows nothing of virtio, so the VMM's own disks and the storage daemon share it. A [`Disk`] is
//! opened once and locked against a second writer; each user makes an [`IoQueue`] of its own from it:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use triarch_block::{Disk, DiskOptions, Op};
//!
//! let disk = Disk::open(&DiskOptions::new("/var/lib/images/disk.raw"))?;
//! let mut queue = disk.queue(0, 128)?;
//! queue.submit(&Op::Flush, 7)?;
//! queue.kick()?;
//! // ... wait until queue.completion_fd() is readable ...
//! queue.completions(&mut |tag, result| println!("{tag}: {result:?}"));
//! # Ok(())
//! # }
//! ```
//!
//! After warm-up nothing is allocated per operation. What a guest asks for never makes the engine grow past fixed
//! bounds: operations in flight (the queue's depth), vectors (what the operations hold) and
//! bounce buffers (1 MiB a queue, only with direct I/O and badly aligned buffers).

mod buffer;
mod disk;
mod error;
mod geometry;
mod job;
mod metrics;
mod queue;
mod sync;
mod sys;
mod throttle;
mod uring;

pub use buffer::IoBuf;
pub use disk::{Backend, Disk, DiskOptions, MAX_DEPTH, SERIAL_LEN};
pub use error::{GrowError, OpenError, QueueError};
pub use geometry::Geometry;
pub use metrics::{DiskCounters, DiskMetrics, OpCounters};
pub use queue::{Full, IoQueue, OnCompletion, Op};
pub use throttle::{Limits, Rate};
