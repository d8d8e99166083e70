//! A PS/2 controller with nothing plugged in. It is here for the reset line, and so that drivers find out quickly.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, ByteRegisters};

use crate::power::{PowerEvent, PowerSink};

/// Ports the device claims, from 0x60 on: data, system control B (0x61), status and command (0x64).
pub const I8042_PORTS: u64 = 5;

const DATA: u64 = 0;
const SYSTEM_CONTROL: u64 = 1;
const STATUS: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Self-test passed, and the key lock is open.
const STATUS_IDLE: u8 = 1 << 2 | 1 << 4;

const READ_MODE: u8 = 0x20;
const WRITE_MODE: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const TEST_CONTROLLER: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
/// These three take a byte and put it out as if a device had sent it.
const LOOP_COMMANDS: std::ops::RangeInclusive<u8> = 0xd2..=0xd4;
/// Pulses bit 0 of the output port, which is wired to the CPU's reset line.
const PULSE_RESET: u8 = 0xfe;

const CONTROLLER_OK: u8 = 0x55;
/// The clock line is stuck low: what a missing mouse port answers.
const NO_PORT: u8 = 0x01;
/// What a device answers to a byte it did not understand; drivers give up on it at once instead of waiting.
const RESEND: u8 = 0xfe;
/// Reset line high, A20 on.
const OUTPUT_PORT: u8 = 0x03;
const OUTPUT_NO_RESET: u8 = 0x01;
/// Both device interfaces disabled, scan codes translated.
const MODE_DEFAULT: u8 = 0x70;
/// Timer 2's output is high. Linux waits for it when it measures the TSC without a timer 2.
const TIMER_2_HIGH: u8 = 1 << 5;

/// The controller. Claim [`I8042_PORTS`] for it. Resets by command 0xfe, or by pulling the reset line low through the output port.
pub struct I8042 {
    registers: Mutex<I8042StateV1>,
    sink: Arc<dyn PowerSink>,
}

/// What the controller saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042StateV1 {
    /// Byte waiting in the output buffer.
    pub output: Option<u8>,
    /// Command whose byte is still to come.
    pub command: Option<u8>,
    /// Mode byte.
    pub mode: u8,
}

impl I8042 {
    /// A controller that reports resets to `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        let state = I8042StateV1 {
            output: None,
            command: None,
            mode: MODE_DEFAULT,
        };
        Self::restore(state, sink)
    }

    /// A controller that goes on where `state` was taken.
    pub fn restore(state: I8042StateV1, sink: Arc<dyn PowerSink>) -> Self {
        Self {
            registers: Mutex::new(state),
            sink,
        }
    }

    /// Everything the guest can see.
    pub fn state(&self) -> I8042StateV1 {
        *self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl I8042StateV1 {
    /// Returns whether the guest pulsed the reset line.
    fn command(&mut self, command: u8) -> bool {
        self.command = None;
        match command {
            READ_MODE => self.output = Some(self.mode),
            TEST_AUX => self.output = Some(NO_PORT),
            TEST_CONTROLLER => self.output = Some(CONTROLLER_OK),
            TEST_KEYBOARD => self.output = Some(0),
            READ_OUTPUT_PORT => self.output = Some(OUTPUT_PORT),
            WRITE_MODE | WRITE_OUTPUT_PORT => self.command = Some(command),
            c if LOOP_COMMANDS.contains(&c) => self.command = Some(command),
            PULSE_RESET => return true,
            // Enabling and disabling ports that are not there, and commands that no PC has.
            _ => {}
        }
        false
    }

    fn data(&mut self, value: u8) -> bool {
        match self.command.take() {
            Some(WRITE_MODE) => self.mode = value,
            Some(WRITE_OUTPUT_PORT) => return value & OUTPUT_NO_RESET == 0,
            // Not marked as the mouse's: that is how drivers see that there is no mouse port.
            Some(0xd2 | 0xd3) => self.output = Some(value),
            // To the mouse or the keyboard.
            _ => self.output = Some(RESEND),
        }
        false
    }
}

impl ByteRegisters for I8042 {
    const COUNT: u64 = I8042_PORTS;

    fn read_byte(&self, offset: u64) -> Result<u8, AccessError> {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match offset {
            DATA => registers.output.take().unwrap_or(0),
            SYSTEM_CONTROL => TIMER_2_HIGH,
            STATUS => {
                STATUS_IDLE
                    | if registers.output.is_some() {
                        STATUS_OUTPUT_FULL
                    } else {
                        0
                    }
            }
            _ => return Err(AccessError::BadAccess),
        };
        Ok(value)
    }

    fn write_byte(&self, offset: u64, value: u8) -> Result<(), AccessError> {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let reset = match offset {
            DATA => registers.data(value),
            STATUS => registers.command(value),
            SYSTEM_CONTROL => false,
            _ => return Err(AccessError::BadAccess),
        };
        drop(registers);
        if reset {
            self.sink.power_event(PowerEvent::Reset);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::power::tests::Events;
    use triarch_device_core::BusDevice as _;

    fn get(device: &I8042, offset: u64) -> u8 {
        let mut value = [0];
        device.read(offset, &mut value).unwrap();
        value[0]
    }

    #[test]
    fn resets_by_pulse_and_by_output_port() {
        let events = Arc::new(Events::default());
        let device = I8042::new(events.clone());
        device.write(STATUS, &[0xf0]).unwrap();
        device.write(STATUS, &[WRITE_OUTPUT_PORT]).unwrap();
        device.write(DATA, &[0xff]).unwrap();
        assert_eq!(events.take(), []);
        device.write(STATUS, &[0xfe]).unwrap();
        assert_eq!(events.take(), [PowerEvent::Reset]);
        device.write(STATUS, &[WRITE_OUTPUT_PORT]).unwrap();
        device.write(DATA, &[0xfe]).unwrap();
        assert_eq!(events.take(), [PowerEvent::Reset]);
        device.write(DATA, &[0xfe]).unwrap();
        assert_eq!(events.take(), [], "that one was for the keyboard");
    }

    #[test]
    fn every_question_of_a_probe_is_answered_at_once() {
        let device = I8042::new(Arc::new(Events::default()));
        assert_eq!(
            get(&device, STATUS),
            STATUS_IDLE,
            "nothing to say, and ready for commands"
        );
        assert_eq!(get(&device, DATA), 0);
        let ask = |command: u8, byte: Option<u8>| {
            device.write(STATUS, &[command]).unwrap();
            if let Some(byte) = byte {
                device.write(DATA, &[byte]).unwrap();
            }
            assert_eq!(get(&device, STATUS), STATUS_IDLE | STATUS_OUTPUT_FULL, "{command:#x}");
            let answer = get(&device, DATA);
            assert_eq!(get(&device, STATUS), STATUS_IDLE);
            answer
        };
        assert_eq!(ask(READ_MODE, None), MODE_DEFAULT);
        device.write(STATUS, &[WRITE_MODE]).unwrap();
        device.write(DATA, &[0x74]).unwrap();
        assert_eq!(ask(READ_MODE, None), 0x74);
        assert_eq!(ask(TEST_CONTROLLER, None), CONTROLLER_OK);
        assert_eq!(ask(0xd3, Some(0x5a)), 0x5a, "and not from the mouse");
        assert_eq!(ask(TEST_AUX, None), NO_PORT);
        assert_eq!(ask(0xd4, Some(0xf2)), RESEND);
        device.write(STATUS, &[WRITE_MODE]).unwrap();
        device.write(STATUS, &[TEST_KEYBOARD]).unwrap();
        device.write(DATA, &[0x11]).unwrap();
        get(&device, DATA);
        assert_eq!(ask(READ_MODE, None), 0x74, "the byte came after another command");
        assert_eq!(get(&device, SYSTEM_CONTROL) & TIMER_2_HIGH, TIMER_2_HIGH);
    }

    proptest! {
        #[test]
        fn nothing_written_panics(writes in prop::collection::vec((0u64..6, any::<u8>()), 0..100)) {
            let device = I8042::new(Arc::new(Events::default()));
            for (offset, value) in writes {
                let known = [DATA, SYSTEM_CONTROL, STATUS].contains(&offset);
                prop_assert_eq!(device.write(offset, &[value]).is_ok(), known);
                prop_assert_eq!(device.read(offset, &mut [0]).is_ok(), known);
            }
            let state = device.state();
            prop_assert_eq!(I8042::restore(state, Arc::new(Events::default())).state(), state);
        }
    }
}
