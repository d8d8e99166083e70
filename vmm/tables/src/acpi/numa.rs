//! SRAT and SLIT (ACPI 5.2.16, 5.2.17).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::AcpiError;
use super::config::{NumaNode, PciSegment, check_window};
use super::madt::FIRST_X2APIC_ID;
use super::table::Table;

const SRAT_REVISION: u8 = 3;
const SLIT_REVISION: u8 = 1;
const ENABLED: u32 = 1;
const HOT_PLUGGABLE: u32 = 2;

#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct CpuAffinity {
    kind: u8,
    length: u8,
    domain_low: u8,
    apic_id: u8,
    flags: U32,
    sapic_eid: u8,
    domain_high: [u8; 3],
    clock_domain: U32,
}

#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct X2ApicAffinity {
    kind: u8,
    length: u8,
    reserved: U16,
    domain: U32,
    x2apic_id: U32,
    flags: U32,
    clock_domain: U32,
    reserved2: U32,
}

#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct GiccAffinity {
    kind: u8,
    length: u8,
    domain: U32,
    uid: U32,
    flags: U32,
    clock_domain: U32,
}

#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct MemoryAffinityEntry {
    kind: u8,
    length: u8,
    domain: U32,
    reserved: U16,
    base: U64,
    size: U64,
    reserved2: U32,
    flags: U32,
    reserved3: U64,
}

const _: () = assert!(size_of::<CpuAffinity>() == 16);
const _: () = assert!(size_of::<X2ApicAffinity>() == 24);
const _: () = assert!(size_of::<GiccAffinity>() == 18);
const _: () = assert!(size_of::<MemoryAffinityEntry>() == 40);

/// What the table says of a processor with a local APIC.
pub(super) fn apic(apic_id: u32, node: u32) -> Vec<u8> {
    if apic_id < FIRST_X2APIC_ID {
        let [low, high @ ..] = node.to_le_bytes();
        let mut entry = CpuAffinity::new_zeroed();
        entry.kind = 0;
        entry.length = size_of::<CpuAffinity>() as u8;
        entry.domain_low = low;
        entry.domain_high = high;
        entry.apic_id = apic_id as u8;
        entry.flags = ENABLED.into();
        return entry.as_bytes().to_vec();
    }
    let mut entry = X2ApicAffinity::new_zeroed();
    entry.kind = 2;
    entry.length = size_of::<X2ApicAffinity>() as u8;
    entry.domain = node.into();
    entry.x2apic_id = apic_id.into();
    entry.flags = ENABLED.into();
    entry.as_bytes().to_vec()
}

/// What the table says of a processor with a GIC interface: it is named by its ACPI processor UID.
pub(super) fn gicc(uid: u32, node: u32) -> Vec<u8> {
    let mut entry = GiccAffinity::new_zeroed();
    entry.kind = 3;
    entry.length = size_of::<GiccAffinity>() as u8;
    entry.domain = node.into();
    entry.uid = uid.into();
    entry.flags = ENABLED.into();
    entry.as_bytes().to_vec()
}

/// The nodes of processors, told by `cpus`, and of memory. Processors that come later are told of as well: Linux gives them their node
/// at its start.
pub(super) fn srat(cpus: impl Iterator<Item = Vec<u8>>, nodes: &[NumaNode]) -> Vec<u8> {
    let mut table = Table::new(*b"SRAT", SRAT_REVISION);
    // Reserved, but 1 for compatibility with the first revision.
    table.push(&1u32.to_le_bytes());
    table.push(&[0; 8]);
    cpus.for_each(|cpu| table.push(&cpu));
    for (domain, node) in (0u32..).zip(nodes) {
        for memory in &node.memory {
            let hotplug = if memory.hotplug { HOT_PLUGGABLE } else { 0 };
            let mut entry = MemoryAffinityEntry::new_zeroed();
            entry.kind = 1;
            entry.length = size_of::<MemoryAffinityEntry>() as u8;
            entry.domain = domain.into();
            entry.base = memory.start.into();
            entry.size = memory.size.into();
            entry.flags = (ENABLED | hotplug).into();
            table.push(entry.as_bytes());
        }
    }
    table.finish()
}

/// The distances, if the configuration has them.
pub(super) fn slit(nodes: &[NumaNode]) -> Option<Vec<u8>> {
    if nodes.first()?.distances.is_empty() {
        return None;
    }
    let mut table = Table::new(*b"SLIT", SLIT_REVISION);
    table.push(&(nodes.len() as u64).to_le_bytes());
    nodes.iter().for_each(|node| table.push(&node.distances));
    Some(table.finish())
}

/// Checks that `nodes` have what processors in `cpus` and segments say, that distances are a square, and that memory is some.
pub(super) fn check(
    nodes: &[NumaNode],
    cpus: impl Iterator<Item = u32>,
    segments: &[PciSegment],
) -> Result<(), AcpiError> {
    let Some(first) = nodes.first() else {
        return Ok(());
    };
    let count = nodes.len();
    let mut used = cpus.chain(segments.iter().map(|segment| segment.node));
    if let Some(node) = used.find(|&node| node as usize >= count) {
        let text = format!("node {node} is used and there are {count} nodes");
        return Err(AcpiError::BadNuma(text));
    }
    let expected = if first.distances.is_empty() { 0 } else { count };
    for (index, node) in nodes.iter().enumerate() {
        let told = node.distances.len();
        if told != expected {
            let text = format!("node {index} has {told} distances instead of {expected}");
            return Err(AcpiError::BadNuma(text));
        }
        for memory in &node.memory {
            check_window("NUMA memory", memory.start, memory.size)?;
        }
    }
    Ok(())
}
