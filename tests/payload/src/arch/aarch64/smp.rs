//! Starting processors by PSCI.

use super::power;
use crate::memory::block;
use crate::smp::{Mailbox, Processor};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

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

/// Starts the processor with this id.
pub fn start(_index: usize, id: u64) -> Result<Processor, String> {
    let mailbox: &'static Mailbox = Box::leak(Box::default());
    let start = Box::leak(Box::new(Start {
        stack: block(STACK_BYTES, 16)? + STACK_BYTES as u64,
        mailbox,
    }));
    let entry = &raw const processor_entry as u64;
    power::start_processor(id, entry, core::ptr::from_ref(start) as u64)
        .map_err(|error| format!("PSCI answers {error} for processor {id}"))?;
    mailbox
        .answer(TIMEOUT_MS)
        .ok_or_else(|| format!("processor {id} does not start"))
}
