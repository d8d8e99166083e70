//! The memory functions that compiled Rust code calls and that a C library would bring otherwise.
//!
//! In assembly, so that the optimiser cannot turn a loop in here into a call to itself.

use core::arch::asm;

/// C's `memcpy`.
///
/// # Safety
/// `to` and `from` are valid for `len` bytes and do not overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges. Normal memory takes unaligned accesses.
    unsafe {
        asm!(
            "2: subs {n}, {n}, #16",
            "b.lo 3f",
            "ldp {x}, {y}, [{f}], #16",
            "stp {x}, {y}, [{t}], #16",
            "b 2b",
            "3: adds {n}, {n}, #16",
            "b.eq 5f",
            "4: ldrb {x:w}, [{f}], #1",
            "strb {x:w}, [{t}], #1",
            "subs {n}, {n}, #1",
            "b.ne 4b",
            "5:",
            t = inout(reg) to => _, f = inout(reg) from => _, n = inout(reg) len => _,
            x = out(reg) _, y = out(reg) _,
            options(nostack)
        );
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// `to` and `from` are valid for `len` bytes; they may overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: copying upwards is right when the target does not start inside the source: each step reads before it
        // writes, and what it overwrites of the source has been read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: downwards from the ends, 8 bytes and then single ones; `len` is not 0 here.
    unsafe {
        asm!(
            "2: subs {n}, {n}, #8",
            "b.lo 3f",
            "ldr {x}, [{f}, #-8]!",
            "str {x}, [{t}, #-8]!",
            "b 2b",
            "3: adds {n}, {n}, #8",
            "b.eq 5f",
            "4: ldrb {x:w}, [{f}, #-1]!",
            "strb {x:w}, [{t}, #-1]!",
            "subs {n}, {n}, #1",
            "b.ne 4b",
            "5:",
            t = inout(reg) to.add(len) => _, f = inout(reg) from.add(len) => _, n = inout(reg) len => _,
            x = out(reg) _,
            options(nostack)
        );
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// `to` is valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    let pattern = u64::from(byte as u8).wrapping_mul(0x0101_0101_0101_0101);
    // SAFETY: the caller vouches for the range; only the low byte of `byte` counts.
    unsafe {
        asm!(
            "2: subs {n}, {n}, #16",
            "b.lo 3f",
            "stp {x}, {x}, [{t}], #16",
            "b 2b",
            "3: adds {n}, {n}, #16",
            "b.eq 5f",
            "4: strb {x:w}, [{t}], #1",
            "subs {n}, {n}, #1",
            "b.ne 4b",
            "5:",
            t = inout(reg) to => _, n = inout(reg) len => _, x = in(reg) pattern,
            options(nostack)
        );
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// `a` and `b` are valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let result: i32;
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        asm!(
            "mov {r:w}, wzr",
            "2: cbz {n}, 3f",
            "ldrb {r:w}, [{a}], #1",
            "ldrb {y:w}, [{b}], #1",
            "sub {n}, {n}, #1",
            "subs {r:w}, {r:w}, {y:w}",
            "b.eq 2b",
            "3:",
            a = inout(reg) a => _, b = inout(reg) b => _, n = inout(reg) len => _,
            r = out(reg) result, y = out(reg) _,
            options(nostack)
        );
    }
    result
}

/// C's `bcmp`.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, len) }
}
