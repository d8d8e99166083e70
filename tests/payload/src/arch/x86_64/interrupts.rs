//! Local APIC in x2APIC mode and I/O APIC (the stubs in boot.s count the vectors).

use super::io::Mmio;
use super::ring0::{self, rdmsr, wrmsr};
use crate::acpi::Acpi;
use crate::interrupts::{Message, WAKE_VECTOR, new_vector};
use alloc::string::String;
use core::sync::atomic::AtomicU64;

const APIC_BASE: u32 = 0x1b;
const X2APIC_ID: u32 = 0x802;
const SPURIOUS: u32 = 0x80f;
const COMMAND: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const TIMER_DIVIDE: u32 = 0x83e;

const TIMER_VECTOR: u8 = 0xee;

/// Prepares the boot processor; all is at architectural places here.
pub fn init(_: Option<&Acpi>) -> Result<(), String> {
    init_processor()
}

/// Puts this processor's APIC in x2APIC mode, enabled, timer one-shot at the bus clock.
pub fn init_processor() -> Result<(), String> {
    wrmsr(APIC_BASE, rdmsr(APIC_BASE) | 0xc00);
    wrmsr(SPURIOUS, 0x1ff);
    wrmsr(TIMER_DIVIDE, 0xb);
    wrmsr(LVT_TIMER, u64::from(TIMER_VECTOR));
    Ok(())
}

/// This processor's x2APIC id.
pub fn processor_id() -> u64 {
    rdmsr(X2APIC_ID)
}

/// Sends an interrupt command (Intel SDM 3A §11.6.1, low half in `command`) to the processor with this id.
pub(super) fn send(apic_id: u64, command: u32) {
    wrmsr(COMMAND, apic_id << 32 | u64::from(command));
}

/// Interrupts the processor with this id by [`WAKE_VECTOR`].
pub fn wake(apic_id: u64) {
    send(apic_id, u32::from(WAKE_VECTOR));
}

/// Sleeps until an interrupt arrives, unless `word` no longer holds `old`; at most `nanoseconds` when that is not 0.
pub fn wait(word: &AtomicU64, old: u64, nanoseconds: u32) {
    ring0::idle(word.as_ptr(), old, nanoseconds);
}

/// A message that interrupts the boot processor (Intel SDM 3A §11.11). Which device sends it does not matter here.
pub fn connect(_requester: u16, _entry: u16) -> Result<Message, String> {
    let vector = new_vector();
    Ok(Message {
        vector,
        address: 0xfee0_0000 | (processor_id() & 0xff) << 12,
        data: u32::from(vector),
    })
}

/// Routes an ISA interrupt (edge, active high) through the I/O APIC at its architectural place to the boot processor.
pub(super) fn route_isa(line: u8, vector: u8) {
    // SAFETY: the platform has its I/O APIC there, identity-mapped uncached by boot.s.
    let ioapic = unsafe { Mmio::new(0xfec0_0000) };
    let register = 0x10 + 2 * u32::from(line);
    ioapic.write32(0, register + 1);
    ioapic.write32(0x10, (processor_id() as u32) << 24);
    ioapic.write32(0, register);
    ioapic.write32(0x10, u32::from(vector));
}
