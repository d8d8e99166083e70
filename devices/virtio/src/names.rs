//! What features are called, for sentences to people (virtio 1.3, 5 and 6).

use crate::DeviceId;

/// The bit, and the name behind `VIRTIO_F_` or `VIRTIO_BLK_F_`.
type Table = &'static [(u32, &'static str)];

/// Features of any device.
const ANY: Table = &[
    (24, "NOTIFY_ON_EMPTY"),
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
];

const BLOCK: Table = &[
    (1, "SIZE_MAX"),
    (2, "SEG_MAX"),
    (4, "GEOMETRY"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
    (15, "LIFETIME"),
    (16, "SECURE_ERASE"),
    (17, "ZONED"),
];

const NET: Table = &[
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (2, "CTRL_GUEST_OFFLOADS"),
    (3, "MTU"),
    (5, "MAC"),
    (7, "GUEST_TSO4"),
    (8, "GUEST_TSO6"),
    (9, "GUEST_ECN"),
    (10, "GUEST_UFO"),
    (11, "HOST_TSO4"),
    (12, "HOST_TSO6"),
    (13, "HOST_ECN"),
    (14, "HOST_UFO"),
    (15, "MRG_RXBUF"),
    (16, "STATUS"),
    (17, "CTRL_VQ"),
    (18, "CTRL_RX"),
    (19, "CTRL_VLAN"),
    (21, "GUEST_ANNOUNCE"),
    (22, "MQ"),
    (23, "CTRL_MAC_ADDR"),
    (54, "GUEST_USO4"),
    (55, "GUEST_USO6"),
    (56, "HOST_USO"),
    (57, "HASH_REPORT"),
    (59, "GUEST_HDRLEN"),
    (60, "RSS"),
    (61, "RSC_EXT"),
    (62, "STANDBY"),
    (63, "SPEED_DUPLEX"),
];

const IOMMU: Table = &[
    (0, "INPUT_RANGE"),
    (1, "DOMAIN_RANGE"),
    (2, "MAP_UNMAP"),
    (3, "BYPASS"),
    (4, "PROBE"),
    (5, "MMIO"),
    (6, "BYPASS_CONFIG"),
];

const FS: Table = &[(0, "NOTIFICATION")];

/// The names of `features` of a device, in the order of their bits, with commas; a bit without a name is `bit 42`.
#[must_use]
pub fn feature_names(device: DeviceId, features: u64) -> String {
    let (kind, own): (_, Table) = match device {
        DeviceId::Block => ("BLK_", BLOCK),
        DeviceId::Net => ("NET_", NET),
        DeviceId::Fs => ("FS_", FS),
        DeviceId::Iommu => ("IOMMU_", IOMMU),
        _ => ("", &[]),
    };
    let find = |table: Table, bit| table.iter().find(|(of, _)| *of == bit).map(|(_, name)| *name);
    let set = (0..u64::BITS).filter(|bit| features >> bit & 1 != 0);
    let names = set.map(|bit| match (find(own, bit), find(ANY, bit)) {
        (Some(name), _) => format!("VIRTIO_{kind}F_{name}"),
        (None, Some(name)) => format!("VIRTIO_F_{name}"),
        (None, None) => format!("bit {bit}"),
    });
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{block_feature, feature};

    #[test]
    fn features_have_names() {
        let names = |device, features| feature_names(device, features);
        let mixed = block_feature::WRITE_ZEROES | block_feature::DISCARD | feature::RING_RESET | 1 << 50;
        assert_eq!(
            names(DeviceId::Block, mixed),
            "VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_F_RING_RESET, bit 50"
        );
        let net = crate::net::features::MRG_RXBUF | crate::net::features::MQ;
        assert_eq!(names(DeviceId::Net, net), "VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MQ");
        assert_eq!(names(DeviceId::Other(41), 1), "bit 0");
        assert_eq!(names(DeviceId::Net, 0), "");
    }

    #[test]
    fn tables_are_in_order() {
        for table in [ANY, BLOCK, NET, FS, IOMMU] {
            assert!(table.is_sorted_by(|a, b| a.0 < b.0));
        }
    }
}
