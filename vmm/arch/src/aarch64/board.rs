//! The devices that sit at fixed places of an ARM machine.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use triarch_device_core::InterruptLine;
use triarch_legacy::{
    CpuHotplug, CpuHotplugStateV1, Ged, GedEvents, GedStateV1, HostClock, MemoryHotplug, MemoryHotplugStateV1,
    PL011_SIZE, PL031_SIZE, PL061_SIZE, PciHotplug, PciHotplugStateV1, Pl011, Pl011StateV1, Pl031, Pl031StateV1, Pl061,
    Pl061StateV1, SerialPort,
};
use triarch_pci::Ecam;

use super::layout::{self, interrupt};
use crate::common::{CPUS, MEMORY, SLOTS};
use crate::{BoardConfig, BoardError};

/// The devices at fixed places.
pub struct Board {
    serial: Option<(Arc<Pl011>, Arc<dyn SerialPort>)>,
    clock: Arc<Pl031>,
    button: Button,
    cpus: Option<Arc<CpuHotplug>>,
    memory: Option<Arc<MemoryHotplug>>,
    slots: Option<Arc<PciHotplug>>,
}

/// What is saved of the devices at fixed places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoardStateV1 {
    /// The serial port, if there is one.
    pub serial: Option<Pl011StateV1>,
    /// The real-time clock.
    pub clock: Pl031StateV1,
    /// The generic event device, of a guest that ACPI describes.
    pub events: Option<GedStateV1>,
    /// The power key, of a guest that a device tree describes.
    pub keys: Option<Pl061StateV1>,
    /// Processors that come and go.
    pub cpus: Option<CpuHotplugStateV1>,
    /// Memory that comes and goes, if it does.
    pub memory: Option<MemoryHotplugStateV1>,
    /// PCI devices that come and go.
    pub slots: Option<PciHotplugStateV1>,
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
        let saved = config.saved;
        let line = |number: u32| -> io::Result<Arc<dyn InterruptLine>> {
            Ok(interrupts.line(number - interrupt::FIRST_SHARED)?)
        };
        let serial = config.serial_port(
            || line(interrupt::UART),
            |saved| saved.serial.as_ref(),
            Pl011::new,
            Pl011::restore,
        )?;
        if let Some(serial) = &serial {
            mmio.claim(layout::UART, PL011_SIZE, serial.clone())?;
        }
        let serial = serial.map(|serial| (serial.clone(), serial as Arc<dyn SerialPort>));
        let clock = Arc::new(HostClock::new());
        let clock = Arc::new(match saved {
            Some(saved) => Pl031::restore(saved.clock, clock),
            None => Pl031::new(clock),
        });
        mmio.claim(layout::RTC, PL031_SIZE, clock.clone())?;
        let (mut cpus, mut memory, mut slots) = (None, None, None);
        let button = if config.device_tree {
            let line = line(interrupt::KEYS)?;
            let keys = Arc::new(match saved {
                Some(saved) => Pl061::restore(saved.keys.ok_or(BoardError::differs("power key"))?, line),
                None => Pl061::new(line),
            });
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
        mmio.claim(layout::ECAM, config.root.buses() * layout::ECAM_BUS_SIZE, ecam)?;
        Ok(Self {
            serial,
            clock,
            button,
            cpus,
            memory,
            slots,
        })
    }

    /// What is to be saved, while the guest stands still.
    pub fn save(&self) -> BoardStateV1 {
        let (events, keys) = match &self.button {
            Button::Event(events) => (Some(events.state()), None),
            Button::Key(keys) => (None, Some(keys.state())),
        };
        BoardStateV1 {
            serial: self.serial.as_ref().map(|(serial, _)| serial.state()),
            clock: self.clock.state(),
            events,
            keys,
            cpus: self.cpus.as_ref().map(|cpus| cpus.state()),
            memory: self.memory.as_ref().map(|memory| memory.state()),
            slots: self.slots.as_ref().map(|slots| slots.state()),
        }
    }

    /// Puts in place what interrupts the guest, once its interrupt controllers are as they were: what they had not delivered is told again.
    pub fn restore_events(&self, saved: &BoardStateV1) -> Result<(), BoardError> {
        match (&self.button, &saved.events) {
            (Button::Event(events), Some(saved)) => events.notify(GedEvents::from_bits_retain(saved.pending)),
            (Button::Key(_), None) => {}
            _ => return Err(BoardError::differs("event device")),
        }
        BoardError::restored(CPUS, self.cpus.as_deref(), saved.cpus.as_ref(), CpuHotplug::restore)?;
        BoardError::restored(
            MEMORY,
            self.memory.as_deref(),
            saved.memory.as_ref(),
            MemoryHotplug::restore,
        )?;
        BoardError::restored(SLOTS, self.slots.as_deref(), saved.slots.as_ref(), PciHotplug::restore)
    }

    /// The serial port, for its input.
    pub fn serial(&self) -> Option<&Arc<dyn SerialPort>> {
        self.serial.as_ref().map(|(_, port)| port)
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
