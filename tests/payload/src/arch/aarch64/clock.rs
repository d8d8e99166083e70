//! The generic timer's virtual counter (Arm ARM D12), which tells its rate itself.

use core::arch::asm;

/// The counter.
pub fn ticks() -> u64 {
    let value;
    // SAFETY: reads a counter.
    unsafe { asm!("isb", "mrs {v}, cntvct_el0", v = out(reg) value, options(nostack, preserves_flags)) };
    value
}

/// Ticks per millisecond.
pub fn khz() -> u64 {
    let hz: u64;
    // SAFETY: reads a constant.
    unsafe { asm!("mrs {v}, cntfrq_el0", v = out(reg) hz, options(nomem, nostack, preserves_flags)) };
    (hz / 1000).max(1)
}
