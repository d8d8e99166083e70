//! Stacks of the boot processor, and the report of an exception.

use super::ring0;
use crate::serial;
use alloc::format;
use core::arch::global_asm;

// Ring-3 stacks of the boot processor: its own and that of the fault report.
global_asm!(
    ".pushsection .bss",
    ".balign 16",
    ".skip 131072",
    ".globl ring3_stack_top",
    "ring3_stack_top:",
    ".skip 8192",
    ".globl fault_stack_top",
    "fault_stack_top:",
    ".popsection"
);

unsafe extern "C" {
    static fault_record: [u64; 5];
}

#[unsafe(no_mangle)]
extern "C" fn fault_main() -> ! {
    // SAFETY: filled by boot.s before it comes here.
    let [vector, error, rip, rsp, cr2] = unsafe { (&raw const fault_record).read_volatile() };
    serial::write(&format!(
        "\nfault vector={vector} error={error:#x} rip={rip:#x} rsp={rsp:#x} cr2={cr2:#x}\n"
    ));
    ring0::park()
}
