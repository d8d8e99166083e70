//! Serial port, RTC, reset and debug ports, ACPI registers.
//!
//! Each device is a [`BusDevice`](triarch_device_core::BusDevice) that knows its registers and nothing of where they are: the
//! machine claims the addresses. Host consoles ([`console`]) are here because the serial port is their first user.

mod calendar;
mod clock;
mod cmos;
pub mod console;
mod debug;
mod hotplug;
mod i8042;
mod pl011;
mod pl031;
mod pl061;
mod port;
#[cfg(test)]
mod port_rig;
mod power;
mod primecell;
mod serial;

pub use clock::{Clock, HostClock};
pub use cmos::{CMOS_PORTS, Cmos, CmosStateV1};
pub use debug::{DEBUG_PORT_MAGIC, DebugPort, PostPort};
pub use hotplug::{
    CpuHotplug, CpuHotplugConfig, CpuHotplugRestoreError, CpuHotplugStateV1, CpuSlot, CpuSlotStateV1, MemoryHotplug,
    MemoryHotplugRestoreError, MemoryHotplugStateV1, MemoryPlace, MemorySlot, MemorySlotStateV1, Notice, PCI_SLOTS,
    PciHotplug, PciHotplugRestoreError, PciHotplugStateV1, PciSlot, PciSlotStateV1, Removal,
};
pub use i8042::{I8042, I8042_PORTS, I8042StateV1};
pub use pl011::{PL011_SIZE, Pl011, Pl011RestoreError, Pl011StateV1};
pub use pl031::{PL031_DATA, PL031_LOAD, PL031_SIZE, Pl031, Pl031StateV1};
pub use pl061::{PL061_SIZE, Pl061, Pl061StateV1};
pub use port::SerialPort;
pub use power::{
    Ged, GedEvents, GedStateV1, PM_TIMER_HZ, PmTimer, PmTimerStateV1, PowerEvent, PowerSink, ResetPort, ResetRegister,
    S5_SLEEP_TYPE, SLEEP_OFF, SleepControl,
};
pub use serial::{SERIAL_PORTS, Serial, SerialRestoreError, SerialStateV1};
