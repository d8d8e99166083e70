//! What a vCPU leaves the guest for, served.

use std::sync::Arc;

use triarch_device_core::{AccessError, Bus, RateLimit};
use triarch_hypervisor::Exit;

use crate::run::VcpuEvent;

/// Where exits are dispatched to.
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O, by GPA.
    pub mmio: Arc<Bus>,
}

/// Serves `exit`; what became of it, if that is more.
pub(crate) fn dispatch(exit: Exit<'_>, buses: &Buses, log: &RateLimit) -> Option<VcpuEvent> {
    let Buses { pio, mmio } = buses;
    match exit {
        Exit::PortOut { port, size, data } => {
            for value in data.chunks(size) {
                note(log, "port write", u64::from(port), pio.write(u64::from(port), value));
            }
        }
        Exit::PortIn { port, size, data } => {
            for value in data.chunks_mut(size) {
                note(log, "port read", u64::from(port), pio.read(u64::from(port), value));
            }
        }
        Exit::MmioWrite { address, data } => note(log, "write", address, mmio.write(address, data)),
        Exit::MmioRead { address, data } => note(log, "read", address, mmio.read(address, data)),
        // Served where the vCPU is at hand.
        Exit::Interrupted | Exit::Waiting | Exit::Call(_) => {}
        Exit::Shutdown => return Some(VcpuEvent::Reset),
        Exit::SystemEvent(kind) => return Some(system_event(kind)),
        Exit::Halted => return Some(VcpuEvent::PowerOff),
        Exit::Failed(reason) => return Some(VcpuEvent::Failed(reason)),
    }
    None
}

fn system_event(kind: u32) -> VcpuEvent {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => VcpuEvent::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => VcpuEvent::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => VcpuEvent::Crashed,
        other => VcpuEvent::Failed(format!("KVM reported the unknown system event {other}")),
    }
}

/// Guests probe for devices all the time, so an access nobody serves is worth a line only when somebody debugs.
fn note(log: &RateLimit, what: &str, address: u64, outcome: Result<(), AccessError>) {
    if let Err(error) = outcome
        && tracing::enabled!(tracing::Level::DEBUG)
        && log.admit().is_some()
    {
        tracing::debug!("{what} at {address:#x}: {error}");
    }
}
