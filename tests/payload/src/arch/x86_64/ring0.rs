//! The few things ring 3 cannot do itself: calls into the stub in boot.s through its `ud2`.

use core::arch::asm;

const IDLE: u64 = 0;
const WRMSR: u64 = 1;
const RDMSR: u64 = 2;
const TRIPLE_FAULT: u64 = 3;
const PARK: u64 = 4;

fn call(service: u64, rdi: u64, rsi: u64, rdx: u64) -> u64 {
    let result;
    // SAFETY: the stub at ring0_call traps into boot.s, which keeps all registers but RAX, RCX, RDX and the flags. The
    // call pushes a return address, so the red zone is stepped over first.
    unsafe {
        asm!(
            "sub rsp, 128",
            "call ring0_call",
            "add rsp, 128",
            inout("rax") service => result, in("rdi") rdi, in("rsi") rsi, inout("rdx") rdx => _, out("rcx") _
        );
    }
    result
}

/// Writes a model-specific register. One that KVM refuses ends in the fault report.
pub fn wrmsr(msr: u32, value: u64) {
    call(WRMSR, u64::from(msr), value, 0);
}

/// Reads a model-specific register.
pub fn rdmsr(msr: u32) -> u64 {
    call(RDMSR, u64::from(msr), 0, 0)
}

/// Sleeps until an interrupt arrives, unless the word at `watch` no longer holds `old`. With `nanoseconds` not 0 the
/// APIC timer ends the sleep at that time at the latest.
pub fn idle(watch: *const u64, old: u64, nanoseconds: u32) {
    call(IDLE, watch as u64, old, u64::from(nanoseconds));
}

/// Stops this processor for good.
pub fn park() -> ! {
    loop {
        call(PARK, 0, 0, 0);
    }
}

/// Loses the processor to a triple fault.
pub fn triple_fault() -> ! {
    call(TRIPLE_FAULT, 0, 0, 0);
    park()
}
