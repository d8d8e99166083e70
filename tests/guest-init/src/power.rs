//! Ends of the machine: power-off, restart, panic and the power button.

use crate::proto::Power;
use crate::sys;
use std::fs::{self, File};
use std::io::{self, Read};

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` on 64-bit kernels: two 8-byte times, type, code, value.
const EVENT_SIZE: usize = 24;

/// Writes back what is cached and ends the machine. Returns only on failure.
///
/// # Errors
/// The kernel refused: not root, or no `/proc`.
pub fn end(action: Power) -> io::Result<()> {
    sys::sync();
    match action {
        Power::Poweroff => sys::reboot(libc::RB_POWER_OFF),
        Power::Reboot => sys::reboot(libc::RB_AUTOBOOT),
        Power::Panic => fs::write("/proc/sysrq-trigger", "c"),
    }
}

/// The input devices on which a power button may be pressed.
pub struct Button {
    devices: Vec<File>,
}

impl Button {
    /// Opens the devices: presses from now on are seen. `None` if there are none.
    pub fn open() -> Option<Self> {
        let devices: Vec<File> = fs::read_dir("/dev/input")
            .ok()?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
            .filter_map(|entry| File::open(entry.path()).ok())
            .collect();
        (!devices.is_empty()).then_some(Self { devices })
    }

    /// Waits for a press; `None` if all devices went away.
    pub fn wait(mut self) -> Option<()> {
        while !self.devices.is_empty() {
            let ready = sys::wait_readable(&self.devices).ok()?;
            let mut event = [0; EVENT_SIZE];
            match self.devices[ready].read(&mut event) {
                Ok(EVENT_SIZE) if is_press(&event) => return Some(()),
                Ok(n) if n > 0 => {}
                _ => drop(self.devices.swap_remove(ready)),
            }
        }
        None
    }
}

fn is_press(event: &[u8; EVENT_SIZE]) -> bool {
    let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    half(16) == EV_KEY && half(18) == KEY_POWER && event[20..] == 1_i32.to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_a_press_from_a_release() {
        let mut event = [0; EVENT_SIZE];
        event[16..18].copy_from_slice(&EV_KEY.to_ne_bytes());
        event[18..20].copy_from_slice(&KEY_POWER.to_ne_bytes());
        event[20..].copy_from_slice(&1_i32.to_ne_bytes());
        assert!(is_press(&event));
        event[20] = 0;
        assert!(!is_press(&event));
    }
}
