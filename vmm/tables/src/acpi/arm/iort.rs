//! IORT: how messages of PCI functions reach the ITS (Arm DEN 0049).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::super::config::PciSegment;
use super::super::table::Table;

/// Revision E.b of the specification.
const REVISION: u8 = 3;
/// Number of the ITS, as in MADT.
pub(super) const ITS_ID: u32 = 0;
/// The table's header and its own fields.
const NODES_AT: u32 = 48;
/// Requester ids of a segment, less one as the table counts.
const REQUESTERS: u32 = 0xffff;
/// Coherent without anybody's help: same attributes as the CPUs' (CPM), and cacheable (DACS).
const COHERENT: u32 = 1;
const MEMORY_FLAGS: u8 = 3;
const ALL_64_BITS: u8 = 64;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Node {
    kind: u8,
    length: U16,
    revision: u8,
    id: U32,
    mappings: U32,
    mappings_at: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ItsGroup {
    node: Node,
    count: U32,
    its: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RootComplex {
    node: Node,
    coherency: U32,
    hints: u8,
    reserved: U16,
    memory_flags: u8,
    ats: U32,
    segment: U32,
    address_bits: u8,
    pasid: U16,
    reserved2: u8,
    flags: U32,
    mapping: Mapping,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Mapping {
    input: U32,
    count: U32,
    output: U32,
    output_node: U32,
    flags: U32,
}

const _: () = assert!(size_of::<ItsGroup>() == 24);
const _: () = assert!(size_of::<RootComplex>() == 60);

pub(super) fn iort(roots: &[PciSegment]) -> Vec<u8> {
    let segments = PciSegment::joined(roots);
    let mut table = Table::new(*b"IORT", REVISION);
    table.push(&(segments.len() as u32 + 1).to_le_bytes());
    table.push(&NODES_AT.to_le_bytes());
    table.push(&[0; 4]);
    let group = ItsGroup {
        node: Node {
            kind: 0,
            length: (size_of::<ItsGroup>() as u16).into(),
            revision: 1,
            id: 0.into(),
            mappings: 0.into(),
            mappings_at: 0.into(),
        },
        count: 1.into(),
        its: ITS_ID.into(),
    };
    table.push(group.as_bytes());
    for (id, segment) in (1u32..).zip(&segments) {
        let size = size_of::<RootComplex>();
        let root = RootComplex {
            node: Node {
                kind: 2,
                length: (size as u16).into(),
                revision: 3,
                id: id.into(),
                mappings: 1.into(),
                mappings_at: ((size - size_of::<Mapping>()) as u32).into(),
            },
            coherency: COHERENT.into(),
            hints: 0,
            reserved: 0.into(),
            memory_flags: MEMORY_FLAGS,
            ats: 0.into(),
            segment: u32::from(segment.segment).into(),
            address_bits: ALL_64_BITS,
            pasid: 0.into(),
            reserved2: 0,
            flags: 0.into(),
            mapping: Mapping {
                input: 0.into(),
                count: REQUESTERS.into(),
                output: 0.into(),
                output_node: NODES_AT.into(),
                flags: 0.into(),
            },
        };
        table.push(root.as_bytes());
    }
    table.finish()
}
