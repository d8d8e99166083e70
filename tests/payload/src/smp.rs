//! Application processors: started by INIT and SIPI (Intel SDM 3A §9.4), each then sleeps in ring 3 until it is given
//! a job by an interrupt.

use crate::clock::Deadline;
use crate::interrupts::{self, WAKE_VECTOR};
use crate::ring0;
use alloc::alloc::{Layout, alloc_zeroed};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

const TRAMPOLINE: u64 = 0x9_0000;
const STACK_BYTES: usize = 16384;
const TSS_BYTES: usize = 104;
const MAX: usize = 256;

/// What the boot processor and one application processor tell each other.
#[repr(C)]
pub struct Mailbox {
    /// 1 + its APIC id, once it runs.
    started: AtomicU64,
    /// Number of the last job given, counted up.
    job: AtomicU64,
    /// Number of the last job done.
    done: AtomicU64,
}

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static mut ap_args: [u64; 4];
    static mut descriptor_table: [u64; 1024];
}

/// A running application processor.
pub struct Processor {
    /// Its id as it reads it itself.
    pub apic_id: u32,
    mailbox: &'static Mailbox,
}

#[unsafe(no_mangle)]
extern "C" fn ap_main(mailbox: &'static Mailbox) -> ! {
    interrupts::init();
    mailbox
        .started
        .store(1 + u64::from(interrupts::apic_id()), Ordering::SeqCst);
    let mut done = 0;
    loop {
        let job = mailbox.job.load(Ordering::SeqCst);
        if job == done {
            ring0::idle(mailbox.job.as_ptr(), done, 0);
        } else {
            done = job;
            mailbox.done.store(done, Ordering::SeqCst);
        }
    }
}

fn block(len: usize) -> Result<u64, String> {
    let layout = Layout::from_size_align(len, 4096).map_err(|_| "bad layout")?;
    // SAFETY: the layout is not empty.
    match unsafe { alloc_zeroed(layout) } as u64 {
        0 => Err("out of memory".into()),
        address => Ok(address),
    }
}

/// Makes TSS, stacks and mailbox for processor number `index` (1 and up) and leaves them for the trampoline.
fn prepare(index: usize) -> Result<&'static Mailbox, String> {
    let ring3 = block(STACK_BYTES)?;
    let ring0 = block(4096)?;
    // TSS and mailbox share the lower part of the ring-0 stack's page: the stubs use less than 200 bytes of it.
    let (tss, mailbox) = (ring0, ring0 + 256);
    // SAFETY: fresh memory of ours; the descriptor table and the arguments are boot.s's, and no other processor reads
    // this slot or the arguments now: processors are started one after another.
    unsafe {
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
pub fn start(index: usize, apic_id: u32) -> Result<Processor, String> {
    if index >= MAX {
        return Err("more than 256 processors".into());
    }
    let mailbox = prepare(index)?;
    // SAFETY: a free page of low RAM; no processor runs in it now.
    unsafe {
        let len = (&raw const ap_trampoline_end) as usize - (&raw const ap_trampoline) as usize;
        core::ptr::copy_nonoverlapping(&raw const ap_trampoline, TRAMPOLINE as *mut u8, len);
    }
    const INIT: u32 = 0x4500;
    const STARTUP: u32 = 0x4600;
    interrupts::send(apic_id, INIT);
    for _ in 0..2 {
        interrupts::send(apic_id, STARTUP | (TRAMPOLINE >> 12) as u32);
        let deadline = Deadline::after_ms(500);
        while deadline.left().is_some() {
            if let id @ 1.. = mailbox.started.load(Ordering::SeqCst) {
                return Ok(Processor {
                    apic_id: (id - 1) as u32,
                    mailbox,
                });
            }
            core::hint::spin_loop();
        }
    }
    Err(format!("processor with APIC id {apic_id} does not start"))
}

impl Processor {
    /// Gives it a job by an interrupt and waits until it is done.
    pub fn ping(&self) -> Result<(), String> {
        let job = self.mailbox.job.fetch_add(1, Ordering::SeqCst) + 1;
        interrupts::send(self.apic_id, u32::from(WAKE_VECTOR));
        let deadline = Deadline::after_ms(2000);
        while self.mailbox.done.load(Ordering::SeqCst) != job {
            if deadline.left().is_none() {
                return Err(format!("processor {} does not answer an interrupt", self.apic_id));
            }
            core::hint::spin_loop();
        }
        Ok(())
    }
}

/// Starts every processor of `ids` but the one we run on.
pub fn start_all(ids: &[u32]) -> Result<Vec<Processor>, String> {
    let own = interrupts::apic_id();
    ids.iter()
        .filter(|id| **id != own)
        .enumerate()
        .map(|(n, id)| start(n + 1, *id))
        .collect()
}
