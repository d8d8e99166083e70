//! Feature bits of network devices (virtio 1.2, 5.1.3 and 6).

use crate::offload::Accepts;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
/// A packet may fill several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const MQ: u64 = 1 << 22;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device.
pub const VERSION_1: u64 = 1 << 32;
const GUEST_USO4: u64 = 1 << 54;
const GUEST_USO6: u64 = 1 << 55;
const HOST_USO: u64 = 1 << 56;

/// What every port offers.
const ALWAYS: u64 = CSUM
    | GUEST_CSUM
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF
    | STATUS
    | INDIRECT_DESC
    | EVENT_IDX
    | VERSION_1
    | GUEST_USO4
    | GUEST_USO6
    | HOST_USO;

/// The features a port offers.
pub fn offered(pairs: usize, mac: bool, mtu: bool) -> u64 {
    let some = |condition, bit| if condition { bit } else { 0 };
    ALWAYS | some(pairs > 1, MQ) | some(mac, MAC) | some(mtu, MTU)
}

/// What a guest takes undone.
pub fn accepts(features: u64) -> Accepts {
    let has = |bit| features & bit != 0;
    Accepts {
        csum: has(GUEST_CSUM),
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
        uso4: has(GUEST_USO4),
        uso6: has(GUEST_USO6),
    }
}

/// What a guest may leave undone.
pub fn leaves(features: u64) -> Accepts {
    let has = |bit| features & bit != 0;
    Accepts {
        csum: has(CSUM),
        tso4: has(HOST_TSO4),
        tso6: has(HOST_TSO6),
        ecn: has(HOST_ECN),
        uso4: has(HOST_USO),
        uso6: has(HOST_USO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_takes_all_that_is_offered_leaves_and_takes_everything_undone() {
        let all = offered(1, false, false);
        assert_eq!((accepts(all), leaves(all)), (Accepts::ALL, Accepts::ALL));
        assert_eq!(offered(2, true, true) & !all, MQ | MAC | MTU);
        assert_eq!(accepts(VERSION_1), Accepts::default());
    }
}
