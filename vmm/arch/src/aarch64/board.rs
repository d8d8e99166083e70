//! The devices that sit at fixed places of an ARM machine.

use std::io;
use std::sync::Arc;

use triarch_device_core::InterruptLine;
use triarch_legacy::{
    CpuHotplug, Ged, GedEvents, HostClock, MemoryHotplug, PL011_SIZE, PL031_SIZE, PL061_SIZE, PciHotplug, Pl011, Pl031,
    Pl061, SerialPort,
};
use triarch_pci::Ecam;

use super::layout::{self, interrupt};
use crate::{BoardConfig, BoardError};

/// The devices at fixed places.
pub struct Board {
    serial: Option<Arc<dyn SerialPort>>,
    button: Button,
    cpus: Option<Arc<CpuHotplug>>,
    memory: Option<Arc<MemoryHotplug>>,
    slots: Option<Arc<PciHotplug>>,
}

/// How the operating system hears of the power button.
enum Button {
    /// By the event device of ACPI.
    Event(Arc<Ged>),
    /// By a key that a device tree tells of.
    Key(Arc<Pl061>),
}

/// `_STA` of a processor that the guest does not have: present, shown, functioning, not enabled. The GIC interface of each is there
/// from the start.
const PRESENT: u8 = 0xd;
/// Pin of the power button.
pub(super) const POWER_KEY: u8 = 3;

impl Board {
    /// Makes the devices and claims their addresses.
    pub fn new(config: &BoardConfig<'_>) -> Result<Self, BoardError> {
        let BoardConfig { mmio, interrupts, .. } = config;
        if config.debug.is_some() {
            return Err(BoardError::NoDebugPort);
        }
        let line = |number: u32| -> io::Result<Arc<dyn InterruptLine>> {
            Ok(interrupts.line(number - interrupt::FIRST_SHARED)?)
        };
        let serial = match config.serial {
            Some(console) => {
                let serial = Arc::new(Pl011::new(console.clone(), line(interrupt::UART)?));
                mmio.claim(layout::UART, PL011_SIZE, serial.clone())?;
                Some(serial as Arc<dyn SerialPort>)
            }
            None => None,
        };
        let rtc = Arc::new(Pl031::new(Arc::new(HostClock::new())));
        mmio.claim(layout::RTC, PL031_SIZE, rtc)?;
        let (mut cpus, mut memory, mut slots) = (None, None, None);
        let button = if config.device_tree {
            let keys = Arc::new(Pl061::new(line(interrupt::KEYS)?));
            mmio.claim(layout::KEYS, PL061_SIZE, keys.clone())?;
            Button::Key(keys)
        } else {
            let events = Arc::new(Ged::new(line(interrupt::GED)?));
            mmio.claim(layout::GED, 1, events.clone())?;
            cpus = Some(config.claim_processors(&events, layout::CPU_HOTPLUG, PRESENT)?);
            memory = config.claim_memory(&events, layout::MEMORY_HOTPLUG)?;
            slots = Some(config.claim_slots(&events, layout::PCI_HOTPLUG)?);
            Button::Event(events)
        };
        let ecam = Arc::new(Ecam::new(config.root.clone()));
        mmio.claim(layout::ECAM, layout::PCI_BUSES * layout::ECAM_BUS_SIZE, ecam)?;
        Ok(Self {
            serial,
            button,
            cpus,
            memory,
            slots,
        })
    }

    /// The serial port, for its input.
    pub fn serial(&self) -> Option<&Arc<dyn SerialPort>> {
        self.serial.as_ref()
    }

    /// The processors that come and go; a device tree knows of none.
    pub fn cpus(&self) -> Option<&Arc<CpuHotplug>> {
        self.cpus.as_ref()
    }

    /// The memory that comes and goes, if any does; a device tree knows of none.
    pub fn memory(&self) -> Option<&Arc<MemoryHotplug>> {
        self.memory.as_ref()
    }

    /// The slots of the PCI bus, whose devices come and go; a device tree knows of none.
    pub fn slots(&self) -> Option<&Arc<PciHotplug>> {
        self.slots.as_ref()
    }

    /// Asks the operating system to shut down.
    pub fn press_power_button(&self) -> io::Result<()> {
        match &self.button {
            Button::Event(events) => events.notify(GedEvents::POWER_BUTTON),
            Button::Key(keys) => keys.press(POWER_KEY),
        }
        Ok(())
    }
}
