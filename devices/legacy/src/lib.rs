//! Serial port, RTC, reset and debug ports, ACPI registers.
//!
//! Each device is a [`BusDevice`](triarch_device_core::BusDevice) that knows its registers and nothing of where they are: the
//! machine claims the addresses. Host consoles ([`console`]) are here because the serial port is their first user.

pub mod console;
mod serial;

pub use serial::{SERIAL_PORTS, Serial, SerialRestoreError, SerialStateV1};
