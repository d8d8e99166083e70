use std::process::Command;

use super::super::config::{AcpiPlacement, EventDevice, MmioWindow, PciIommu, PciSegment, PciSlots, Register};
use super::super::tests::acpica_accepts;
use super::super::{AcpiError, AcpiTables, MemoryAffinity, MemorySlots, NumaNode, checksum};
use super::*;

fn config(cpus: u32, enabled: u32) -> ArmAcpiConfig {
    ArmAcpiConfig {
        placement: AcpiPlacement {
            tables: 0x4020_1000,
            tables_size: 0xf_f000,
            rsdp: 0x4020_0000,
        },
        cpus: (0..cpus)
            .map(|n| ArmCpu {
                mpidr: u64::from(n & 0xf | (n >> 4) << 8),
                enabled: n < enabled,
                node: 0,
            })
            .collect(),
        cpu_hotplug: (enabled < cpus).then_some(0x0905_0000),
        memory_hotplug: (enabled < cpus).then_some(MemorySlots {
            registers: 0x0906_0000,
            count: 32,
        }),
        topology: Topology {
            threads: 1,
            cores: cpus as u16,
            dies: 1,
            packages: 1,
        },
        gic: Gic {
            distributor: 0x08ff_0000,
            redistributors: 0x0700_0000,
            redistributors_size: cpus * 0x2_0000,
            its: 0x0600_0000,
            pmu: Some(23),
        },
        timer: Timer {
            secure: 29,
            physical: 30,
            virt: 27,
            hypervisor: 26,
        },
        pci: vec![PciSegment {
            segment: 0,
            ecam_base: 0x3000_0000,
            first_bus: 0,
            last_bus: 0,
            io: vec![],
            mmio: vec![MmioWindow {
                start: 0x1000_0000,
                size: 0x2000_0000,
                prefetchable: false,
            }],
            prt: vec![],
            node: 0,
            slots: (enabled < cpus).then_some(PciSlots {
                registers: 0x0907_0000,
                first: 0,
                fixed: 2,
            }),
            iommu: (enabled < cpus).then(|| PciIommu {
                requester: 8,
                behind: vec![(0x10, 0x17), (0x28, 0x28)],
            }),
        }],
        events: Some(EventDevice {
            gsi: 36,
            register: Register::Memory(0x0903_0000),
        }),
        uart: Some(Uart {
            base: 0x0900_0000,
            size: 0x1000,
            gsi: 33,
        }),
        claimed: vec![(0x0901_0000, 0x1000)],
        numa: vec![],
    }
}

/// Every table the XSDT points to, as a guest finds it.
fn found(tables: &AcpiTables) -> Vec<&[u8]> {
    let table = |at: u64| {
        let from = &tables.tables[(at - tables.tables_at) as usize..];
        let length = u32::from_le_bytes(from[4..8].try_into().unwrap()) as usize;
        &from[..length]
    };
    let xsdt = table(u64::from_le_bytes(tables.rsdp[24..32].try_into().unwrap()));
    let mut all: Vec<&[u8]> = xsdt[36..]
        .chunks(8)
        .map(|p| table(u64::from_le_bytes(p.try_into().unwrap())))
        .collect();
    let dsdt = u64::from_le_bytes(all[0][140..148].try_into().unwrap());
    all.push(table(dsdt));
    all
}

fn named<'a>(tables: &[&'a [u8]], signature: &[u8]) -> &'a [u8] {
    tables.iter().find(|t| t.starts_with(signature)).unwrap()
}

#[test]
fn nodes_have_processors_by_their_uid_and_memory() {
    let mut config = config(4, 2);
    config.cpus[3].node = 1;
    let node = |start, hotplug, distances: [u8; 2]| NumaNode {
        memory: vec![MemoryAffinity {
            start,
            size: 1 << 30,
            hotplug,
        }],
        distances: distances.to_vec(),
    };
    config.numa = vec![node(1 << 30, false, [10, 15]), node(4 << 30, true, [21, 10])];
    let built = build(&config).unwrap();
    let tables = found(&built);
    let (srat, slit) = (named(&tables, b"SRAT"), named(&tables, b"SLIT"));
    assert_eq!((checksum(srat), checksum(slit)), (0, 0));
    assert_eq!(srat.len(), 48 + 4 * 18 + 2 * 40);
    // Those that may come later are told of as well: type, length, node, UID, enabled.
    let last = &srat[48 + 3 * 18..48 + 4 * 18];
    assert_eq!(last, [3, 18, 1, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let memory = &srat[48 + 4 * 18 + 40..];
    assert_eq!(
        (memory[0], memory[2], memory[28]),
        (1, 1, 3),
        "memory of node 1, enabled and hot-pluggable"
    );
    assert_eq!(memory[8..16], (4u64 << 30).to_le_bytes());
    assert_eq!(slit[44..], [10, 15, 21, 10]);
    let dsdt = named(&tables, b"DSDT");
    let nodes = dsdt.windows(4).filter(|name| name == b"_PXM").count();
    assert_eq!(nodes, 1 + 4 + 32, "the PCI root, processors, memory devices");
    config.cpus[3].node = 2;
    assert!(matches!(build(&config), Err(AcpiError::BadNuma(_))));
}

#[test]
fn all_tables_are_there_and_sum_to_zero() {
    let built = build(&config(4, 2)).unwrap();
    let tables = found(&built);
    for signature in ["FACP", "APIC", "GTDT", "PPTT", "MCFG", "IORT", "SPCR", "DSDT", "VIOT"] {
        assert_eq!(checksum(named(&tables, signature.as_bytes())), 0, "{signature}");
    }
    let sizes = ["GTDT", "SPCR"].map(|s| named(&tables, s.as_bytes()).len());
    assert_eq!(sizes, [104, 80]);
    assert_eq!(named(&tables, b"IORT").len(), 48 + 24 + 60);
    let boot_flags = &named(&tables, b"FACP")[129..131];
    assert_eq!(boot_flags, [3, 0], "PSCI by HVC");
}

#[test]
fn acpica_finds_nothing_wrong() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (package acpica-tools) is not installed");
        return;
    }
    let mut shaped = config(8, 8);
    shaped.topology = Topology {
        threads: 2,
        cores: 2,
        dies: 2,
        packages: 1,
    };
    for config in [config(1, 1), config(4, 2), shaped] {
        acpica_accepts(&build(&config).unwrap());
    }
}

#[test]
fn processors_to_come_are_online_capable() {
    let built = build(&config(4, 2)).unwrap();
    let tables = found(&built);
    let (mut at, mut flags) = (44, Vec::new());
    let madt = named(&tables, b"APIC");
    while at < madt.len() {
        if madt[at] == 0x0b {
            flags.push(u32::from_le_bytes(madt[at + 12..at + 16].try_into().unwrap()));
        }
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(at, madt.len());
    assert_eq!(flags, [1, 1, 8, 8]);
}

#[test]
fn levels_with_one_member_have_no_node() {
    let nodes = |threads, cores, dies, packages| {
        let topology = Topology {
            threads,
            cores,
            dies,
            packages,
        };
        (pptt::pptt(&topology).len() - 36) / 20
    };
    assert_eq!(nodes(1, 4, 1, 1), 5);
    assert_eq!(nodes(2, 2, 2, 1), 1 + 2 + 4 + 8);
}

#[test]
fn contradictions_are_refused() {
    assert_eq!(build(&config(2, 0)), Err(AcpiError::NoCpu));
    let mut twice = config(2, 2);
    twice.cpus[1].mpidr = 0;
    assert_eq!(build(&twice), Err(AcpiError::DuplicateMpidr(0)));
    let mut shape = config(2, 2);
    shape.topology.cores = 3;
    assert!(matches!(
        build(&shape),
        Err(AcpiError::BadTopology { places: 3, cpus: 2 })
    ));
    let mut small = config(2, 2);
    small.placement.tables_size = 64;
    assert!(matches!(build(&small), Err(AcpiError::TooLarge { .. })));
    build(&config(254, 254)).expect("as many as there may be");
}
