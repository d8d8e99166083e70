//! The devices that sit at fixed places of a PC, and the tables' view of them.

use std::io;
use std::sync::Arc;

use triarch_device_core::{AccessError, BusDevice, InterruptLine};
use triarch_legacy::{
    CMOS_PORTS, Cmos, CpuHotplug, DebugPort, Ged, GedEvents, HostClock, I8042, I8042_PORTS, MemoryHotplug, PciHotplug,
    PmTimer, PostPort, ResetPort, ResetRegister, SERIAL_PORTS, Serial, SerialPort, SleepControl,
};
use triarch_pci::{ConfigPorts, Ecam};

use super::layout;
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
    serial: Option<Arc<dyn SerialPort>>,
    events: Arc<Ged>,
    cpus: Arc<CpuHotplug>,
    memory: Option<Arc<MemoryHotplug>>,
    slots: Arc<PciHotplug>,
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
        let port = |base: u16, len, device: Arc<dyn BusDevice>| pio.claim(u64::from(base), len, device);
        let clock = Arc::new(HostClock::new());

        let serial = match config.serial {
            Some(console) => {
                let line = interrupts.line(COM1_GSI)?;
                let serial = Arc::new(Serial::new(console.clone(), line));
                port(COM1, SERIAL_PORTS, serial.clone())?;
                Some(serial as Arc<dyn SerialPort>)
            }
            None => None,
        };
        let line: Arc<dyn InterruptLine> = interrupts.line(GED_GSI)?;
        let events = Arc::new(Ged::new(line));
        port(GED, 1, events.clone())?;
        port(SLEEP, 2, Arc::new(SleepControl::new(power.clone())))?;
        port(PM_TIMER, 4, Arc::new(PmTimer::new(clock.clone())))?;
        port(RESET, 1, Arc::new(ResetRegister::new(RESET_VALUE, power.clone())))?;
        let low = config.memory_size.min(layout::LOW_RAM_END);
        port(
            CMOS,
            CMOS_PORTS,
            Arc::new(Cmos::new(clock.clone(), low, config.memory_size - low)),
        )?;
        pio.claim(I8042_DATA, I8042_PORTS, Arc::new(I8042::new(power.clone())))?;
        pio.claim(POST, 1, Arc::new(PostPort::default()))?;
        if let Some(console) = config.debug {
            pio.claim(DEBUG, 1, Arc::new(DebugPort::to_console(console.clone())))?;
        }
        pio.claim(
            ConfigPorts::BASE,
            ConfigPorts::LEN,
            Arc::new(ConfigAndReset {
                config: ConfigPorts::new(config.root.clone()),
                reset: ResetPort::new(power.clone()),
            }),
        )?;
        let ecam = Arc::new(Ecam::new(config.root.clone()));
        config
            .mmio
            .claim(layout::ECAM, layout::PCI_BUSES * layout::ECAM_BUS_SIZE, ecam)?;
        let cpus = config.claim_processors(&events, layout::CPU_HOTPLUG, 0)?;
        let memory = config.claim_memory(&events, layout::MEMORY_HOTPLUG)?;
        let slots = config.claim_slots(&events, layout::PCI_HOTPLUG)?;
        Ok(Self {
            serial,
            events,
            cpus,
            memory,
            slots,
        })
    }

    /// The serial port, for its input.
    pub fn serial(&self) -> Option<&Arc<dyn SerialPort>> {
        self.serial.as_ref()
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
