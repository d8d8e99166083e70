//! Local APIC in x2APIC mode, I/O APIC, and counting of vectors (the stubs in boot.s do the counting).

use crate::io::Mmio;
use crate::ring0::{self, rdmsr, wrmsr};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

const APIC_BASE: u32 = 0x1b;
const X2APIC_ID: u32 = 0x802;
const SPURIOUS: u32 = 0x80f;
const COMMAND: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const TIMER_DIVIDE: u32 = 0x83e;

const TIMER_VECTOR: u8 = 0xee;
/// The vector that wakes a processor for a job.
pub const WAKE_VECTOR: u8 = 0xe0;
const FIRST_DEVICE_VECTOR: u8 = 0x40;
const LAST_DEVICE_VECTOR: u8 = 0xdf;

#[unsafe(no_mangle)]
static vector_counts: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

static NEXT_VECTOR: AtomicU8 = AtomicU8::new(FIRST_DEVICE_VECTOR);

/// Puts this processor's APIC in x2APIC mode, enabled, timer one-shot at the bus clock.
pub fn init() {
    wrmsr(APIC_BASE, rdmsr(APIC_BASE) | 0xc00);
    wrmsr(SPURIOUS, 0x1ff);
    wrmsr(TIMER_DIVIDE, 0xb);
    wrmsr(LVT_TIMER, u64::from(TIMER_VECTOR));
}

/// This processor's x2APIC id.
pub fn apic_id() -> u32 {
    rdmsr(X2APIC_ID) as u32
}

/// Sends an interrupt command (Intel SDM 3A §11.6.1, low half in `command`) to the processor with this id.
pub fn send(apic_id: u32, command: u32) {
    wrmsr(COMMAND, u64::from(apic_id) << 32 | u64::from(command));
}

/// How often `vector` has been taken, on any processor.
pub fn count(vector: u8) -> u64 {
    vector_counts[usize::from(vector)].load(Ordering::SeqCst)
}

/// Sleeps until an interrupt comes, at most `nanoseconds` (0: no limit); returns at once when `vector` has already
/// been counted past `seen`.
pub fn sleep(vector: u8, seen: u64, nanoseconds: u32) {
    ring0::idle(vector_counts[usize::from(vector)].as_ptr(), seen, nanoseconds);
}

/// The next free vector for a device; when all are used up, starts over (vectors are then shared).
pub fn new_vector() -> u8 {
    let vector = NEXT_VECTOR.fetch_add(1, Ordering::Relaxed);
    if vector == LAST_DEVICE_VECTOR {
        NEXT_VECTOR.store(FIRST_DEVICE_VECTOR, Ordering::Relaxed);
    }
    vector
}

/// Address and data of the message that raises `vector` on the boot processor (Intel SDM 3A §11.11).
pub fn message(vector: u8) -> (u64, u32) {
    (0xfee0_0000 | u64::from(apic_id() & 0xff) << 12, u32::from(vector))
}

/// Routes an ISA interrupt (edge, active high) through the I/O APIC at its architectural place to the boot processor.
pub fn route_isa(line: u8, vector: u8) {
    // SAFETY: the platform has its I/O APIC there, identity-mapped uncached by boot.s.
    let ioapic = unsafe { Mmio::new(0xfec0_0000) };
    let register = 0x10 + 2 * u32::from(line);
    ioapic.write32(0, register + 1);
    ioapic.write32(0x10, apic_id() << 24);
    ioapic.write32(0, register);
    ioapic.write32(0x10, u32::from(vector));
}
