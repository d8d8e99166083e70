//! A serial port: a 16550A whose line leads to a [`Console`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, ByteRegisters, InterruptLine, RateLimit};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};

use crate::console::{Console, ConsoleWriter};
use crate::port::SerialPort;

/// Ports the device claims.
pub const SERIAL_PORTS: u64 = 8;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
/// Interrupt identification when read, FIFO control when written.
const INTERRUPT_ID: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

const IER_DATA_READY: u8 = 0x01;
const IER_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_DATA_READY: u8 = 0x04;
const IIR_FIFOS_ON: u8 = 0xc0;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const LCR_DIVISOR_LATCH: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA_READY: u8 = 0x01;

/// Bytes the receiver's FIFO holds. More than the original's 16, which drivers cannot tell, and fewer interrupts.
const FIFO: usize = 64;

/// A 16550A with FIFOs. Claim [`SERIAL_PORTS`] ports for it and call [`SerialPort::on_event`] when its console's descriptor is readable.
///
/// A byte the guest writes is with the host when the write returns ([`Console::write`]). Input is taken as the FIFO has room.
pub struct Serial {
    registers: Mutex<Registers>,
    console: Arc<Console>,
    log: RateLimit,
}

type Model = Uart<Line, NoEvents, ConsoleWriter>;

struct Registers {
    uart: Model,
    /// A transmitter-empty interrupt that a data-ready one hid when the guest asked for the cause: the guest reads on until none is left.
    hidden: bool,
}

/// What a serial port saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV1 {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_id: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes received and not read yet.
    pub received: Vec<u8>,
    /// Whether a transmitter-empty interrupt is still to be reported.
    pub transmitter_empty: bool,
}

/// Why a saved serial port cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SerialRestoreError {
    /// More bytes than the FIFO holds.
    #[error("{0} received bytes do not fit the FIFO")]
    Fifo(usize),
    /// The interrupt could not be raised again.
    #[error("cannot raise the interrupt: {0}")]
    Interrupt(String),
}

impl Serial {
    /// A port in reset state that interrupts through `line`.
    pub fn new(console: Arc<Console>, line: Arc<dyn InterruptLine>) -> Self {
        let uart = Uart::new(Line(line), ConsoleWriter(console.clone()));
        Self::with(uart, false, console)
    }

    /// A port that goes on where `state` was taken.
    pub fn restore(
        state: &SerialStateV1,
        console: Arc<Console>,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, SerialRestoreError> {
        let registers = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_id,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let writer = ConsoleWriter(console.clone());
        let uart = Uart::from_state(&registers, Line(line), NoEvents, writer).map_err(|error| match error {
            vm_superio::serial::Error::FullFifo => SerialRestoreError::Fifo(state.received.len()),
            other => SerialRestoreError::Interrupt(other.to_string()),
        })?;
        Ok(Self::with(uart, state.transmitter_empty, console))
    }

    fn with(uart: Model, hidden: bool, console: Arc<Console>) -> Self {
        // Another port may have had the console before, and left input there.
        console.wake();
        Self {
            registers: Mutex::new(Registers { uart, hidden }),
            console,
            log: RateLimit::default(),
        }
    }

    /// Everything the guest can see of the port.
    pub fn state(&self) -> SerialStateV1 {
        let registers = self.lock();
        let state = registers.uart.state();
        SerialStateV1 {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_id: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
            transmitter_empty: registers.hidden,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check<E: fmt::Display>(&self, outcome: Result<(), E>) {
        if let Err(error) = outcome
            && let Some(held_back) = self.log.admit()
        {
            tracing::warn!("serial port: {error} ({held_back} such messages held back)");
        }
    }
}

impl Registers {
    /// Bytes of input the FIFO can take. In loop mode the line is cut off.
    fn room(&mut self) -> usize {
        if self.uart.read(MODEM_CONTROL) & MCR_LOOP != 0 {
            return 0;
        }
        self.uart.fifo_capacity()
    }

    fn divisor_latch(&mut self) -> bool {
        self.uart.read(LINE_CONTROL) & LCR_DIVISOR_LATCH != 0
    }

    /// The interrupt enable register, also while the divisor latch hides it.
    fn enabled(&mut self) -> u8 {
        if self.divisor_latch() {
            self.uart.state().interrupt_enable
        } else {
            self.uart.read(INTERRUPT_ENABLE)
        }
    }

    fn data_ready(&mut self) -> bool {
        self.uart.read(LINE_STATUS) & LSR_DATA_READY != 0
    }

    /// The highest cause pending, as the register reports it: one at a time, data before an empty transmitter, and data for as
    /// long as there is some.
    fn identify(&mut self) -> u8 {
        let raised = self.uart.read(INTERRUPT_ID);
        let enabled = self.enabled();
        let empty = (raised & IIR_TRANSMITTER_EMPTY != 0 || self.hidden) && enabled & IER_TRANSMITTER_EMPTY != 0;
        let data = enabled & IER_DATA_READY != 0 && self.data_ready();
        self.hidden = empty && data;
        let cause = match (data, empty) {
            (true, _) => IIR_DATA_READY,
            (false, true) => IIR_TRANSMITTER_EMPTY,
            (false, false) => IIR_NONE,
        };
        IIR_FIFOS_ON | cause
    }

    fn clear_receiver(&mut self) {
        let line_control = self.uart.read(LINE_CONTROL);
        // The data register is not there while the divisor latch is. None of these accesses can fail.
        let _ = self.uart.write(LINE_CONTROL, line_control & !LCR_DIVISOR_LATCH);
        while self.data_ready() {
            self.uart.read(DATA);
        }
        let _ = self.uart.write(LINE_CONTROL, line_control);
    }
}

impl SerialPort for Serial {
    fn console(&self) -> &Arc<Console> {
        &self.console
    }

    fn on_event(&self) {
        let mut buf = [0; FIFO];
        // The lock is held while reading, so the guest cannot change the room meanwhile; the read does not wait.
        let mut registers = self.lock();
        let room = registers.room().min(FIFO);
        let n = self.console.service(&mut buf[..room]);
        let received = registers.uart.enqueue_raw_bytes(&buf[..n]);
        self.check(received.map(|_| ()));
    }
}

impl ByteRegisters for Serial {
    const COUNT: u64 = SERIAL_PORTS;

    fn read_byte(&self, offset: u64) -> Result<u8, AccessError> {
        let register = register(offset)?;
        let mut registers = self.lock();
        let value = match register {
            INTERRUPT_ID => registers.identify(),
            _ => registers.uart.read(register),
        };
        if register == DATA && !registers.data_ready() {
            self.console.room();
        }
        Ok(value)
    }

    fn write_byte(&self, offset: u64, value: u8) -> Result<(), AccessError> {
        let register = register(offset)?;
        let mut registers = self.lock();
        match register {
            INTERRUPT_ID if value & FCR_CLEAR_RECEIVER != 0 => registers.clear_receiver(),
            INTERRUPT_ENABLE if value & IER_TRANSMITTER_EMPTY == 0 && !registers.divisor_latch() => {
                registers.hidden = false;
            }
            _ => {}
        }
        let outcome = registers.uart.write(register, value);
        self.check(outcome);
        if matches!(register, INTERRUPT_ID | MODEM_CONTROL) {
            self.console.room();
        }
        Ok(())
    }
}

fn register(offset: u64) -> Result<u8, AccessError> {
    u8::try_from(offset).map_err(|_| AccessError::BadAccess)
}

/// The interrupt as the register model wants it.
struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), std::io::Error> {
        self.0.trigger()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use triarch_device_core::BusDevice as _;
    use triarch_device_core::mock::CountingLine;

    use super::*;
    use crate::port_rig::PortRig;

    type Rig = PortRig<Serial>;

    fn rig() -> Rig {
        Rig::new(|console, line| Serial::new(console, line))
    }

    impl Rig {
        fn get(&self, register: u8) -> u8 {
            let [value] = self.read(register.into());
            value
        }
        fn set(&self, register: u8, value: u8) {
            self.write(register.into(), [value]);
        }
        fn cause(&self) -> u8 {
            self.get(INTERRUPT_ID) & 0x0f
        }
    }

    #[test]
    fn output_is_there_when_the_write_returns() {
        let mut rig = rig();
        rig.client.set_nonblocking(true).unwrap();
        for byte in *b"hello" {
            rig.set(DATA, byte);
            let mut got = [0; 2];
            assert_eq!(rig.client.read(&mut got).unwrap(), 1);
            assert_eq!(got[0], byte);
        }
    }

    #[test]
    fn pasted_input_is_paced_and_none_is_lost() {
        let rig = rig();
        let pasted: Vec<u8> = (0..100_000u32).map(|i| (i * 7 / 3) as u8).collect();
        let mut writer = rig.client.try_clone().unwrap();
        let copy = pasted.clone();
        let paste = std::thread::spawn(move || writer.write_all(&copy).unwrap());
        rig.set(INTERRUPT_ENABLE, IER_DATA_READY);
        let mut got = Vec::new();
        let mut idle = 0;
        while got.len() < pasted.len() && idle < 500 {
            // What an event loop does: sleep until the console's descriptor is readable.
            if crate::console::readable(rig.port.console(), 10) {
                rig.port.on_event();
            } else {
                idle += 1;
            }
            while rig.get(LINE_STATUS) & LSR_DATA_READY != 0 {
                got.push(rig.get(DATA));
            }
        }
        paste.join().unwrap();
        assert_eq!(got.len(), pasted.len());
        assert!(got == pasted, "the bytes changed on their way");
        assert!(rig.line.count() > 0);
    }

    #[test]
    fn causes_are_reported_one_at_a_time_until_none_is_left() {
        let mut rig = rig();
        rig.set(INTERRUPT_ENABLE, IER_DATA_READY | IER_TRANSMITTER_EMPTY);
        assert_eq!(rig.cause(), IIR_TRANSMITTER_EMPTY);
        assert_eq!(rig.cause(), IIR_NONE);
        rig.set(DATA, b'x');
        rig.send(b"ab");
        assert_eq!(rig.cause(), IIR_DATA_READY);
        rig.get(DATA);
        assert_eq!(rig.cause(), IIR_DATA_READY, "one byte is left");
        rig.get(DATA);
        assert_eq!(rig.cause(), IIR_TRANSMITTER_EMPTY);
        assert_eq!(rig.cause(), IIR_NONE);
    }

    #[test]
    fn input_before_the_driver_still_interrupts() {
        let mut rig = rig();
        rig.send(&[b'x'; 64]);
        assert_eq!(rig.line.count(), 0);
        rig.get(INTERRUPT_ID);
        rig.set(INTERRUPT_ENABLE, IER_DATA_READY);
        assert_eq!(rig.line.count(), 1);
        // A driver that reads the register once more while starting must not lose the FIFO for ever.
        rig.get(INTERRUPT_ID);
        assert_eq!(rig.cause(), IIR_DATA_READY);
    }

    #[test]
    fn clearing_the_receiver_empties_it_and_takes_more() {
        let mut rig = rig();
        rig.send(&[b'x'; 100]);
        rig.set(LINE_CONTROL, LCR_DIVISOR_LATCH | 3);
        rig.set(INTERRUPT_ID, 0xc7);
        assert_eq!(rig.get(LINE_CONTROL), LCR_DIVISOR_LATCH | 3);
        rig.set(LINE_CONTROL, 3);
        assert_eq!(rig.get(LINE_STATUS) & LSR_DATA_READY, 0);
        assert!(crate::console::readable(rig.port.console(), 0));
        rig.port.on_event();
        assert_eq!(rig.port.state().received.len(), 36);
    }

    #[test]
    fn loop_mode_holds_input_back() {
        let mut rig = rig();
        rig.set(MODEM_CONTROL, MCR_LOOP);
        rig.send(b"from outside");
        rig.set(DATA, b'!');
        assert_eq!(rig.get(DATA), b'!');
        assert_eq!(rig.get(LINE_STATUS) & LSR_DATA_READY, 0);
        rig.set(MODEM_CONTROL, 0);
        assert!(crate::console::readable(rig.port.console(), 0));
        rig.port.on_event();
        assert_eq!(rig.port.state().received, b"from outside");
    }

    #[test]
    fn odd_accesses_are_refused() {
        let rig = rig();
        assert_eq!(rig.port.read(0, &mut [0; 2]), Err(AccessError::BadAccess));
        assert_eq!(rig.port.write(0, &[0; 4]), Err(AccessError::BadAccess));
        assert_eq!(rig.port.read(8, &mut [0]), Err(AccessError::BadAccess));
        assert_eq!(rig.port.write(256, &[0]), Err(AccessError::BadAccess));
        assert_eq!(rig.port.write(0, &[]), Err(AccessError::BadAccess));
    }

    #[test]
    fn state_moves_to_another_port() {
        let mut rig = rig();
        rig.set(INTERRUPT_ENABLE, IER_DATA_READY | IER_TRANSMITTER_EMPTY);
        rig.set(7, 0x5a);
        rig.send(b"abc");
        assert_eq!(rig.cause(), IIR_DATA_READY);
        let state = rig.port.state();
        assert!(state.transmitter_empty);
        let line = Arc::new(CountingLine::default());
        let restored = Serial::restore(&state, rig.port.console().clone(), line).unwrap();
        assert_eq!(restored.state(), state);
        let long = SerialStateV1 {
            received: vec![0; 65],
            ..state
        };
        let line = Arc::new(CountingLine::default());
        let refused = Serial::restore(&long, rig.port.console().clone(), line);
        assert_eq!(refused.err(), Some(SerialRestoreError::Fifo(65)));
    }
}
