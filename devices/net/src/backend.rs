//! What a network device needs of the host's side.

use std::io;
use std::sync::Arc;

use bitflags::bitflags;

use crate::PacketQueue;

bitflags! {
    /// Work the receiver of a packet from the host accepts to find undone (the kernel's TUN_F_* flags).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Offloads: u32 {
        /// Checksums may be partial. Without it none of the others holds.
        const CSUM = libc::TUN_F_CSUM;
        /// TCP segments over IPv4 may be up to 64 KiB.
        const TSO4 = libc::TUN_F_TSO4;
        /// TCP segments over IPv6 may be up to 64 KiB.
        const TSO6 = libc::TUN_F_TSO6;
        /// Large TCP segments may carry ECN marks.
        const TSO_ECN = libc::TUN_F_TSO_ECN;
        /// UDP datagrams may need fragmentation.
        const UFO = libc::TUN_F_UFO;
        /// UDP over IPv4 may be a row of datagrams.
        const USO4 = libc::TUN_F_USO4;
        /// UDP over IPv6 may be a row of datagrams.
        const USO6 = libc::TUN_F_USO6;
    }
}

/// The host's side of a network device: one packet queue for each queue pair, each packet preceded by
/// [`HEADER_LEN`](crate::HEADER_LEN) bytes of header.
pub trait PacketBackend: Send + Sync {
    /// The queues, at least one.
    fn queues(&self) -> &[Arc<PacketQueue>];
    /// The offloads [`set_offloads`](Self::set_offloads) takes.
    fn offloads(&self) -> Offloads;
    /// Says what the receiver accepts; what is not in [`offloads`](Self::offloads) is left out. Packets on the way may
    /// still be of the old kind.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
    /// Takes queue `index` in or out of use; the host spreads packets over the queues in use. Nothing changes when it is so
    /// already, or there is only one.
    fn set_queue_active(&self, index: usize, active: bool) -> io::Result<()>;
    /// The largest frame without its Ethernet header, in bytes, if known.
    fn mtu(&self) -> Option<u32>;
}
