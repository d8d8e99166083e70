//! SRAT and SLIT (ACPI 5.2.16, 5.2.17).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::config::AcpiConfig;
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
const _: () = assert!(size_of::<MemoryAffinityEntry>() == 40);

pub(super) fn srat(config: &AcpiConfig) -> Vec<u8> {
    let mut table = Table::new(*b"SRAT", SRAT_REVISION);
    // Reserved, but 1 for compatibility with the first revision.
    table.push(&1u32.to_le_bytes());
    table.push(&[0; 8]);
    for cpu in &config.cpus {
        if cpu.apic_id < FIRST_X2APIC_ID {
            let [low, high @ ..] = cpu.node.to_le_bytes();
            let mut entry = CpuAffinity::new_zeroed();
            entry.kind = 0;
            entry.length = size_of::<CpuAffinity>() as u8;
            entry.domain_low = low;
            entry.domain_high = high;
            entry.apic_id = cpu.apic_id as u8;
            entry.flags = ENABLED.into();
            table.push(entry.as_bytes());
        } else {
            let mut entry = X2ApicAffinity::new_zeroed();
            entry.kind = 2;
            entry.length = size_of::<X2ApicAffinity>() as u8;
            entry.domain = cpu.node.into();
            entry.x2apic_id = cpu.apic_id.into();
            entry.flags = ENABLED.into();
            table.push(entry.as_bytes());
        }
    }
    for (domain, node) in (0u32..).zip(&config.numa) {
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
pub(super) fn slit(config: &AcpiConfig) -> Option<Vec<u8>> {
    if config.numa.first()?.distances.is_empty() {
        return None;
    }
    let mut table = Table::new(*b"SLIT", SLIT_REVISION);
    table.push(&(config.numa.len() as u64).to_le_bytes());
    for node in &config.numa {
        table.push(&node.distances);
    }
    Some(table.finish())
}
