//! Doorbells: guest writes that become events without leaving the kernel.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A guest address a doorbell sits at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// An I/O port.
    Pio(u64),
    /// A guest physical address.
    Mmio(u64),
}

/// Attaches event descriptors to guest addresses (KVM's ioeventfd).
pub trait IoEvents: Send + Sync {
    /// From now on a guest write of any size and value at `addr` signals `fd` and does nothing else.
    fn attach(&self, fd: &EventFd, addr: IoAddress) -> io::Result<()>;
    /// Undoes [`attach`](Self::attach).
    fn detach(&self, fd: &EventFd, addr: IoAddress) -> io::Result<()>;
}
