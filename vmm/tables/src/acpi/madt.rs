//! MADT (ACPI 5.2.12).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::config::{AcpiConfig, Cpu};
use super::table::Table;

/// The revision from which the online-capable flag is defined.
const REVISION: u8 = 5;
const ENABLED: u32 = 1;
const ONLINE_CAPABLE: u32 = 2;
/// Identifiers from here on need x2APIC structures; 0xFF is the broadcast.
pub(super) const FIRST_X2APIC_ID: u32 = 255;
const ALL_CPUS: u8 = 0xff;
const ALL_X2APIC_CPUS: u32 = 0xffff_ffff;
/// Local interrupt pin that NMI comes in on.
const NMI_PIN: u8 = 1;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalApic {
    kind: u8,
    length: u8,
    uid: u8,
    apic_id: u8,
    flags: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: U16,
    x2apic_id: U32,
    flags: U32,
    uid: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct IoApicEntry {
    kind: u8,
    length: u8,
    id: u8,
    reserved: u8,
    address: U32,
    gsi_base: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: U32,
    flags: U16,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalNmi {
    kind: u8,
    length: u8,
    uid: u8,
    flags: U16,
    pin: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2ApicNmi {
    kind: u8,
    length: u8,
    flags: U16,
    uid: U32,
    pin: u8,
    reserved: [u8; 3],
}

/// Whether the processor with index `uid` needs the structure with wide fields.
fn is_x2apic(uid: u32, cpu: &Cpu) -> bool {
    cpu.apic_id >= FIRST_X2APIC_ID || uid >= u32::from(ALL_CPUS)
}

/// The structure of one processor, with `flags` (also its `_MAT`).
fn cpu_entry(uid: u32, cpu: &Cpu, flags: u32) -> Vec<u8> {
    if is_x2apic(uid, cpu) {
        LocalX2Apic {
            kind: 9,
            length: size_of::<LocalX2Apic>() as u8,
            reserved: 0.into(),
            x2apic_id: cpu.apic_id.into(),
            flags: flags.into(),
            uid: uid.into(),
        }
        .as_bytes()
        .to_vec()
    } else {
        LocalApic {
            kind: 0,
            length: size_of::<LocalApic>() as u8,
            uid: uid as u8,
            apic_id: cpu.apic_id as u8,
            flags: flags.into(),
        }
        .as_bytes()
        .to_vec()
    }
}

/// The structure that `_MAT` of an added processor returns.
pub(super) fn enabled_cpu_entry(uid: u32, cpu: &Cpu) -> Vec<u8> {
    cpu_entry(uid, cpu, ENABLED)
}

pub(super) fn madt(config: &AcpiConfig) -> Vec<u8> {
    let interrupts = &config.interrupts;
    let mut table = Table::new(*b"APIC", REVISION);
    table.push(&interrupts.lapic_base.to_le_bytes());
    // No flags: there is no 8259 to be found in a hardware-reduced machine.
    table.push(&0u32.to_le_bytes());

    for (uid, cpu) in (0u32..).zip(&config.cpus) {
        let flags = if cpu.enabled { ENABLED } else { ONLINE_CAPABLE };
        table.push(&cpu_entry(uid, cpu, flags));
    }
    let ioapic = IoApicEntry {
        kind: 1,
        length: size_of::<IoApicEntry>() as u8,
        id: interrupts.ioapic.id,
        reserved: 0,
        address: interrupts.ioapic.base.into(),
        gsi_base: interrupts.ioapic.gsi_base.into(),
    };
    table.push(ioapic.as_bytes());
    for entry in &interrupts.overrides {
        let entry = SourceOverride {
            kind: 2,
            length: size_of::<SourceOverride>() as u8,
            bus: 0,
            source: entry.irq,
            gsi: entry.gsi.into(),
            flags: (entry.polarity as u16 | (entry.trigger as u16) << 2).into(),
        };
        table.push(entry.as_bytes());
    }
    let nmi = LocalNmi {
        kind: 4,
        length: size_of::<LocalNmi>() as u8,
        uid: ALL_CPUS,
        flags: 0.into(),
        pin: NMI_PIN,
    };
    table.push(nmi.as_bytes());
    let wide = (0u32..).zip(&config.cpus).any(|(uid, cpu)| is_x2apic(uid, cpu));
    if wide {
        let nmi = LocalX2ApicNmi {
            kind: 10,
            length: size_of::<LocalX2ApicNmi>() as u8,
            flags: 0.into(),
            uid: ALL_X2APIC_CPUS.into(),
            pin: NMI_PIN,
            reserved: [0; 3],
        };
        table.push(nmi.as_bytes());
    }
    table.finish()
}
