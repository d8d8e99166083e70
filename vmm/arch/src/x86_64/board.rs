//! The devices that sit at fixed places of a PC, and the tables' view of them.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, BusDevice, InterruptLine};
use triarch_legacy::{
    CMOS_PORTS, Cmos, CmosStateV1, CpuHotplug, CpuHotplugStateV1, DebugPort, Ged, GedEvents, GedStateV1, HostClock,
    I8042, I8042_PORTS, I8042StateV1, MemoryHotplug, MemoryHotplugStateV1, PciHotplug, PciHotplugStateV1, PmTimer,
    PmTimerStateV1, PostPort, ResetPort, ResetRegister, SERIAL_PORTS, Serial, SerialPort, SerialStateV1, SleepControl,
};
use triarch_pci::{ConfigPorts, Ecam};

use super::layout;
use crate::common::{CPUS, MEMORY, SLOTS};
use crate::{BoardConfig, BoardError};

/// First serial port and its interrupt.
pub(super) const COM1: u16 = 0x3f8;
pub(super) const COM1_GSI: u32 = 4;
/// Sleep control and status.
pub(super) const SLEEP: u16 = 0x600;
pub(super) const PM_TIMER: u16 = 0x608;
/// Register and interrupt of the generic event device.
pub(super) const GED: u16 = 0x610;
pub(super) const GED_GSI: u32 = 16;
/// The FADT's reset register.
pub(super) const RESET: u16 = 0x3c0;
pub(super) const RESET_VALUE: u8 = 1;
pub(super) const CMOS: u16 = 0x70;
const I8042_DATA: u64 = 0x60;
const POST: u64 = 0x80;
const DEBUG: u64 = 0x402;
/// Offset of the chipset's reset port from the first port of PCI's configuration mechanism.
const RESET_PORT_OFFSET: u64 = 1;

/// The devices at fixed places.
pub struct Board {
    serial: Option<(Arc<Serial>, Arc<dyn SerialPort>)>,
    events: Arc<Ged>,
    clock: Arc<Cmos>,
    keyboard: Arc<I8042>,
    timer: Arc<PmTimer>,
    config: Arc<ConfigAndReset>,
    cpus: Arc<CpuHotplug>,
    memory: Option<Arc<MemoryHotplug>>,
    slots: Arc<PciHotplug>,
}

/// What is saved of the devices at fixed places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoardStateV1 {
    /// The serial port, if there is one.
    pub serial: Option<SerialStateV1>,
    /// The real-time clock and its memory.
    pub cmos: CmosStateV1,
    /// The keyboard controller.
    pub i8042: I8042StateV1,
    /// ACPI's timer.
    pub pm_timer: PmTimerStateV1,
    /// Address port of PCI's configuration mechanism.
    pub config_address: u32,
    /// The generic event device.
    pub events: GedStateV1,
    /// Processors that come and go.
    pub cpus: CpuHotplugStateV1,
    /// Memory that comes and goes, if it does.
    pub memory: Option<MemoryHotplugStateV1>,
    /// PCI devices that come and go.
    pub slots: PciHotplugStateV1,
}

impl Board {
    /// Makes the devices and claims their addresses.
    pub fn new(config: &BoardConfig<'_>) -> Result<Self, BoardError> {
        let BoardConfig {
            pio, interrupts, power, ..
        } = config;
        if config.device_tree {
            return Err(BoardError::DeviceTree);
        }
        let saved = config.saved;
        let port = |base: u16, len, device: Arc<dyn BusDevice>| pio.claim(u64::from(base), len, device);
        let clock = Arc::new(HostClock::new());

        let serial = config.serial_port(
            || Ok(interrupts.line(COM1_GSI)?),
            |saved| saved.serial.as_ref(),
            Serial::new,
            Serial::restore,
        )?;
        if let Some(serial) = &serial {
            port(COM1, SERIAL_PORTS, serial.clone())?;
        }
        let serial = serial.map(|serial| (serial.clone(), serial as Arc<dyn SerialPort>));
        let line: Arc<dyn InterruptLine> = interrupts.line(GED_GSI)?;
        let events = Arc::new(Ged::new(line));
        port(GED, 1, events.clone())?;
        port(SLEEP, 2, Arc::new(SleepControl::new(power.clone())))?;
        let timer = saved.map_or(PmTimerStateV1 { counter: 0 }, |saved| saved.pm_timer);
        let timer = Arc::new(PmTimer::restore(timer, clock.clone()));
        port(PM_TIMER, 4, timer.clone())?;
        port(RESET, 1, Arc::new(ResetRegister::new(RESET_VALUE, power.clone())))?;
        let low = config.memory_size.min(layout::LOW_RAM_END);
        let clock = match saved {
            Some(saved) => Cmos::restore(&saved.cmos, clock).ok_or(BoardError::differs("real-time clock"))?,
            None => Cmos::new(clock, low, config.memory_size - low),
        };
        let clock = Arc::new(clock);
        port(CMOS, CMOS_PORTS, clock.clone())?;
        let keyboard = Arc::new(match saved {
            Some(saved) => I8042::restore(saved.i8042, power.clone()),
            None => I8042::new(power.clone()),
        });
        pio.claim(I8042_DATA, I8042_PORTS, keyboard.clone())?;
        pio.claim(POST, 1, Arc::new(PostPort::default()))?;
        if let Some(console) = config.debug {
            pio.claim(DEBUG, 1, Arc::new(DebugPort::to_console(console.clone())))?;
        }
        let ports = Arc::new(ConfigAndReset {
            config: ConfigPorts::new(config.root.clone()),
            reset: ResetPort::new(power.clone()),
        });
        ports.config.set_address(saved.map_or(0, |saved| saved.config_address));
        pio.claim(ConfigPorts::BASE, ConfigPorts::LEN, ports.clone())?;
        let ecam = Arc::new(Ecam::new(config.root.clone()));
        config
            .mmio
            .claim(layout::ECAM, config.root.buses() * layout::ECAM_BUS_SIZE, ecam)?;
        let cpus = config.claim_processors(&events, layout::CPU_HOTPLUG, 0)?;
        let memory = config.claim_memory(&events, layout::MEMORY_HOTPLUG)?;
        let slots = config.claim_slots(&events, layout::PCI_HOTPLUG)?;
        Ok(Self {
            serial,
            events,
            clock,
            keyboard,
            timer,
            config: ports,
            cpus,
            memory,
            slots,
        })
    }

    /// What is to be saved, while the guest stands still.
    pub fn save(&self) -> BoardStateV1 {
        BoardStateV1 {
            serial: self.serial.as_ref().map(|(serial, _)| serial.state()),
            cmos: self.clock.state(),
            i8042: self.keyboard.state(),
            pm_timer: self.timer.state(),
            config_address: self.config.config.address(),
            events: self.events.state(),
            cpus: self.cpus.state(),
            memory: self.memory.as_ref().map(|memory| memory.state()),
            slots: self.slots.state(),
        }
    }

    /// Puts in place what interrupts the guest, once its interrupt controllers are as they were: what they had not delivered is told again.
    pub fn restore_events(&self, saved: &BoardStateV1) -> Result<(), BoardError> {
        self.events.notify(GedEvents::from_bits_retain(saved.events.pending));
        BoardError::restored(CPUS, Some(&*self.cpus), Some(&saved.cpus), CpuHotplug::restore)?;
        BoardError::restored(
            MEMORY,
            self.memory.as_deref(),
            saved.memory.as_ref(),
            MemoryHotplug::restore,
        )?;
        BoardError::restored(SLOTS, Some(&*self.slots), Some(&saved.slots), PciHotplug::restore)
    }

    /// The serial port, for its input.
    pub fn serial(&self) -> Option<&Arc<dyn SerialPort>> {
        self.serial.as_ref().map(|(_, port)| port)
    }

    /// The processors that come and go.
    pub fn cpus(&self) -> Option<&Arc<CpuHotplug>> {
        Some(&self.cpus)
    }

    /// The memory that comes and goes, if any does.
    pub fn memory(&self) -> Option<&Arc<MemoryHotplug>> {
        self.memory.as_ref()
    }

    /// The slots of the PCI bus, whose devices come and go.
    pub fn slots(&self) -> Option<&Arc<PciHotplug>> {
        Some(&self.slots)
    }

    /// Asks the operating system to shut down.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.events.notify(GedEvents::POWER_BUTTON);
        Ok(())
    }
}

/// PCI's configuration address register has 32-bit accesses only; the chipset's reset port hides behind byte accesses to its second
/// byte.
struct ConfigAndReset {
    config: ConfigPorts,
    reset: ResetPort,
}

impl BusDevice for ConfigAndReset {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        match data.len() {
            1 if offset == RESET_PORT_OFFSET => self.reset.read(0, data),
            _ => self.config.read(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        match data.len() {
            1 if offset == RESET_PORT_OFFSET => self.reset.write(0, data),
            _ => self.config.write(offset, data),
        }
    }
}
