//! The devices that sit at fixed places of an ARM machine.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use triarch_device_core::{BusError, InterruptLine};
use triarch_legacy::{Ged, GedEvents, HostClock, PL011_SIZE, PL031_SIZE, Pl011, Pl031, SerialPort};
use triarch_pci::Ecam;

use super::layout::{self, interrupt};
use crate::BoardConfig;

/// Why the board could not be made.
#[derive(Debug, Error)]
pub enum BoardError {
    /// Two devices want one place.
    #[error("two devices want the same addresses")]
    Bus(#[from] BusError),
    /// No interrupt.
    #[error("cannot connect an interrupt")]
    Interrupt(#[from] io::Error),
    /// There is no debug port.
    #[error("an ARM guest has no debug port; leave --debug-console out")]
    NoDebugPort,
}

/// The devices at fixed places.
pub struct Board {
    serial: Option<Arc<dyn SerialPort>>,
    events: Option<Arc<Ged>>,
}

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
        let events = if config.device_tree {
            None
        } else {
            let events = Arc::new(Ged::new(line(interrupt::GED)?));
            mmio.claim(layout::GED, 1, events.clone())?;
            Some(events)
        };
        let ecam = Arc::new(Ecam::new(config.root.clone()));
        mmio.claim(layout::ECAM, layout::PCI_BUSES * layout::ECAM_BUS_SIZE, ecam)?;
        Ok(Self { serial, events })
    }

    /// The serial port, for its input.
    pub fn serial(&self) -> Option<&Arc<dyn SerialPort>> {
        self.serial.as_ref()
    }

    /// Asks the operating system to shut down.
    pub fn press_power_button(&self) -> io::Result<()> {
        let Some(events) = &self.events else {
            return Err(io::Error::other(
                "a guest that boots by a device tree has no power button; leave --platform dtb=on out",
            ));
        };
        events.notify(GedEvents::POWER_BUTTON);
        Ok(())
    }
}
