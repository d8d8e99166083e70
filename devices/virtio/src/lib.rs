//! virtio 1.2: rings, the PCI transport and the devices.
//!
//! A device implements [`VirtioDevice`] and works on [`VirtQueue`]s; it sees neither the transport nor the layout of a ring, so
//! that packed rings and other transports touch no device. One directory per device.

pub mod balloon;
mod block;
#[allow(unsafe_code)] // host pointers into guest memory for vectored I/O
mod chain;
mod config_listener;
mod console;
mod device;
mod dma;
pub mod iommu;
pub mod mem;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
mod names;
pub mod net;
mod queue;
mod rng;
mod transport;
pub mod vsock;
mod wait;

pub use block::{
    Block, BlockError, BlockHandle, BlockStateV1, LookCounters, MAX_BLOCK_QUEUES, ResizeError, block_feature,
};
pub use chain::{Chain, ChainReader, ChainWriter, Segment, iovecs, mark_written};
pub use console::{ConsoleResizer, VirtioConsole};
pub use device::{ActivateError, DeviceContext, DeviceId, VirtioDevice, VirtioInterrupt, feature, read_config_bytes};
pub use dma::DeviceMemory;
pub use names::feature_names;
pub use queue::{InflightQueue, QueueLayout, QueueStateV1, RingFault, VirtQueue};
pub use rng::{EntropySource, SourceError, VirtioRng};
pub use transport::{DeviceEvent, Observer, RestoreError, SaveError, VirtioPci, VirtioPciQueueV1, VirtioPciStateV1};
