//! ARM's serial port: PrimeCell PL011 (ARM DDI 0183), of which the SBSA generic UART is a part.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, BusDevice, InterruptLine, RateLimit};

use crate::console::Console;
use crate::port::SerialPort;
use crate::primecell::{self, IDENTIFICATION};

/// Bytes of addresses the device claims.
pub const PL011_SIZE: u64 = 0x1000;

const DATA: u64 = 0x00;
/// Receive status when read, error clear when written.
const RECEIVE_STATUS: u64 = 0x04;
const FLAGS: u64 = 0x18;
const LOW_POWER: u64 = 0x20;
const INTEGER_BAUD: u64 = 0x24;
const FRACTIONAL_BAUD: u64 = 0x28;
const LINE_CONTROL: u64 = 0x2c;
const CONTROL: u64 = 0x30;
const FIFO_LEVEL: u64 = 0x34;
const INTERRUPT_MASK: u64 = 0x38;
const RAW_INTERRUPTS: u64 = 0x3c;
const MASKED_INTERRUPTS: u64 = 0x40;
const INTERRUPT_CLEAR: u64 = 0x44;
const DMA_CONTROL: u64 = 0x48;

/// Clear to send, data set ready, data carrier detect: somebody is always there.
const FLAG_MODEM: u16 = 0x07;
const FLAG_RX_EMPTY: u16 = 1 << 4;
const FLAG_RX_FULL: u16 = 1 << 6;
const FLAG_TX_EMPTY: u16 = 1 << 7;

const INT_RX: u16 = 1 << 4;
const INT_TX: u16 = 1 << 5;
/// Input that has waited for a while, also below the FIFO's level. Here it waits no time at all.
const INT_RX_TIMEOUT: u16 = 1 << 6;
const INT_ALL: u16 = 0x7ff;

const LCR_FIFOS: u16 = 1 << 4;
/// Reset value of the control register: transmitter and receiver on, the UART off.
const CONTROL_RESET: u16 = 0x300;
/// Reset value of the FIFO levels: half full.
const LEVELS_RESET: u16 = 0x12;
/// r1p5: 32 bytes of FIFO.
const PART: primecell::Part = primecell::Part {
    number: 0x011,
    revision: 3,
};
const FIFO: usize = 32;

/// A PL011. Claim [`PL011_SIZE`] bytes for it and call [`SerialPort::on_event`] when its console's descriptor is readable.
///
/// A byte the guest writes is with the host when the write returns ([`Console::write`]). Input is taken as the FIFO has room, whether
/// the UART is enabled or not: the SBSA part of the registers has no switch for that. The interrupt is an edge each time a cause
/// appears; firmware tables must say so.
pub struct Pl011 {
    registers: Mutex<Registers>,
    console: Arc<Console>,
    line: Arc<dyn InterruptLine>,
    log: RateLimit,
}

struct Registers {
    fifo: VecDeque<u8>,
    low_power: u16,
    integer_baud: u16,
    fractional_baud: u16,
    line_control: u16,
    control: u16,
    levels: u16,
    mask: u16,
    raw: u16,
    dma: u16,
}

/// What a PL011 saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pl011StateV1 {
    /// Bytes received and not read yet.
    pub received: Vec<u8>,
    /// UARTILPR.
    pub low_power: u16,
    /// UARTIBRD.
    pub integer_baud: u16,
    /// UARTFBRD.
    pub fractional_baud: u16,
    /// UARTLCR_H.
    pub line_control: u16,
    /// UARTCR.
    pub control: u16,
    /// UARTIFLS.
    pub levels: u16,
    /// UARTIMSC.
    pub mask: u16,
    /// UARTRIS.
    pub raw: u16,
    /// UARTDMACR.
    pub dma: u16,
}

/// A saved port has more received bytes than its FIFO holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0} received bytes do not fit the FIFO")]
pub struct Pl011RestoreError(pub usize);

impl Pl011 {
    /// A port in reset state that interrupts through `line`.
    pub fn new(console: Arc<Console>, line: Arc<dyn InterruptLine>) -> Self {
        let registers = Registers {
            fifo: VecDeque::with_capacity(FIFO),
            low_power: 0,
            integer_baud: 0,
            fractional_baud: 0,
            line_control: 0,
            control: CONTROL_RESET,
            levels: LEVELS_RESET,
            mask: 0,
            raw: 0,
            dma: 0,
        };
        Self::with(registers, console, line)
    }

    /// A port that goes on where `state` was taken. A pending interrupt is raised once more: the first may not have been saved.
    pub fn restore(
        state: &Pl011StateV1,
        console: Arc<Console>,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, Pl011RestoreError> {
        if state.received.len() > FIFO {
            return Err(Pl011RestoreError(state.received.len()));
        }
        let registers = Registers {
            fifo: state.received.iter().copied().collect(),
            low_power: state.low_power,
            integer_baud: state.integer_baud,
            fractional_baud: state.fractional_baud,
            line_control: state.line_control,
            control: state.control,
            levels: state.levels,
            mask: state.mask,
            raw: state.raw & INT_ALL,
            dma: state.dma,
        };
        let pending = registers.raised() != 0;
        let port = Self::with(registers, console, line);
        if pending {
            port.interrupt();
        }
        Ok(port)
    }

    fn with(registers: Registers, console: Arc<Console>, line: Arc<dyn InterruptLine>) -> Self {
        // Another port may have had the console before, and left input there.
        console.wake();
        Self {
            registers: Mutex::new(registers),
            console,
            line,
            log: RateLimit::default(),
        }
    }

    /// Everything the guest can see of the port.
    pub fn state(&self) -> Pl011StateV1 {
        let r = self.lock();
        Pl011StateV1 {
            received: r.fifo.iter().copied().collect(),
            low_power: r.low_power,
            integer_baud: r.integer_baud,
            fractional_baud: r.fractional_baud,
            line_control: r.line_control,
            control: r.control,
            levels: r.levels,
            mask: r.mask,
            raw: r.raw,
            dma: r.dma,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self) {
        if let Err(error) = self.line.trigger()
            && let Some(held_back) = self.log.admit()
        {
            tracing::warn!("serial port: cannot interrupt: {error} ({held_back} such messages held back)");
        }
    }

    /// Does `change` and interrupts if a cause appeared by it.
    fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.lock();
        let before = registers.raised();
        let result = change(&mut registers);
        if registers.raised() & !before != 0 {
            self.interrupt();
        }
        result
    }
}

impl Registers {
    /// Causes that interrupt: pending and not masked.
    fn raised(&self) -> u16 {
        self.raw & self.mask
    }

    fn capacity(&self) -> usize {
        if self.line_control & LCR_FIFOS != 0 { FIFO } else { 1 }
    }

    /// Bytes from which on the receive interrupt is asserted (UARTIFLS, table 3-14).
    fn receive_level(&self) -> usize {
        let capacity = self.capacity();
        let level = match self.levels >> 3 & 7 {
            0 => capacity / 8,
            1 => capacity / 4,
            2 => capacity / 2,
            3 => capacity * 3 / 4,
            _ => capacity * 7 / 8,
        };
        level.max(1)
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.fifo.extend(bytes);
        self.assert_receive();
    }

    /// Sets the receive causes that the FIFO gives reason for.
    fn assert_receive(&mut self) {
        if !self.fifo.is_empty() {
            self.raw |= INT_RX_TIMEOUT;
        }
        if self.fifo.len() >= self.receive_level() {
            self.raw |= INT_RX;
        }
    }

    fn take(&mut self) -> u16 {
        let byte = self.fifo.pop_front().unwrap_or(0);
        if self.fifo.len() < self.receive_level() {
            self.raw &= !INT_RX;
        }
        if self.fifo.is_empty() {
            self.raw &= !INT_RX_TIMEOUT;
        }
        u16::from(byte)
    }

    fn flags(&self) -> u16 {
        let mut flags = FLAG_MODEM | FLAG_TX_EMPTY;
        if self.fifo.is_empty() {
            flags |= FLAG_RX_EMPTY;
        }
        if self.fifo.len() >= self.capacity() {
            flags |= FLAG_RX_FULL;
        }
        flags
    }

    fn read(&mut self, offset: u64) -> Option<u16> {
        Some(match offset {
            DATA => self.take(),
            // No errors on a line without a wire.
            RECEIVE_STATUS => 0,
            FLAGS => self.flags(),
            LOW_POWER => self.low_power,
            INTEGER_BAUD => self.integer_baud,
            FRACTIONAL_BAUD => self.fractional_baud,
            LINE_CONTROL => self.line_control,
            CONTROL => self.control,
            FIFO_LEVEL => self.levels,
            INTERRUPT_MASK => self.mask,
            RAW_INTERRUPTS => self.raw,
            MASKED_INTERRUPTS => self.raised(),
            DMA_CONTROL => self.dma,
            _ => return None,
        })
    }

    fn write(&mut self, offset: u64, value: u16) -> Result<(), AccessError> {
        match offset {
            RECEIVE_STATUS | FLAGS | RAW_INTERRUPTS | MASKED_INTERRUPTS => {}
            LOW_POWER => self.low_power = value & 0xff,
            INTEGER_BAUD => self.integer_baud = value,
            FRACTIONAL_BAUD => self.fractional_baud = value & 0x3f,
            LINE_CONTROL => {
                self.line_control = value & 0xff;
                // Fewer bytes may be a full FIFO now.
                self.assert_receive();
            }
            CONTROL => self.control = value,
            FIFO_LEVEL => {
                self.levels = value & 0x3f;
                self.assert_receive();
            }
            INTERRUPT_MASK => self.mask = value & INT_ALL,
            INTERRUPT_CLEAR => self.raw &= !value,
            DMA_CONTROL => self.dma = value & 7,
            IDENTIFICATION.. => {}
            _ => return Err(AccessError::BadAccess),
        }
        Ok(())
    }
}

impl SerialPort for Pl011 {
    fn console(&self) -> &Arc<Console> {
        &self.console
    }

    fn on_event(&self) {
        let mut buf = [0; FIFO];
        // The lock is held while reading, so the guest cannot change the room meanwhile; the read does not wait.
        let mut registers = self.lock();
        let room = registers.capacity().saturating_sub(registers.fifo.len());
        let n = self.console.service(&mut buf[..room]);
        if n == 0 {
            return;
        }
        registers.receive(&buf[..n]);
        // Also when the cause was there before: a driver that gives up while input keeps coming hears of it again.
        if registers.raised() & (INT_RX | INT_RX_TIMEOUT) != 0 {
            self.interrupt();
        }
    }
}

impl BusDevice for Pl011 {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        primecell::check(offset, data.len())?;
        let value = match PART.identification(offset) {
            Some(byte) => u16::from(byte),
            None => {
                let (value, empty) = self.change(|r| (r.read(offset), r.fifo.is_empty()));
                if offset == DATA && empty {
                    self.console.room();
                }
                value.ok_or(AccessError::BadAccess)?
            }
        };
        primecell::put(u32::from(value), data);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        primecell::check(offset, data.len())?;
        let value = primecell::get(data);
        if offset == DATA {
            self.console.write(&[value as u8]);
            // The byte is out already: there is room again.
            self.change(|r| r.raw |= INT_TX);
            return Ok(());
        }
        let outcome = self.change(|r| {
            let outcome = r.write(offset, value as u16);
            if offset == INTERRUPT_CLEAR && !r.fifo.is_empty() {
                // What was cleared and still has a reason is a new cause.
                let cleared = r.raw;
                r.assert_receive();
                return (outcome, r.raw & r.mask & !cleared != 0);
            }
            (outcome, false)
        });
        if outcome.1 {
            self.interrupt();
        }
        if offset == LINE_CONTROL {
            self.console.room();
        }
        outcome.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;
    use triarch_device_core::mock::CountingLine;

    use super::*;
    use crate::console::Backend;
    use crate::port_rig::PortRig;

    type Rig = PortRig<Pl011>;

    fn rig() -> Rig {
        Rig::new(|console, line| Pl011::new(console, line))
    }

    impl Rig {
        fn get(&self, offset: u64) -> u32 {
            u32::from_le_bytes(self.read(offset))
        }
        fn set(&self, offset: u64, value: u32) {
            self.write(offset, value.to_le_bytes());
        }
    }

    #[test]
    fn drivers_find_the_primecell() {
        let rig = rig();
        let id = |from: u64| (0..4).fold(0, |id, n| id | (rig.get(from + 4 * n) & 0xff) << (8 * n));
        assert_eq!(id(0xfe0), 0x0034_1011);
        assert_eq!(id(0xff0), 0xb105_f00d);
        assert_eq!(
            u16::from_le_bytes(rig.read(FLAGS)),
            FLAG_MODEM | FLAG_TX_EMPTY | FLAG_RX_EMPTY
        );
    }

    #[test]
    fn output_is_there_when_the_write_returns_and_announces_room() {
        let mut rig = rig();
        rig.client.set_nonblocking(true).unwrap();
        rig.set(INTERRUPT_MASK, u32::from(INT_TX));
        for (n, byte) in b"hello".iter().enumerate() {
            rig.set(DATA, u32::from(*byte));
            let mut got = [0; 2];
            assert_eq!(rig.client.read(&mut got).unwrap(), 1);
            assert_eq!(got[0], *byte);
            assert_eq!(rig.line.count(), n as u64 + 1);
            rig.set(INTERRUPT_CLEAR, u32::from(INT_TX));
            assert_eq!(rig.get(MASKED_INTERRUPTS), 0);
        }
    }

    #[test]
    fn input_interrupts_once_and_ends_with_the_last_byte() {
        let mut rig = rig();
        rig.set(LINE_CONTROL, u32::from(LCR_FIFOS));
        rig.send(b"ab");
        assert_eq!(rig.line.count(), 0, "masked");
        rig.set(INTERRUPT_MASK, u32::from(INT_RX_TIMEOUT));
        assert_eq!(rig.line.count(), 1, "what came before the driver is announced");
        assert_eq!(rig.get(DATA), u32::from(b'a'));
        assert_eq!(rig.get(MASKED_INTERRUPTS), u32::from(INT_RX_TIMEOUT));
        rig.set(INTERRUPT_CLEAR, u32::from(INT_RX_TIMEOUT));
        assert_eq!(rig.line.count(), 2, "cleared with input left: announced again");
        assert_eq!(rig.get(DATA), u32::from(b'b'));
        assert_eq!(rig.get(MASKED_INTERRUPTS), 0);
        assert_ne!(rig.get(FLAGS) & u32::from(FLAG_RX_EMPTY), 0);
        rig.send(b"c");
        assert_eq!(rig.line.count(), 3);
    }

    #[test]
    fn pasted_input_is_paced_and_none_is_lost() {
        let rig = rig();
        let pasted: Vec<u8> = (0..50_000u32).map(|i| (i * 7 / 3) as u8).collect();
        let mut writer = rig.client.try_clone().unwrap();
        let copy = pasted.clone();
        let paste = std::thread::spawn(move || writer.write_all(&copy).unwrap());
        rig.set(LINE_CONTROL, u32::from(LCR_FIFOS));
        let (mut got, mut idle) = (Vec::new(), 0);
        while got.len() < pasted.len() && idle < 500 {
            if crate::console::readable(rig.port.console(), 10) {
                rig.port.on_event();
            } else {
                idle += 1;
            }
            while rig.get(FLAGS) & u32::from(FLAG_RX_EMPTY) == 0 {
                got.push(rig.get(DATA) as u8);
            }
        }
        paste.join().unwrap();
        assert!(got == pasted, "{} of {} bytes came", got.len(), pasted.len());
    }

    #[test]
    fn a_saved_port_goes_on() {
        let mut rig = rig();
        rig.set(LINE_CONTROL, u32::from(LCR_FIFOS));
        rig.set(INTERRUPT_MASK, u32::from(INT_RX_TIMEOUT));
        rig.send(b"xyz");
        let state = rig.port.state();
        let line = Arc::new(CountingLine::default());
        let port = Pl011::restore(&state, rig.port.console().clone(), line.clone()).unwrap();
        assert_eq!((port.state(), line.count()), (state.clone(), 1));
        let received = vec![0; FIFO + 1];
        let too_much = Pl011StateV1 { received, ..state };
        let console = rig.port.console().clone();
        assert!(Pl011::restore(&too_much, console, line).is_err());
    }

    proptest! {
        #[test]
        fn no_access_panics(
            accesses in proptest::collection::vec((0u64..0x1010, 0usize..9, any::<bool>(), any::<u64>()), 0..60)
        ) {
            let console = Arc::new(Console::open(&Backend::Null).unwrap());
            let port = Pl011::new(console, Arc::new(CountingLine::default()));
            for (offset, len, write, value) in accesses {
                let mut data = value.to_le_bytes();
                let data = &mut data[..len.min(8)];
                let known = offset % 4 == 0 && matches!(len, 1 | 2 | 4) && offset < PL011_SIZE;
                let outcome = if write { port.write(offset, data) } else { port.read(offset, data) };
                prop_assert!(known || outcome.is_err());
                port.on_event();
            }
        }
    }
}
