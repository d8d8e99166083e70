//! COM1, an 8250/16550 at port 0x3f8: output is polled, input comes by interrupt 4.

use super::interrupts;
use super::io::{inb, outb, outsb};

const PORT: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = PORT + 1;
const FIFO_CONTROL: u16 = PORT + 2;
const LINE_CONTROL: u16 = PORT + 3;
const MODEM_CONTROL: u16 = PORT + 4;
const LINE_STATUS: u16 = PORT + 5;

const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 0x20;

/// The interrupt vector of COM1.
pub const VECTOR: u8 = 0x24;

/// 8 data bits, FIFO on with a trigger of one byte, interrupt for received data.
pub fn init() {
    outb(LINE_CONTROL, 3);
    outb(FIFO_CONTROL, 1);
    outb(MODEM_CONTROL, 0xb);
    interrupts::route_isa(4, VECTOR);
    outb(INTERRUPT_ENABLE, 1);
}

/// Writes `text`, byte by byte.
pub fn write(text: &str) {
    for byte in text.bytes() {
        while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            core::hint::spin_loop();
        }
        outb(PORT, byte);
    }
}

/// Writes `text` by one string instruction.
pub(super) fn write_string_io(text: &str) {
    outsb(PORT, text.as_bytes());
}

/// The next received byte, if there is one.
pub fn read_byte() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(PORT))
}
