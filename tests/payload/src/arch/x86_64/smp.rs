//! Starting application processors by INIT and SIPI (Intel SDM 3A §9.4).

use super::interrupts;
use crate::memory;
use crate::smp::{Mailbox, Processor};
use alloc::format;
use alloc::string::String;
use core::sync::atomic::{AtomicU64, Ordering};

const TRAMPOLINE: u64 = 0x9_0000;
const STACK_BYTES: usize = 16384;
const TSS_BYTES: usize = 104;
const MAX: usize = 256;

/// Registers of processors that come and go.
pub const HOTPLUG: u64 = 0xfe00_0000;
/// Registers of memory that comes and goes.
pub const MEMORY_HOTPLUG: u64 = 0xfe01_0000;
/// The event device's register.
const EVENTS: u16 = 0x610;

/// What the event device reports, once.
pub fn take_events() -> Result<u8, String> {
    Ok(super::io::inb(EVENTS))
}

/// The two blocks of memory of each processor that was ever started, kept for when it is started again.
static BLOCKS: [[AtomicU64; 2]; MAX] = [const { [const { AtomicU64::new(0) }; 2] }; MAX];

fn block_of(index: usize, which: usize, len: usize) -> Result<u64, String> {
    match BLOCKS[index][which].load(Ordering::Relaxed) {
        0 => {
            let block = memory::block(len, 4096)?;
            BLOCKS[index][which].store(block, Ordering::Relaxed);
            Ok(block)
        }
        block => Ok(block),
    }
}

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static mut ap_args: [u64; 4];
    static mut descriptor_table: [u64; 1024];
}

/// Makes TSS, stacks and mailbox for processor number `index` (1 and up) and leaves them for the trampoline.
fn prepare(index: usize) -> Result<&'static Mailbox, String> {
    let ring3 = block_of(index, 0, STACK_BYTES)?;
    let ring0 = block_of(index, 1, 4096)?;
    // TSS and mailbox share the lower part of the ring-0 stack's page: the stubs use less than 200 bytes of it.
    let (tss, mailbox) = (ring0, ring0 + 256);
    // SAFETY: memory of ours, whose processor does not run; the descriptor table and the arguments are boot.s's, and no other processor reads
    // this slot or the arguments now: processors are started one after another.
    unsafe {
        core::ptr::write_bytes(ring0 as *mut u8, 0, 4096);
        ((tss + 4) as *mut u64).write_unaligned(ring0 + 4096);
        ((tss + 0x66) as *mut u16).write_unaligned(TSS_BYTES as u16);
        let slot = (&raw mut descriptor_table).cast::<u64>().add(5 + 2 * index);
        slot.write((TSS_BYTES as u64 - 1) | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56);
        slot.add(1).write(tss >> 32);
        (&raw mut ap_args).write_volatile([
            0x28 + 16 * index as u64,
            ring0 + 4096,
            ring3 + STACK_BYTES as u64,
            mailbox,
        ]);
        Ok(&*(mailbox as *const Mailbox))
    }
}

/// Starts processor `index` with the APIC id the MADT gives it.
pub fn start(index: usize, apic_id: u64) -> Result<Processor, String> {
    const INIT: u32 = 0x4500;
    const STARTUP: u32 = 0x4600;
    if index >= MAX {
        return Err("more than 256 processors".into());
    }
    let mailbox = prepare(index)?;
    // SAFETY: a free page of low RAM; no processor runs in it now.
    unsafe {
        let len = (&raw const ap_trampoline_end) as usize - (&raw const ap_trampoline) as usize;
        core::ptr::copy_nonoverlapping(&raw const ap_trampoline, TRAMPOLINE as *mut u8, len);
    }
    interrupts::send(apic_id, INIT);
    for _ in 0..2 {
        interrupts::send(apic_id, STARTUP | (TRAMPOLINE >> 12) as u32);
        if let Some(processor) = mailbox.answer(500) {
            return Ok(processor);
        }
    }
    Err(format!("processor with APIC id {apic_id} does not start"))
}
