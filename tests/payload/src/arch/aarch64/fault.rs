//! Stacks of the boot processor, and the report of an exception.

use super::power;
use crate::serial;
use alloc::format;
use core::arch::global_asm;

// The boot processor's own stack and that of the report.
global_asm!(
    ".pushsection .bss",
    ".balign 16",
    ".skip 131072",
    ".globl boot_stack_top",
    "boot_stack_top:",
    ".skip 8192",
    ".globl fault_stack_top",
    "fault_stack_top:",
    ".popsection"
);

#[unsafe(no_mangle)]
extern "C" fn fault_main(vector: u64, esr: u64, elr: u64, far: u64, sp: u64) -> ! {
    serial::write(&format!(
        "\nfault vector={vector} esr={esr:#x} elr={elr:#x} far={far:#x} sp={sp:#x}\n"
    ));
    power::park()
}
