//! What happens when a belief of the guest proves wrong: one line on the serial port, then the processor stops.

use crate::arch::power;
use crate::serial;
use alloc::format;
use core::panic::PanicInfo;

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    serial::write(&format!("\npanic {info}\n"));
    power::park()
}

/// The library's landing pads name it; with panics that stop the processor nothing gets there.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    power::park()
}
