//! A console's port in the guest, whatever its registers are.

use std::sync::Arc;

use triarch_device_core::BusDevice;

use crate::console::Console;

/// A device with a [`Console`] behind it that a thread has to bring the input into: a 16550A on a PC, a PL011 on ARM.
pub trait SerialPort: BusDevice {
    /// The console behind the port. Its descriptor is the one to watch.
    fn console(&self) -> &Arc<Console>;

    /// Moves input from the console into the port as far as there is room. To be called when the console's descriptor is readable.
    fn on_event(&self);
}
