//! How a driver reaches a device.

mod pci;

pub use pci::{DeviceEvent, Observer, RestoreError, SaveError, VirtioPci, VirtioPciQueueV1, VirtioPciStateV1};
