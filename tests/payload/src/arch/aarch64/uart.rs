//! The PL011 (Arm DDI 0183) where the platform contract has it: output is polled, input comes by interrupt 33.

use super::gic;
use super::io::Mmio;

/// Device registers, mapped by boot.s.
const BASE: u64 = 0x0900_0000;
const DATA: u64 = 0;
const FLAGS: u64 = 0x18;
const LINE_CONTROL: u64 = 0x2c;
const CONTROL: u64 = 0x30;
const INTERRUPT_MASK: u64 = 0x38;

const RECEIVE_EMPTY: u32 = 1 << 4;
const TRANSMIT_EMPTY: u32 = 1 << 7;
/// Received data, as much as half of the FIFO or less for some time.
const RECEIVED: u32 = 1 << 4 | 1 << 6;
/// The FIFO's depth since revision r1p5, halved for older ones.
const DEPTH: usize = 16;

/// Number of the shared interrupt, and vector.
pub const VECTOR: u8 = 33;

fn registers() -> Mmio {
    // SAFETY: device registers, mapped by boot.s.
    unsafe { Mmio::new(BASE) }
}

/// 8 data bits, FIFOs on, interrupt for received data.
pub fn init() {
    registers().write32(LINE_CONTROL, 0x70);
    registers().write32(CONTROL, 0x301);
    gic::route_edge(u32::from(VECTOR));
    registers().write32(INTERRUPT_MASK, RECEIVED);
}

/// Writes `text`, as much at a time as the FIFO holds: each register access may cost a lot.
pub fn write(text: &str) {
    for chunk in text.as_bytes().chunks(DEPTH) {
        while registers().read32(FLAGS) & TRANSMIT_EMPTY == 0 {
            core::hint::spin_loop();
        }
        for byte in chunk {
            registers().write32(DATA, u32::from(*byte));
        }
    }
}

/// The next received byte, if there is one.
pub fn read_byte() -> Option<u8> {
    (registers().read32(FLAGS) & RECEIVE_EMPTY == 0).then(|| registers().read32(DATA) as u8)
}
