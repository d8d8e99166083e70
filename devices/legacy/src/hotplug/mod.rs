//! What comes and goes while a guest runs, as its ACPI code sees it.

mod cpus;
#[cfg(test)]
mod tests;

pub use cpus::{
    CpuHotplug, CpuHotplugConfig, CpuHotplugRestoreError, CpuHotplugStateV1, CpuSlot, CpuSlotStateV1, Removal,
};
