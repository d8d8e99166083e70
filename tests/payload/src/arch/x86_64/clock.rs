//! The time-stamp counter, its rate measured against the ACPI PM timer (or the APIC timer without one).

use super::io::inl;
use super::ring0::{rdmsr, wrmsr};
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

const PM_TIMER_PORT: u16 = 0x608;
const PM_TIMER_HZ: u64 = 3_579_545;
const TIMER_INITIAL: u32 = 0x838;
const TIMER_CURRENT: u32 = 0x839;

static KHZ: AtomicU64 = AtomicU64::new(0);

/// The time-stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: CR4.TSD is clear, so ring 3 may read it.
    unsafe { _rdtsc() }
}

/// The PM timer's count.
pub fn pm_timer() -> u32 {
    inl(PM_TIMER_PORT)
}

/// A count and the time-stamp counter of the same moment. The host may take the processor away between the two, so of a
/// few tries the one in which the least time passed counts.
fn moment(count: impl Fn() -> u64) -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = ticks();
        let count = count();
        let passed = ticks() - before;
        if passed < best.0 {
            best = (passed, count, before + passed / 2);
        }
    }
    (best.1, best.2)
}

/// TSC ticks per millisecond by the PM timer; `None` when the timer stands still.
pub fn measure_by_pm_timer() -> Option<u64> {
    let (first, start) = moment(|| pm_timer().into());
    for tries in 0.. {
        let (now, end) = moment(|| pm_timer().into());
        let passed = now.wrapping_sub(first) & 0xff_ffff;
        if passed > PM_TIMER_HZ / 500 {
            return Some((end - start) * PM_TIMER_HZ / passed / 1000);
        }
        if tries > 200 && passed == 0 {
            break;
        }
    }
    None
}

/// TSC ticks per millisecond by the APIC timer, which KVM runs at 1 GHz.
pub fn measure_by_apic_timer() -> u64 {
    wrmsr(TIMER_INITIAL, 0xffff_ffff);
    let (first, start) = moment(|| rdmsr(TIMER_CURRENT));
    loop {
        let (now, end) = moment(|| rdmsr(TIMER_CURRENT));
        let passed = first.wrapping_sub(now);
        if passed > 2_000_000 {
            wrmsr(TIMER_INITIAL, 0);
            return (end - start) * 1_000_000 / passed;
        }
    }
}

/// Ticks per millisecond, measured once.
pub fn khz() -> u64 {
    match KHZ.load(Ordering::Relaxed) {
        0 => {
            let khz = measure_by_pm_timer().unwrap_or_else(measure_by_apic_timer).max(1);
            KHZ.store(khz, Ordering::Relaxed);
            khz
        }
        khz => khz,
    }
}
