//! Interrupts as devices see them.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A wired, edge-triggered interrupt.
pub trait InterruptLine: Send + Sync {
    /// Raises one edge.
    fn trigger(&self) -> io::Result<()>;
}

/// What an MSI writes and where (PCI Local Bus 3.0, 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Address (GPA) the function writes to.
    pub address: u64,
    /// Value it writes.
    pub data: u32,
}

/// Hands out message-signalled interrupts.
pub trait MsiRouter: Send + Sync {
    /// Makes a vector for the function with requester id `requester` (bus, device, function). It starts masked and frees what
    /// it holds when dropped. Fails when the hypervisor has no interrupt left.
    fn allocate(&self, requester: u16) -> io::Result<Arc<dyn MsiVector>>;
}

/// One message-signalled interrupt: an event descriptor that, while unmasked, becomes a message to the guest without passing
/// through the VMM.
pub trait MsiVector: Send + Sync {
    /// Delivers `message` on each trigger from now on, first of all for one that came while masked.
    fn unmask(&self, message: MsiMessage) -> io::Result<()>;
    /// Its function has the requester id `requester` from now on.
    fn rename(&self, requester: u16) -> io::Result<()>;
    /// Holds triggers back; the last one is kept.
    fn mask(&self) -> io::Result<()>;
    /// Raises the interrupt, or marks it pending while masked.
    fn trigger(&self) -> io::Result<()>;
    /// Whether a trigger is waiting behind the mask.
    fn pending(&self) -> bool;
    /// The descriptor behind [`trigger`](Self::trigger), for handing to another process or the kernel.
    fn event_fd(&self) -> &EventFd;
}
