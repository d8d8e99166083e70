//! What comes and goes while a guest runs, as its ACPI code sees it.

mod cpus;
mod memory;
mod pci;
mod registers;
#[cfg(test)]
mod tests;

pub use cpus::{
    CpuHotplug, CpuHotplugConfig, CpuHotplugRestoreError, CpuHotplugStateV1, CpuSlot, CpuSlotStateV1, Removal,
};
pub use memory::{
    MemoryHotplug, MemoryHotplugRestoreError, MemoryHotplugStateV1, MemoryPlace, MemorySlot, MemorySlotStateV1,
};
pub use pci::{PCI_SLOTS, PciHotplug, PciHotplugRestoreError, PciHotplugStateV1, PciSlot, PciSlotStateV1};
pub use registers::Notice;
