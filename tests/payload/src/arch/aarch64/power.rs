//! Calls to PSCI by HVC (Arm DEN 0022), and the end of a processor.

use core::arch::asm;

const CPU_ON: u64 = 0xc400_0003;
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;

fn call(function: u64, arguments: [u64; 3]) -> i64 {
    let result;
    // SAFETY: the SMC calling convention keeps what a C function keeps; callers pass what the function expects.
    unsafe {
        asm!(
            "hvc #0",
            inout("x0") function => result,
            in("x1") arguments[0], in("x2") arguments[1], in("x3") arguments[2],
            clobber_abi("C")
        );
    }
    result
}

/// Starts a processor at `entry` with `context` in x0; an error is PSCI's.
pub(super) fn start_processor(id: u64, entry: u64, context: u64) -> Result<(), i64> {
    match call(CPU_ON, [id, entry, context]) {
        0 => Ok(()),
        error => Err(error),
    }
}

/// Powers the machine off; an answer is an error.
pub(super) fn off() -> i64 {
    call(SYSTEM_OFF, [0; 3])
}

/// Resets the machine; an answer is an error.
pub(super) fn reset() -> i64 {
    call(SYSTEM_RESET, [0; 3])
}

/// Stops this processor for good.
pub fn park() -> ! {
    loop {
        // SAFETY: masks interrupts and waits.
        unsafe { asm!("msr daifset, #15", "wfi", options(nomem, nostack)) };
    }
}
