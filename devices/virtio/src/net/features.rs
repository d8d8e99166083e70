//! Feature bits and configuration of a network device (virtio 1.2, 5.1.3 and 5.1.4).

use triarch_net::Offloads;

/// The driver may leave checksums of packets it sends to the device.
pub const CSUM: u64 = 1 << 0;
/// The device may leave checksums of packets it gives to the driver.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The driver can switch offloads towards it.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The device tells the largest packet.
pub const MTU: u64 = 1 << 3;
/// The device tells an address.
pub const MAC: u64 = 1 << 5;
/// The driver takes large TCP segments over IPv4.
pub const GUEST_TSO4: u64 = 1 << 7;
/// The driver takes large TCP segments over IPv6.
pub const GUEST_TSO6: u64 = 1 << 8;
/// The driver takes those with ECN.
pub const GUEST_ECN: u64 = 1 << 9;
/// The driver takes large UDP datagrams.
pub const GUEST_UFO: u64 = 1 << 10;
/// The device takes large TCP segments over IPv4.
pub const HOST_TSO4: u64 = 1 << 11;
/// The device takes large TCP segments over IPv6.
pub const HOST_TSO6: u64 = 1 << 12;
/// The device takes those with ECN.
pub const HOST_ECN: u64 = 1 << 13;
/// The device takes large UDP datagrams.
pub const HOST_UFO: u64 = 1 << 14;
/// A packet may fill several buffers of the driver.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The device tells whether the link is up.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// The driver can choose which packets it gets.
pub const CTRL_RX: u64 = 1 << 18;
/// The driver can choose VLANs.
pub const CTRL_VLAN: u64 = 1 << 19;
/// The driver can choose in more ways.
pub const CTRL_RX_EXTRA: u64 = 1 << 20;
/// The driver can announce its addresses when asked.
pub const GUEST_ANNOUNCE: u64 = 1 << 21;
/// There are several queue pairs.
pub const MQ: u64 = 1 << 22;
/// The driver can set the address.
pub const CTRL_MAC_ADDR: u64 = 1 << 23;
/// The driver takes UDP datagrams to be segmented over IPv4.
pub const GUEST_USO4: u64 = 1 << 54;
/// The driver takes UDP datagrams to be segmented over IPv6.
pub const GUEST_USO6: u64 = 1 << 55;
/// The device takes UDP datagrams to be segmented.
pub const HOST_USO: u64 = 1 << 56;

/// What needs nothing of whoever moves the packets.
pub(super) const OURS: u64 =
    MAC | STATUS | CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | CTRL_MAC_ADDR | GUEST_ANNOUNCE;
/// What whoever moves the packets must be able to do.
pub const MOVER: u64 = CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | GUEST_UFO
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | HOST_UFO
    | MRG_RXBUF
    | GUEST_USO4
    | GUEST_USO6
    | HOST_USO;
/// What every network device here offers.
pub(super) const BASE: u64 = OURS | MRG_RXBUF;

/// The features that are offloads towards the guest, with what the host calls them. Their bits name them in the control command
/// too (virtio 1.2, 5.1.6.5.6.1).
const GUEST_OFFLOADS: [(u64, Offloads); 7] = [
    (GUEST_CSUM, Offloads::CSUM),
    (GUEST_TSO4, Offloads::TSO4),
    (GUEST_TSO6, Offloads::TSO6),
    (GUEST_ECN, Offloads::TSO_ECN),
    (GUEST_UFO, Offloads::UFO),
    (GUEST_USO4, Offloads::USO4),
    (GUEST_USO6, Offloads::USO6),
];

/// The offloads towards the guest among `features`.
pub(super) fn guest_offloads(features: u64) -> u64 {
    GUEST_OFFLOADS.iter().fold(0, |all, (bit, _)| all | (features & bit))
}

/// The host's names of the offloads in `features`.
pub(super) fn to_host(features: u64) -> Offloads {
    let named = GUEST_OFFLOADS.iter().filter(|(bit, _)| features & bit != 0);
    named.fold(Offloads::empty(), |all, (_, host)| all | *host)
}

/// Which groups of offloads a device may offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffloadGroups {
    /// Partial checksums, without which the others do not go either.
    pub csum: bool,
    /// Large TCP segments.
    pub tso: bool,
    /// Large UDP datagrams: fragmentation and segmentation.
    pub ufo: bool,
}

impl OffloadGroups {
    /// The features that must not be offered because of a group that is switched off.
    pub fn withheld(self) -> u64 {
        let mut features = 0;
        if !self.csum {
            features |= MOVER & !MRG_RXBUF;
        }
        if !self.tso {
            features |= GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
        }
        if !self.ufo {
            features |= GUEST_UFO | HOST_UFO | GUEST_USO4 | GUEST_USO6 | HOST_USO;
        }
        features
    }
}

impl Default for OffloadGroups {
    fn default() -> Self {
        Self {
            csum: true,
            tso: true,
            ufo: true,
        }
    }
}

/// The offload features to offer: those of `groups` that the host can do.
pub(super) fn offered(groups: OffloadGroups, host: Offloads) -> u64 {
    if !groups.csum || !host.contains(Offloads::CSUM) {
        return 0;
    }
    let mut features = CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS;
    if groups.tso && host.contains(Offloads::TSO4 | Offloads::TSO6 | Offloads::TSO_ECN) {
        features |= GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
    }
    if groups.ufo && host.contains(Offloads::UFO) {
        features |= GUEST_UFO | HOST_UFO;
    }
    if groups.ufo && host.contains(Offloads::USO4 | Offloads::USO6) {
        features |= GUEST_USO4 | GUEST_USO6 | HOST_USO;
    }
    features
}
