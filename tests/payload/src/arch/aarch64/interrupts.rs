//! GIC, ITS and the generic timer as the rest wants them (boot.s counts the vectors).

use super::{clock, gic, its};
use crate::acpi::Acpi;
use alloc::string::String;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

pub use gic::{init_processor, processor_id};
pub use its::connect;

/// Prepares GIC, ITS and the boot processor, as ACPI describes them.
pub fn init(acpi: Option<&Acpi>) -> Result<(), String> {
    let told = gic::init(acpi.ok_or("no ACPI tables")?)?;
    init_processor()?;
    told.its.map_or(Ok(()), its::init)
}

/// Interrupts the processor with this id by SGI 0, which boot.s counts as the waking vector.
pub fn wake(id: u64) {
    let (aff0, aff1, aff2, aff3) = (id & 0xff, id >> 8 & 0xff, id >> 16 & 0xff, id >> 32);
    let value = aff3 << 48 | (aff0 >> 4) << 44 | aff2 << 32 | aff1 << 16 | 1 << (aff0 & 15);
    // SAFETY: sends an interrupt; memory written before is to be seen by who gets it.
    unsafe { asm!("dsb ishst", "msr icc_sgi1r_el1, {v}", "isb", v = in(reg) value, options(nostack, preserves_flags)) };
}

/// Sleeps until an interrupt arrives, unless `word` no longer holds `old`; at most `nanoseconds` when that is not 0.
pub fn wait(word: &AtomicU64, old: u64, nanoseconds: u32) {
    // SAFETY: masked, interrupts still end the sleep (Arm ARM D1.6); they are taken when they are let in again. The timer
    // is this processor's own.
    unsafe {
        asm!("msr daifset, #2", options(nostack));
        if word.load(Ordering::SeqCst) == old {
            if nanoseconds != 0 {
                let end = clock::ticks() + u64::from(nanoseconds) * clock::khz() / 1_000_000;
                asm!("msr cntv_cval_el0, {v}", "msr cntv_ctl_el0, {on}", "isb", v = in(reg) end, on = in(reg) 1u64);
            }
            asm!("dsb sy", "wfi", options(nostack));
        }
        asm!(
            "msr daifclr, #2",
            "isb",
            "msr cntv_ctl_el0, xzr",
            "isb",
            options(nostack)
        );
    }
}
