//! GTDT: the generic timer (ACPI 5.2.25).

use super::super::table::Table;
use super::config::Timer;

const REVISION: u8 = 3;
/// No memory-mapped counter.
const NO_ADDRESS: [u8; 8] = [0xff; 8];
/// The timer goes on while the processor sleeps. Level-triggered and active high are zeroes.
const ALWAYS_ON: u32 = 1 << 2;

pub(super) fn gtdt(timer: &Timer) -> Vec<u8> {
    let mut table = Table::new(*b"GTDT", REVISION);
    table.push(&NO_ADDRESS);
    table.push(&[0; 4]);
    for interrupt in [timer.secure, timer.physical, timer.virt, timer.hypervisor] {
        table.push(&interrupt.to_le_bytes());
        table.push(&ALWAYS_ON.to_le_bytes());
    }
    // No memory-mapped counter to read either, no platform timers at this offset, no virtual EL2 timer.
    table.push(&NO_ADDRESS);
    table.push(&[0; 16]);
    table.finish()
}
