//! The serial line: replies go out, commands come in.

use crate::arch::uart;
use crate::interrupts;
use alloc::string::String;

pub use uart::{VECTOR, init, read_byte, write};

/// Sleeps until a line has come in; without its end.
pub fn read_line() -> String {
    let mut line = String::new();
    loop {
        let seen = interrupts::count(VECTOR);
        while let Some(byte) = read_byte() {
            match byte {
                b'\n' | b'\r' if line.is_empty() => {}
                b'\n' | b'\r' => return line,
                byte if line.len() < 4096 => line.push(char::from(byte)),
                _ => {}
            }
        }
        interrupts::sleep(VECTOR, seen, 0);
    }
}
