//! The clock of UEFI's runtime services (UEFI 2.10, 8.3), over the PL031.
//!
//! Linux knows the PL031 from device trees only; a guest that was booted by ACPI asks its firmware for the time. This is that firmware:
//! a few functions for the guest, in its memory, which use neither stack nor data and run at any address. They find the PL031 at its
//! physical address, where the EFI memory map has the guest map it.

use core::arch::global_asm;

use triarch_legacy::{PL031_DATA, PL031_LOAD};
use triarch_tables::efi::RuntimeCode;

use super::layout;

/// Days from 0000-03-01 to 1970-01-01. Years that begin with March have their leap day at the end.
const EPOCH: u64 = 719_468;
const DAYS_OF_4_YEARS: u64 = 1461;
const DAYS_OF_100_YEARS: u64 = 36_524;
const DAYS_OF_400_YEARS: u64 = 146_097;

const _: () = assert!(layout::RTC >> 32 == 0 && EPOCH >> 32 == 0);

// Registers: x0 and x1 are the arguments, x0 the result. Only registers that a callee may change are used (AAPCS64, 6.1.1).
// EFI_TIME has the year at 0 (16 bits), month 2, day 3, hour 4, minute 5, second 6 (8 bits each), nanosecond 8 (32 bits), time zone 12
// (16 bits), daylight 14.
global_asm!(
    r#"
    .pushsection .rodata.triarch_efi_runtime, "a"
    .balign 16
triarch_efi_runtime:

    // w13 = w9 / w10, w9 = w9 % w10
    .macro divide
    udiv w13, w9, w10
    msub w9, w13, w10, w9
    .endm
    .macro number register, value
    movz \register, #((\value) & 0xffff)
    movk \register, #((\value) >> 16), lsl #16
    .endm

triarch_efi_get_time:
    cbz x0, triarch_efi_invalid
    number w9, {rtc}
    ldr w9, [x9, #{data}]
    number w10, 86400
    divide
    mov w8, w13                     // w8: days since 1970
    strh wzr, [x0, #14]
    mov w10, #3600
    divide
    strb w13, [x0, #4]
    mov w10, #60
    divide
    strb w13, [x0, #5]
    strb w9, [x0, #6]
    strb wzr, [x0, #7]
    str wzr, [x0, #8]
    mov w10, #0x7ff                 // no time zone: Linux means UTC
    strh w10, [x0, #12]

    number w10, {epoch}
    add w9, w8, w10
    number w10, {days400}
    divide
    mov w10, #400
    mul w8, w13, w10                // w8: year of the first day of these 400 years
    // The year of these 400: (day - leap days before it) / 365.
    mov w11, w9                     // w11: day of these 400 years
    mov w10, #{days4_less_1}
    udiv w12, w11, w10
    sub w14, w11, w12
    number w10, {days100}
    udiv w12, w11, w10
    add w14, w14, w12
    number w10, {days400_less_1}
    udiv w12, w11, w10
    sub w14, w14, w12
    mov w10, #365
    udiv w14, w14, w10              // w14: year of these 400
    add w8, w8, w14
    // The day of the year: day - 365 * year - year / 4 + year / 100.
    msub w9, w14, w10, w11
    sub w9, w9, w14, lsr #2
    mov w10, #100
    udiv w12, w14, w10
    add w9, w9, w12                 // w9: day of the year, from 1 March
    // Months have 30.6 days: month = (5 * day + 2) / 153, which is 0 in March.
    add w11, w9, w9, lsl #2
    add w11, w11, #2
    mov w10, #153
    udiv w11, w11, w10              // w11: month from March
    mul w12, w11, w10
    add w12, w12, #2
    mov w10, #5
    udiv w12, w12, w10
    sub w9, w9, w12
    add w9, w9, #1
    strb w9, [x0, #3]
    add w12, w11, #3
    sub w13, w11, #9
    cmp w11, #10
    csel w12, w12, w13, lo
    strb w12, [x0, #2]
    cinc w8, w8, hs                 // January and February are of the next year
    strh w8, [x0, #0]

    cbz x1, 1f
    mov w9, #1                      // 1 Hz
    str w9, [x1, #0]
    str wzr, [x1, #4]               // accuracy: the host's
    strb w9, [x1, #8]               // setting it clears what is less than a second
1:  mov x0, #0
    ret

triarch_efi_set_time:
    cbz x0, triarch_efi_invalid
    ldrb w9, [x0, #2]
    sub w10, w9, #1
    cmp w10, #11
    b.hi triarch_efi_invalid
    ldrh w8, [x0, #0]
    mov w10, #1970
    cmp w8, w10
    b.lo triarch_efi_invalid
    subs w10, w9, #3                // months from March
    add w11, w9, #9
    csel w9, w10, w11, hs
    cset w10, lo
    sub w8, w8, w10                 // years that begin with March
    // Days before the month: (153 * month + 2) / 5.
    mov w10, #153
    mul w9, w9, w10
    add w9, w9, #2
    mov w10, #5
    udiv w9, w9, w10
    ldrb w10, [x0, #3]
    sub w11, w10, #1
    cmp w11, #30
    b.hi triarch_efi_invalid
    add w9, w9, w11
    // Days before the year: 365 * year + year / 4 - year / 100 + year / 400.
    mov w10, #365
    madd w9, w8, w10, w9
    add w9, w9, w8, lsr #2
    mov w10, #100
    udiv w11, w8, w10
    sub w9, w9, w11
    add w9, w9, w11, lsr #2
    number w10, {epoch}
    sub w9, w9, w10                 // w9: days since 1970
    number w10, 86400
    umull x9, w9, w10
    ldrb w11, [x0, #4]
    cmp w11, #23
    b.hi triarch_efi_invalid
    mov w10, #3600
    umaddl x9, w11, w10, x9
    ldrb w11, [x0, #5]
    cmp w11, #59
    b.hi triarch_efi_invalid
    mov w10, #60
    umaddl x9, w11, w10, x9
    ldrb w11, [x0, #6]
    cmp w11, #59
    b.hi triarch_efi_invalid
    add x9, x9, x11
    ldrsh w11, [x0, #12]
    cmp w11, #0x7ff
    b.eq 2f
    smaddl x9, w11, w10, x9         // UTC is the local time and these minutes
2:  lsr x11, x9, #32
    cbnz x11, triarch_efi_invalid   // beyond what the PL031 counts, or before 1970
    number w10, {rtc}
    str w9, [x10, #{load}]
    mov x0, #0
    ret

triarch_efi_invalid:                // EFI_INVALID_PARAMETER
    mov x0, #2
    orr x0, x0, #0x8000000000000000
    ret

triarch_efi_unsupported:            // EFI_UNSUPPORTED
    mov x0, #3
    orr x0, x0, #0x8000000000000000
    ret
triarch_efi_runtime_end:

    .purgem divide
    .purgem number
    .popsection
    "#,
    rtc = const layout::RTC,
    data = const PL031_DATA,
    load = const PL031_LOAD,
    epoch = const EPOCH,
    days4_less_1 = const DAYS_OF_4_YEARS - 1,
    days100 = const DAYS_OF_100_YEARS,
    days400 = const DAYS_OF_400_YEARS,
    days400_less_1 = const DAYS_OF_400_YEARS - 1,
);

unsafe extern "C" {
    #[link_name = "triarch_efi_runtime"]
    static START: u8;
    #[link_name = "triarch_efi_get_time"]
    static GET_TIME: u8;
    #[link_name = "triarch_efi_set_time"]
    static SET_TIME: u8;
    #[link_name = "triarch_efi_unsupported"]
    static UNSUPPORTED: u8;
    #[link_name = "triarch_efi_runtime_end"]
    static END: u8;
}

/// The functions, for the guest's memory.
pub(super) fn code() -> RuntimeCode<'static> {
    let start = &raw const START;
    let offset = |at: *const u8| at.addr() - start.addr();
    let size = offset(&raw const END);
    RuntimeCode {
        // SAFETY: the symbols enclose the instructions above, in read-only data of this program.
        bytes: unsafe { std::slice::from_raw_parts(start, size) },
        get_time: offset(&raw const GET_TIME),
        set_time: offset(&raw const SET_TIME),
        unsupported: offset(&raw const UNSUPPORTED),
    }
}
