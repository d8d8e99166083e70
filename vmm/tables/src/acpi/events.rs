//! The Generic Event Device and what it signals (ACPI 5.6.9).

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Interrupt, Local,
    Method, MethodCall, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Store, ZERO,
};

use super::config::{EventDevice, PciSegment, Register};
use super::dsdt::{Raw, name, refs};

/// Bits of the event register. Reading it returns the pending ones and clears them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventBits;

impl EventBits {
    /// Processors were added or are to be removed.
    pub const CPU: u8 = 1 << 0;
    /// Memory was added or is to be removed.
    pub const MEMORY: u8 = 1 << 1;
    /// PCI devices were added or are to be removed.
    pub const PCI: u8 = 1 << 2;
    /// The power button was pressed.
    pub const POWER_BUTTON: u8 = 1 << 3;
}

/// Methods that handle what is reported of processors, if those come and go, and of the slots of `segments`.
pub(super) fn scans(cpus: bool, memory: bool, segments: &[PciSegment]) -> Vec<(u8, String)> {
    let cpus = cpus.then(|| (EventBits::CPU, super::cpus::SCAN.to_owned()));
    let memory = memory.then(|| (EventBits::MEMORY, super::memory::SCAN.to_owned()));
    let slots = super::pci::scans(segments).into_iter();
    cpus.into_iter()
        .chain(memory)
        .chain(slots.map(|scan| (EventBits::PCI, scan)))
        .collect()
}

const POWER_BUTTON: &str = "\\_SB_.PWRB";
/// Notification value of a pressed button (ACPI 4.8.2.2.1.2).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn power_button() -> Raw {
    Raw::of(&Device::new(
        Path::new(POWER_BUTTON),
        vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)],
    ))
}

/// The device. Each of `scans` is a method that handles one of [`EventBits`].
pub(super) fn event_device(device: &EventDevice, scans: &[(u8, String)]) -> Raw {
    let (space, address) = match device.register {
        Register::Io(port) => (OpRegionSpace::SystemIO, u64::from(port)),
        Register::Memory(at) => (OpRegionSpace::SystemMemory, at),
    };
    let interrupt = Interrupt::new(true, true, false, false, device.gsi);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let children = [
        name("_HID", &"ACPI0013"),
        name("_UID", &ZERO),
        name("_CRS", &resources),
        Raw::of(&OpRegion::new(Path::new("EREG"), space, &address, &1u8)),
        Raw::of(&Field::new(
            Path::new("EREG"),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            vec![FieldEntry::Named(*b"EVNT", 8)],
        )),
        event_method(scans),
    ];
    Raw::of(&Device::new(Path::new("\\_SB_.GED_"), refs(&children)))
}

/// `_EVT`: reads the register once, then handles every bit.
fn event_method(scans: &[(u8, String)]) -> Raw {
    let button = Path::new(POWER_BUTTON);
    let mut handlers = vec![(EventBits::POWER_BUTTON, Raw::of(&Notify::new(&button, &BUTTON_PRESSED)))];
    handlers.extend(scans.iter().map(|(bit, scan)| {
        let scan = MethodCall::new(Path::new(scan), Vec::new());
        (*bit, Raw::of(&scan))
    }));
    let mut body = vec![Raw::of(&Store::new(&Local(0), &Path::new("EVNT")))];
    body.extend(
        handlers
            .iter()
            .map(|(bit, action)| Raw::of(&If::new(&And::new(&ZERO, &Local(0), bit), vec![action]))),
    );
    Raw::of(&Method::new(Path::new("_EVT"), 1, true, refs(&body)))
}
