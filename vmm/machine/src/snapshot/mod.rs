//! Guests that are saved, and guests that continue from what was saved.
//!
//! Each part saves itself as a payload of a kind and version of its own; [`Machine`](crate::Machine) gathers them. A guest is restored
//! by the same assembly that boots one, with [`Saved`] as its origin.

mod devices;
mod hosts;
mod log;
mod machine;
mod memory;
mod meters;
mod pager;
mod request;

pub(crate) use devices::{FunctionPlaceV1, PciStateV1, SavedDevices, save as save_function};
pub(crate) use hosts::save as save_host;
pub(crate) use log::WriteLog;
pub(crate) use machine::Saved;
pub(crate) use meters::SnapshotMeters;
pub(crate) use pager::{Coming, Pager};
pub(crate) use request::{WantedV1, saved_config, take_taps};

use triarch_state::Kind;

/// What processors are made from.
const CPUS: Kind = Kind::new("cpus", 1);
/// Which processors run.
const FIRMWARE: Kind = Kind::new("firmware", 1);
/// A vCPU, by its index.
const VCPU: Kind = Kind::new("vcpu", 1);
/// Interrupt controllers and clocks.
const PLATFORM: Kind = Kind::new("platform", 1);
/// Devices at fixed places.
const BOARD: Kind = Kind::new("board", 1);
/// The PCI bus.
const PCI: Kind = Kind::new("pci", 1);
/// What clients wanted that the guest has not done yet.
pub(crate) const WANTED: Kind = Kind::new("wanted", 1);
