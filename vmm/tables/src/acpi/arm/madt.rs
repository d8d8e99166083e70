//! MADT of a GICv3 (ACPI 5.2.12.14 to 18).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::super::table::Table;
use super::config::{ArmAcpiConfig, ArmCpu, Gic};

/// The revision from which the online-capable flag of GIC CPU interfaces is defined.
const REVISION: u8 = 6;
const ENABLED: u32 = 1;
const ONLINE_CAPABLE: u32 = 1 << 3;
const GIC_V3: u8 = 3;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct CpuInterface {
    kind: u8,
    length: u8,
    reserved: U16,
    number: U32,
    uid: U32,
    flags: U32,
    parking_version: U32,
    performance_interrupt: U32,
    parked_address: U64,
    base: U64,
    gicv: U64,
    gich: U64,
    maintenance_interrupt: U32,
    /// Zero: the range of redistributors says it.
    redistributor: U64,
    mpidr: U64,
    efficiency: u8,
    reserved2: u8,
    spe_interrupt: U16,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Distributor {
    kind: u8,
    length: u8,
    reserved: U16,
    id: U32,
    base: U64,
    vector_base: U32,
    version: u8,
    reserved2: [u8; 3],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Redistributors {
    kind: u8,
    length: u8,
    reserved: U16,
    base: U64,
    size: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Translator {
    kind: u8,
    length: u8,
    reserved: U16,
    id: U32,
    base: U64,
    reserved2: U32,
}

const _: () = assert!(size_of::<CpuInterface>() == 80);
const _: () = assert!(size_of::<Distributor>() == 24);
const _: () = assert!(size_of::<Redistributors>() == 16);
const _: () = assert!(size_of::<Translator>() == 20);

fn cpu_entry(uid: u32, cpu: &ArmCpu, gic: &Gic, flags: u32) -> Vec<u8> {
    let interface = CpuInterface {
        kind: 0x0b,
        length: size_of::<CpuInterface>() as u8,
        reserved: 0.into(),
        number: uid.into(),
        uid: uid.into(),
        flags: flags.into(),
        parking_version: 0.into(),
        performance_interrupt: gic.pmu.unwrap_or(0).into(),
        parked_address: 0.into(),
        base: 0.into(),
        gicv: 0.into(),
        gich: 0.into(),
        maintenance_interrupt: 0.into(),
        redistributor: 0.into(),
        mpidr: cpu.mpidr.into(),
        efficiency: 0,
        reserved2: 0,
        spe_interrupt: 0.into(),
    };
    interface.as_bytes().to_vec()
}

/// The structure that `_MAT` of an added processor returns.
pub(super) fn enabled_cpu_entry(uid: u32, cpu: &ArmCpu, gic: &Gic) -> Vec<u8> {
    cpu_entry(uid, cpu, gic, ENABLED)
}

pub(super) fn madt(config: &ArmAcpiConfig) -> Vec<u8> {
    let gic = &config.gic;
    let mut table = Table::new(*b"APIC", REVISION);
    // Neither local APIC nor flags.
    table.push(&[0; 8]);
    let distributor = Distributor {
        kind: 0x0c,
        length: size_of::<Distributor>() as u8,
        reserved: 0.into(),
        id: 0.into(),
        base: gic.distributor.into(),
        vector_base: 0.into(),
        version: GIC_V3,
        reserved2: [0; 3],
    };
    table.push(distributor.as_bytes());
    for (uid, cpu) in (0u32..).zip(&config.cpus) {
        let flags = if cpu.enabled { ENABLED } else { ONLINE_CAPABLE };
        table.push(&cpu_entry(uid, cpu, gic, flags));
    }
    let redistributors = Redistributors {
        kind: 0x0e,
        length: size_of::<Redistributors>() as u8,
        reserved: 0.into(),
        base: gic.redistributors.into(),
        size: gic.redistributors_size.into(),
    };
    table.push(redistributors.as_bytes());
    let translator = Translator {
        kind: 0x0f,
        length: size_of::<Translator>() as u8,
        reserved: 0.into(),
        id: super::iort::ITS_ID.into(),
        base: gic.its.into(),
        reserved2: 0.into(),
    };
    table.push(translator.as_bytes());
    table.finish()
}
