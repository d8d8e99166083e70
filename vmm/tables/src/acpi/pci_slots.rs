//! Slots of a PCI root whose devices come and go.
//!
//! Each slot has a device `Snnn` in the root, with registers of its own (triarch-legacy, `hotplug/pci.rs`) for `_EJ0` and `_OST`; what
//! is in a slot the guest learns from configuration space, so there is no `_STA`. A slot whose device stays has none of it. `SSCN` of the
//! root takes the notices.

use acpi_tables::aml::{Device, Name, Path};

use super::config::PciSlots;
use super::dsdt::{Raw, refs};
use super::slots::Slots;

/// Slots of a bus. The first is the host bridge.
const COUNT: u32 = 32;
/// Their registers.
const SLOTS: Slots = Slots {
    letter: 'S',
    stride: 0x10,
};

/// Bytes of all registers.
pub(super) fn registers_size() -> u64 {
    SLOTS.size(COUNT as usize)
}

/// Handles what the event device reports about the root called `root`.
pub(super) fn scan_method(root: &str) -> String {
    format!("{root}.{}", SLOTS.name("SCN"))
}

/// What the root called `root` has for its slots.
pub(super) fn devices(root: &str, slots: &PciSlots) -> Vec<Raw> {
    let removable = (1..COUNT).filter(|slot| slots.fixed >> slot & 1 == 0);
    let mut children: Vec<Raw> = removable.clone().map(|slot| device(slot, slots.registers)).collect();
    children.extend(SLOTS.shared(slots.registers, removable, Some(root)));
    children
}

fn device(slot: u32, registers: u64) -> Raw {
    let mut children = vec![
        // Function 0 of the device.
        Raw::of(&Name::new(Path::new("_ADR"), &(slot << 16))),
        Raw::of(&Name::new(Path::new("_SUN"), &slot)),
    ];
    children.extend(SLOTS.own(registers, slot, true, &[]));
    Raw::of(&Device::new(Path::new(&SLOTS.device_name(slot)), refs(&children)))
}
