//! What the API and the command line speak: configuration of a VM, in the field set of Cloud Hypervisor's API (v51-v53).
//!
//! Plain data without any dependency on the VMM. Unknown fields are ignored, as agents expect; sizes are bytes.
//!
//! [`server`] speaks it over HTTP; whoever owns the VM gives it a [`Handler`].

mod answer;
pub mod audit;
mod backend;
mod balloon;
mod config;
mod cpu_features;
mod datapath;
pub mod events;
pub mod flags;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod jobs;
mod memory;
pub mod metrics;
mod migration;
mod numa;
#[cfg(feature = "openapi")]
pub mod openapi;
mod operation;
mod passthrough;
mod platform;
mod reader;
mod request;
mod served;
pub mod server;
mod size;
mod slot;
mod snapshot;
mod strict;
mod validate;
mod zones;

pub use answer::{Answer, Handler};
pub use backend::{DiskBackend, NetBackend};
pub use balloon::BalloonConfig;
pub use config::{
    ConsoleConfig, ConsoleMode, CpuTopology, CpusConfig, DebugConsoleConfig, DiskConfig, HugePageSize, ImageType,
    MacAddress, MemoryConfig, NetConfig, PayloadConfig, RngConfig, VmConfig, VsockConfig,
};
pub use cpu_features::{CpuDescription, CpuFeatures, CpuSignature};
pub use datapath::DataPath;
pub use memory::{HotplugMethod, MemoryCounts};
pub use migration::{
    CheckMigration, MigrationBlocker, MigrationCheck, MigrationPart, MigrationPhase, MigrationProgress, MigrationSide,
    MigrationTls, ReceiveMigration, SendMigration, SetMigration, TimeoutStrategy, lay_over,
};
pub use numa::{NumaConfig, NumaDistance};
pub use operation::{Operation, Phase};
pub use passthrough::DeviceConfig;
pub use platform::PlatformConfig;
pub use reader::{ReadError, read_object};
pub use request::{
    AddedDevice, ApiError, DeviceLink, DeviceNode, DeviceTree, LinkPath, LinkState, RemoveDevice, Reply, Request,
    Resize, ResizeDisk, VcpuCounts, VmInfo, chain,
};
pub use served::{FsConfig, GenericVhostUserConfig, OnDisconnect, VhostMode};
pub use size::{SizeError, parse_size};
pub use slot::SlotAddress;
pub use snapshot::{RestoreClock, RestoreConfig, RestoreMode, RestoredNet, SnapshotConfig};
pub use validate::ConfigError;
pub use zones::{MemoryZoneConfig, ResizeZone, ZoneCounts};
