//! Starting processors by PSCI.

use super::power;
use crate::memory::block;
use crate::smp::{Mailbox, Processor};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::sync::atomic::{AtomicU64, Ordering};

/// Registers of processors that come and go.
pub const HOTPLUG: u64 = 0x0905_0000;
/// Registers of memory that comes and goes.
pub const MEMORY_HOTPLUG: u64 = 0x0906_0000;
/// The event device's register.
const EVENTS: u64 = 0x0903_0000;

/// What the event device reports, once.
pub fn take_events() -> Result<u8, String> {
    Ok(crate::pci::map_registers(EVENTS, 1)?.read8(0))
}

const STACK_BYTES: usize = 16384;
const TIMEOUT_MS: u64 = 5000;

/// What boot.s hands to a processor that starts.
#[repr(C)]
struct Start {
    stack: u64,
    mailbox: &'static Mailbox,
}

unsafe extern "C" {
    static processor_entry: u8;
}

/// The stack of each processor that was ever started, kept for when it is started again.
static STACKS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

/// Starts the processor with this id.
pub fn start(index: usize, id: u64) -> Result<Processor, String> {
    let stack = match STACKS.get(index).map_or(0, |stack| stack.load(Ordering::Relaxed)) {
        0 => block(STACK_BYTES, 16)?,
        kept => kept,
    };
    if let Some(place) = STACKS.get(index) {
        place.store(stack, Ordering::Relaxed);
    }
    let mailbox: &'static Mailbox = Box::leak(Box::default());
    let start = Box::leak(Box::new(Start {
        stack: stack + STACK_BYTES as u64,
        mailbox,
    }));
    let entry = &raw const processor_entry as u64;
    power::start_processor(id, entry, core::ptr::from_ref(start) as u64)
        .map_err(|error| format!("PSCI answers {error} for processor {id}"))?;
    mailbox
        .answer(TIMEOUT_MS)
        .ok_or_else(|| format!("processor {id} does not start"))
}
