//! Slots of a PCI root whose devices come and go.
//!
//! Each slot has a device `Snnn` in the root, with registers of its own (triarch-legacy, `hotplug/pci.rs`) for `_EJ0` and `_OST`; what
//! is in a slot the guest learns from configuration space, so there is no `_STA`. A slot whose device stays has none of it. `SSCN` of the
//! segment's first root takes the notices, and hands on those that are for slots of others.

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

/// Bytes of all registers of `roots` root buses.
pub(super) fn registers_size(roots: usize) -> u64 {
    SLOTS.size(roots * COUNT as usize)
}

/// Handles what the event device reports about the root called `root`.
pub(super) fn scan_method(root: &str) -> String {
    format!("{root}.{}", SLOTS.name("SCN"))
}

/// What the root called `root` has for its slots; it hears of those of the `others`, too, each of which has a number for its first.
pub(super) fn devices(root: &str, slots: &PciSlots, others: &[(String, u32)]) -> Vec<Raw> {
    let removable = (1..COUNT).filter(|slot| slots.fixed >> slot & 1 == 0);
    let removable = removable.map(|slot| slots.first + slot);
    let mut children: Vec<Raw> = removable.clone().map(|slot| device(slot, slots.registers)).collect();
    if slots.first == 0 {
        let hands_on = |(path, first): &(String, u32)| (format!("{path}.{}", SLOTS.name("TFY")), *first);
        let others: Vec<_> = others.iter().map(hands_on).collect();
        children.extend(SLOTS.shared(slots.registers, removable, Some(root), &others));
    } else {
        children.push(SLOTS.pass_on(removable, Some(root), &[]));
    }
    children
}

fn device(slot: u32, registers: u64) -> Raw {
    let mut children = vec![
        // Function 0 of the device.
        Raw::of(&Name::new(Path::new("_ADR"), &((slot % COUNT) << 16))),
        Raw::of(&Name::new(Path::new("_SUN"), &slot)),
    ];
    children.extend(SLOTS.own(registers, slot, true, &[]));
    Raw::of(&Device::new(Path::new(&SLOTS.device_name(slot)), refs(&children)))
}
