//! CPU vendors, features, topology and CPUID as data, and which processors of an ARM guest run. No KVM inside: the same code computes a
//! guest's CPUID on the host and in a test from a recorded table.
//!
//! For migration: a [`GuestProcessor`] says what CPU a guest was given, a [`HostProcessor`] what a host offers; [`compare`] tells whether
//! the one can run on the other, and if not every [`Blocker`] by name, and [`baseline`] what guests can have that are to run on several
//! hosts. What the features are is data, see [`features`].

mod baseline;
mod bounded;
mod compare;
mod cpuid;
pub mod features;
mod listing;
mod processor;
pub mod psci;
#[cfg(test)]
mod tests;
mod topology;
mod vendor;

pub use baseline::{BaselineError, baseline};
pub use compare::{Blocker, Verdict, compare};
pub use cpuid::{CpuidEntry, CpuidTable, GuestCpu, guest_cpuid};
pub use listing::Listing;
pub use processor::{Arm64, DescriptionError, GuestProcessor, Host, HostProcessor, Processor, Signature, X86};
pub use topology::{Topology, TopologyError};
pub use vendor::Vendor;
