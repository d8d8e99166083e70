//! ACPI, SMBIOS and EFI tables: plain configuration in, bytes for guest memory out.
//!
//! Nothing here knows a device or a hypervisor. [`acpi::build`] and [`smbios::build`] return bytes together with the
//! guest physical addresses they were made for; the caller writes them there and reserves the ranges in the memory map.

pub mod acpi;
pub mod efi;
pub mod smbios;
