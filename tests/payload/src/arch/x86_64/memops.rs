//! The memory functions that compiled Rust code calls and that a C library would bring otherwise.
//!
//! String instructions, so that the optimiser cannot turn a loop in here into a call to itself.

use core::arch::asm;

/// C's `memcpy`.
///
/// # Safety
/// `to` and `from` are valid for `len` bytes and do not overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the calling convention.
    unsafe {
        asm!(
            "rep movsb",
            inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
            options(nostack, preserves_flags)
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
        // SAFETY: copying upwards is right when the target does not start inside the source.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: downwards from the last byte; `len` is not 0 here, and the direction flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(len - 1) => _, inout("rsi") from.add(len - 1) => _,
            inout("rcx") len => _, options(nostack));
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// `to` is valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; only the low byte of `byte` counts.
    unsafe {
        asm!(
            "rep stosb",
            inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _,
            options(nostack, preserves_flags)
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
    let (left, right): (u32, u32);
    if len == 0 {
        return 0;
    }
    // SAFETY: the caller vouches for both ranges; the last compared pair is re-read behind the pointers.
    unsafe {
        asm!(
            "repe cmpsb", "movzx {l:e}, byte ptr [rsi - 1]", "movzx {r:e}, byte ptr [rdi - 1]",
            l = out(reg) left, r = out(reg) right, inout("rsi") a => _, inout("rdi") b => _,
            inout("rcx") len => _, options(nostack)
        );
    }
    left as i32 - right as i32
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
