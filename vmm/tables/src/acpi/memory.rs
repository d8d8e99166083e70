//! Memory devices that come and go.
//!
//! Each is a slot of `slots.rs` in `\_SB.MHPC`, whose registers (triarch-legacy, `hotplug/memory.rs`) also tell where its memory is.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, CreateQWordField, Device, EISAName, Local, ONE, Or, Path,
    ResourceTemplate, Return, ShiftLeft, Store, Subtract, ZERO,
};

use super::dsdt::{Raw, name, refs};
use super::slots::{Slots, method, serialized};

/// Handles what the event device reports about memory.
pub(super) const SCAN: &str = "\\_SB_.MHPC.MSCN";

/// Their registers.
const SLOTS: Slots = Slots {
    letter: 'M',
    stride: 0x20,
};
/// What a slot has beside the registers of all slots: address and size, lower and upper half.
const PLACE: [&str; 4] = ["BAL", "BAH", "SZL", "SZH"];
/// Offsets in a QWORD address space descriptor (ACPI 6.4.3.5.1): lowest and highest address, length.
const MINIMUM: u8 = 14;
const MAXIMUM: u8 = 22;
const LENGTH: u8 = 38;

/// Where memory comes and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlots {
    /// Address of the registers.
    pub registers: u64,
    /// How many slots there are, 4096 at most.
    pub count: u32,
}

impl MemorySlots {
    /// Bytes of all registers.
    pub(super) fn registers_size(&self) -> u64 {
        SLOTS.size(self.count as usize)
    }
}

/// `\_SB.MHPC` with its slots; `numa` tells whether memory has nodes.
pub(super) fn container(slots: &MemorySlots, numa: bool) -> Raw {
    let mut children = vec![name("_HID", &EISAName::new("PNP0A06")), name("_UID", &"memory devices")];
    children.extend((0..slots.count).map(|slot| device(slots.registers, slot, numa)));
    children.extend(SLOTS.shared(slots.registers, 0..slots.count, None, &[]));
    Raw::of(&Device::new(Path::new("\\_SB_.MHPC"), refs(&children)))
}

fn device(registers: u64, slot: u32, numa: bool) -> Raw {
    let mut children = vec![name("_HID", &EISAName::new("PNP0C80")), name("_UID", &slot)];
    children.extend(SLOTS.own(registers, slot, true, &PLACE));
    children.push(method("_STA", 0, &[Raw::of(&Return::new(&Path::new("MSTA")))]));
    children.push(resources());
    if numa {
        // What is added without a zone of its own belongs to the first node.
        children.push(name("_PXM", &ZERO));
    }
    Raw::of(&Device::new(Path::new(&SLOTS.device_name(slot)), refs(&children)))
}

/// `_CRS`: the range that the registers tell.
fn resources() -> Raw {
    let empty = AddressSpace::<u64>::new_memory(AddressSpaceCacheable::Cacheable, true, 0, 0, None);
    let buffer = Path::new("MCRS");
    let field = |at: u8, field: &str| Raw::of(&CreateQWordField::new(&Path::new(field), &buffer, &at));
    let join = |target: Local, high: &str, low: &str| {
        let shifted = Raw::of(&ShiftLeft::new(&ZERO, &Path::new(high), &32u8));
        Raw::of(&Or::new(&target, &shifted, &Path::new(low)))
    };
    let store = |field: &str, value: &dyn Aml| Raw::of(&Store::new(&Path::new(field), value));
    let end = Raw::of(&Add::new(&ZERO, &Local(0), &Local(1)));
    let last = Raw::of(&Subtract::new(&ZERO, &end, &ONE));
    let body = [
        name("MCRS", &ResourceTemplate::new(vec![&empty])),
        field(MINIMUM, "MMIN"),
        field(MAXIMUM, "MMAX"),
        field(LENGTH, "MLEN"),
        join(Local(0), "MBAH", "MBAL"),
        join(Local(1), "MSZH", "MSZL"),
        store("MMIN", &Local(0)),
        store("MMAX", &last),
        store("MLEN", &Local(1)),
        Raw::of(&Return::new(&buffer)),
    ];
    serialized("_CRS", 0, &body)
}
