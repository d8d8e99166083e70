//! What differs between processor architectures, behind the same names.
//!
//! Each architecture exports: [`layout`] (the guest's address map), [`Platform`] (interrupt controller and what else a VM needs
//! before its vCPUs), [`CpuPlan`], [`create_vcpus`] and [`create_later`], [`host_processor`] (what CPUs guests can have here), [`saved_processor`] (what CPU a saved guest has), [`set_entry`] (registers of the first vCPU), [`inject_nmi`], [`Board`] (the
//! devices that sit at fixed places), [`save_vcpu`] and its kin (see [`StateError`] for all of the saved state), [`load`] (kernel and firmware tables), and in [`WITHOUT_KVM`] what a host without KVM needs, in
//! [`CPU_HOTPLUG_NEEDS`] what a guest needs that gets CPUs while it runs. No
//! other crate asks which architecture it is built for.

mod common;
mod starts;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;
pub use common::load::LoadError;
pub use common::state::{Elapsed, HexBytes, StateError, check_processor};
pub use common::{AddressLimit, BoardConfig, BoardError, CpuCount, LoadConfig, NmiError, Numa, Vcpus, pci_wire};
pub use triarch_tables::acpi::{MemoryAffinity, NumaNode, PciIommu};

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
