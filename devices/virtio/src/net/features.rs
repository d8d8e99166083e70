//! Feature bits and configuration of a network device (virtio 1.2, 5.1.3 and 5.1.4).

use triarch_net::Offloads;

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const GUEST_UFO: u64 = 1 << 10;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const HOST_UFO: u64 = 1 << 14;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const CTRL_RX: u64 = 1 << 18;
pub(super) const CTRL_VLAN: u64 = 1 << 19;
pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(super) const MQ: u64 = 1 << 22;
pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
pub(super) const GUEST_USO4: u64 = 1 << 54;
pub(super) const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;

/// What every network device here offers.
pub(super) const BASE: u64 =
    MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_RX_EXTRA | CTRL_MAC_ADDR | GUEST_ANNOUNCE;

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
