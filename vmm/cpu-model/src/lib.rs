//! CPU vendors, topology and CPUID as data, and which processors of an ARM guest run. No KVM inside: the same code computes a
//! guest's CPUID on the host and in a test from a recorded table.

mod cpuid;
pub mod psci;
mod topology;
mod vendor;

pub use cpuid::{CpuidEntry, CpuidTable, GuestCpu, guest_cpuid};
pub use topology::{Topology, TopologyError};
pub use vendor::Vendor;
