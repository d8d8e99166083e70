//! What the commands do.

pub mod blk;
pub mod dimm;
pub mod hotplug;
pub mod iommu;
pub mod memory;
pub mod net;
mod notices;
pub mod pci;
pub mod plug;
pub mod rings;
pub mod root_port;
pub mod slots;
pub mod small;
pub mod system;
pub mod vsock;
