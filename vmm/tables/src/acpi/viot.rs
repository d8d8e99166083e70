//! VIOT: which PCI functions are behind a virtio-iommu (ACPI 6.5, Virtual I/O Translation Table).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::config::PciSegment;
use super::table::Table;

/// The table's header and its own fields.
const NODES_AT: u16 = 48;
const PCI_RANGE: u8 = 1;
const VIRTIO_IOMMU_PCI: u8 = 3;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Range {
    kind: u8,
    reserved: u8,
    length: U16,
    first_endpoint: U32,
    first_segment: U16,
    last_segment: U16,
    first: U16,
    last: U16,
    output_node: U16,
    reserved2: [u8; 6],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Iommu {
    kind: u8,
    reserved: u8,
    length: U16,
    segment: U16,
    requester: U16,
    reserved2: [u8; 8],
}

const _: () = assert!(size_of::<Range>() == 24);
const _: () = assert!(size_of::<Iommu>() == 16);

/// The table, if a segment has an IOMMU. Endpoints have the numbers of their requester ids, so there is one segment at most that has one.
pub(super) fn viot(segments: &[PciSegment]) -> Option<Vec<u8>> {
    let (segment, iommu) = segments
        .iter()
        .find_map(|pci| Some((pci.segment, pci.iommu.as_ref()?)))?;
    let mut table = Table::new(*b"VIOT", 0);
    table.push(&(iommu.behind.len() as u16 + 1).to_le_bytes());
    table.push(&NODES_AT.to_le_bytes());
    table.push(&[0; 8]);
    let node = Iommu {
        kind: VIRTIO_IOMMU_PCI,
        reserved: 0,
        length: (size_of::<Iommu>() as u16).into(),
        segment: segment.into(),
        requester: iommu.requester.into(),
        reserved2: [0; 8],
    };
    table.push(node.as_bytes());
    for (first, last) in &iommu.behind {
        let range = Range {
            kind: PCI_RANGE,
            reserved: 0,
            length: (size_of::<Range>() as u16).into(),
            first_endpoint: u32::from(*first).into(),
            first_segment: segment.into(),
            last_segment: segment.into(),
            first: (*first).into(),
            last: (*last).into(),
            output_node: NODES_AT.into(),
            reserved2: [0; 6],
        };
        table.push(range.as_bytes());
    }
    Some(table.finish())
}
