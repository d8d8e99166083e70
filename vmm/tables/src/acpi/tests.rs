//! Tables read back, and checked by ACPICA's compiler where it is installed.

use std::collections::BTreeMap;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const ECAM: u64 = 0xE800_0000;

/// A machine with `count` processors of which the first is there from the start.
fn machine(count: u32) -> AcpiConfig {
    AcpiConfig {
        placement: AcpiPlacement::PC,
        cpus: (0..count)
            .map(|apic_id| Cpu {
                apic_id,
                enabled: apic_id == 0,
                removable: apic_id > 0,
                node: 0,
            })
            .collect(),
        cpu_hotplug: None,
        memory_hotplug: None,
        interrupts: InterruptConfig {
            lapic_base: 0xFEE0_0000,
            ioapic: IoApic {
                id: 0,
                base: 0xFEC0_0000,
                gsi_base: 0,
            },
            overrides: vec![IrqOverride {
                irq: 9,
                gsi: 9,
                polarity: IrqPolarity::High,
                trigger: IrqTrigger::Level,
            }],
        },
        pm: PmConfig {
            sleep_control: 0x600,
            sleep_status: 0x600,
            pm_timer: Some(0x608),
            reset: Some(ResetRegister { port: 0x3c0, value: 1 }),
        },
        pci: vec![PciSegment {
            segment: 0,
            ecam_base: ECAM,
            first_bus: 0,
            last_bus: 0,
            io: vec![
                IoWindow { first: 0, last: 0xcf7 },
                IoWindow {
                    first: 0xd00,
                    last: 0xffff,
                },
            ],
            mmio: vec![
                MmioWindow {
                    start: 0xC000_0000,
                    size: ECAM - 0xC000_0000,
                    prefetchable: false,
                },
                MmioWindow {
                    start: 0x1_4000_0000,
                    size: 1 << 39,
                    prefetchable: true,
                },
            ],
            prt: rotating_prt(&[16, 17, 18, 19]),
            node: 0,
            slots: None,
            iommu: None,
        }],
        events: Some(EventDevice {
            gsi: 5,
            register: Register::Io(0x620),
        }),
        serial: vec![SerialPort { port: 0x3f8, gsi: 4 }],
        rtc: Some(Rtc { port: 0x70, gsi: None }),
        numa: vec![],
    }
}

fn with_numa(mut config: AcpiConfig) -> AcpiConfig {
    for (index, cpu) in config.cpus.iter_mut().enumerate() {
        cpu.node = index as u32 % 2;
    }
    let node = |start: u64, distances: [u8; 2]| NumaNode {
        memory: vec![MemoryAffinity {
            start,
            size: 1 << 30,
            hotplug: start != 0,
        }],
        distances: distances.to_vec(),
    };
    config.numa = vec![node(0, [10, 20]), node(1 << 30, [20, 10])];
    config
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Follows the pointers from the RSDP as a kernel does and returns every table by its signature.
fn walk(tables: &AcpiTables) -> BTreeMap<String, Vec<u8>> {
    let at = |address: u64| {
        let offset = (address - tables.tables_at) as usize;
        assert_eq!(offset % 16, 0);
        let bytes = &tables.tables[offset..];
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table.to_vec()
    };
    let signature = |table: &[u8]| String::from_utf8(table[..4].to_vec()).unwrap();
    let rsdp = &tables.rsdp;
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp.len()), (0, 0, 36));
    let xsdt = at(u64_at(rsdp, 24));
    assert_eq!(signature(&xsdt), "XSDT");
    let mut found = BTreeMap::new();
    for pointer in xsdt[36..].chunks_exact(8) {
        let table = at(u64_at(pointer, 0));
        if signature(&table) == "FACP" {
            let dsdt = at(u64_at(&table, 140));
            found.insert(signature(&dsdt), dsdt);
        }
        found.insert(signature(&table), table);
    }
    found
}

/// MADT structures behind the fixed part: type and bytes.
fn madt_entries(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (entry, tail) = rest.split_at(rest[1].into());
        found.push((entry[0], entry.to_vec()));
        rest = tail;
    }
    found
}

#[test]
fn tables_of_a_plain_machine() {
    let built = build(&machine(2)).unwrap();
    assert_eq!(built.rsdp_at, 0xE_0000);
    let tables = walk(&built);
    let names: Vec<_> = tables.keys().map(String::as_str).collect();
    assert_eq!(names, ["APIC", "DSDT", "FACP", "MCFG"]);
    let mcfg = &tables["MCFG"];
    assert_eq!((u64_at(mcfg, 44), mcfg.len()), (ECAM, 60));
}

#[test]
fn fadt_is_hardware_reduced() {
    let built = build(&machine(1)).unwrap();
    let fadt = walk(&built).remove("FACP").unwrap();
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    let flags = u32_at(&fadt, 112);
    for (bit, what) in [
        (20, "HW_REDUCED_ACPI"),
        (10, "RESET_REG_SUP"),
        (8, "TMR_VAL_EXT"),
        (4, "PWR_BUTTON"),
    ] {
        assert_ne!(flags & 1 << bit, 0, "{what}");
    }
    let gas = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], u64_at(&fadt, at + 4));
    assert_eq!(gas(116), (1, 8, 1, 0x3c0), "RESET_REG");
    assert_eq!(fadt[128], 1, "RESET_VALUE");
    assert_eq!(gas(208), (1, 32, 3, 0x608), "X_PM_TMR_BLK");
    assert_eq!(gas(244), (1, 8, 1, 0x600), "SLEEP_CONTROL_REG");
    assert_eq!(gas(256), (1, 8, 1, 0x600), "SLEEP_STATUS_REG");

    let mut bare = machine(1);
    bare.pm.reset = None;
    bare.pm.pm_timer = None;
    bare.rtc = None;
    let fadt = walk(&build(&bare).unwrap()).remove("FACP").unwrap();
    assert_eq!(u32_at(&fadt, 112) & (1 << 10 | 1 << 8), 0);
    assert_ne!(fadt[109] & 1 << 5, 0, "CMOS RTC not present");
}

#[test]
fn madt_flags_and_wide_identifiers() {
    let mut config = machine(300);
    config.cpus[1].enabled = true;
    config.cpus[299].apic_id = 0x1_0000;
    let madt = walk(&build(&config).unwrap()).remove("APIC").unwrap();
    assert!(madt[8] >= 5, "online-capable needs revision 5");
    let entries = madt_entries(&madt);
    let of = |kind: u8| -> Vec<&[u8]> { entries.iter().filter(|e| e.0 == kind).map(|e| e.1.as_slice()).collect() };
    let narrow = of(0);
    let wide = of(9);
    assert_eq!((narrow.len(), wide.len()), (255, 45));
    assert_eq!(narrow[1], [0, 8, 1, 1, 1, 0, 0, 0], "enabled");
    assert_eq!(narrow[254], [0, 8, 254, 254, 2, 0, 0, 0], "online-capable");
    assert_eq!(
        (u32_at(wide[0], 4), u32_at(wide[0], 8), u32_at(wide[0], 12)),
        (255, 2, 255)
    );
    assert_eq!((u32_at(wide[44], 4), u32_at(wide[44], 12)), (0x1_0000, 299));
    assert_eq!(of(1)[0], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(of(2)[0], [2, 10, 0, 9, 9, 0, 0, 0, 0b1101, 0]);
    assert_eq!(of(4)[0], [4, 6, 0xff, 0, 0, 1]);
    assert_eq!(of(10).len(), 1);
    let mut sparse = machine(2);
    sparse.cpus[1].apic_id = 255;
    let madt = walk(&build(&sparse).unwrap()).remove("APIC").unwrap();
    let kinds: Vec<u8> = madt_entries(&madt).iter().map(|e| e.0).collect();
    assert_eq!(kinds, [0, 9, 1, 2, 4, 10], "255 is the broadcast");
    let small = walk(&build(&machine(4)).unwrap()).remove("APIC").unwrap();
    assert!(madt_entries(&small).iter().all(|e| e.0 != 10 && e.0 != 9));
}

#[test]
fn numa_tables() {
    let built = build(&with_numa(machine(4))).unwrap();
    let tables = walk(&built);
    let srat = &tables["SRAT"];
    assert_eq!(srat.len(), 48 + 4 * 16 + 2 * 40);
    let second_cpu = &srat[48 + 16..48 + 32];
    assert_eq!(second_cpu[..5], [0, 16, 1, 1, 1]);
    let second_memory = &srat[48 + 64 + 40..];
    assert_eq!(
        (
            u32_at(second_memory, 2),
            u64_at(second_memory, 8),
            u64_at(second_memory, 16),
            u32_at(second_memory, 28)
        ),
        (1, 1 << 30, 1 << 30, 3)
    );
    let slit = &tables["SLIT"];
    assert_eq!(u64_at(slit, 36), 2);
    assert_eq!(slit[44..], [10, 20, 20, 10]);
    // Identifiers that do not fit into a byte have wide entries, also those of processors that may come later.
    let mut wide = with_numa(machine(4));
    wide.cpus[3] = Cpu {
        apic_id: 300,
        enabled: false,
        removable: true,
        node: 1,
    };
    let srat = &walk(&build(&wide).unwrap())["SRAT"];
    let entry = &srat[48 + 3 * 16..48 + 3 * 16 + 24];
    assert_eq!(
        (
            entry[0],
            entry[1],
            u32_at(entry, 4),
            u32_at(entry, 8),
            u32_at(entry, 12)
        ),
        (2, 24, 1, 300, 1)
    );

    let mut without = with_numa(machine(4));
    without.numa.iter_mut().for_each(|n| n.distances.clear());
    assert!(!walk(&build(&without).unwrap()).contains_key("SLIT"));
}

#[test]
fn what_cannot_be_said_is_refused() {
    let with = |change: fn(&mut AcpiConfig)| {
        let mut config = machine(2);
        change(&mut config);
        build(&config).expect_err("must be refused")
    };
    assert_eq!(with(|c| c.cpus[0].enabled = false), AcpiError::NoCpu);
    assert_eq!(with(|c| c.cpus[1].apic_id = 0), AcpiError::DuplicateApicId(0));
    assert!(matches!(
        with(|c| c.pci[0].mmio[1].size = u64::MAX),
        AcpiError::BadWindow { what: "MMIO", .. }
    ));
    assert!(matches!(
        with(|c| c.pci[0].mmio[0].size = 0),
        AcpiError::BadWindow { size: 0, .. }
    ));
    assert!(matches!(
        with(|c| c.pci[0].mmio[0].size = 1 << 30 | 1),
        AcpiError::BadWindow { what: "MMIO", .. }
    ));
    assert!(matches!(
        with(|c| c.pci[0].io[0].last = 0xffff),
        AcpiError::BadWindow {
            what: "I/O",
            size: 0x1_0000,
            ..
        }
    ));
    assert!(matches!(
        with(|c| c.pci[0].first_bus = 1),
        AcpiError::BadBusRange { .. }
    ));
    assert!(matches!(
        with(|c| c.pci = vec![c.pci[0].clone(); 17]),
        AcpiError::TooManySegments { count: 17, max: 16 }
    ));
    assert!(matches!(
        with(|c| c.pci[0].prt = vec![c.pci[0].prt[0]; 256]),
        AcpiError::TooManyRoutes { count: 256, .. }
    ));
    assert!(matches!(
        with(|c| c.serial = vec![c.serial[0]; 5]),
        AcpiError::TooManySerialPorts { count: 5, max: 4 }
    ));
    assert!(matches!(
        with(|c| c.placement.tables_size = 100),
        AcpiError::TooLarge { room: 100, .. }
    ));
    assert!(matches!(
        with(|c| c.numa = vec![NumaNode {
            memory: vec![],
            distances: vec![10, 20]
        }]),
        AcpiError::BadNuma(_)
    ));
    assert!(matches!(
        with(|c| {
            c.numa = vec![NumaNode::default()];
            c.cpus[1].node = 1;
        }),
        AcpiError::BadNuma(_)
    ));
    assert!(matches!(
        build(&machine(4097)),
        Err(AcpiError::TooManyCpus { count: 4097, .. })
    ));
}

#[test]
fn the_largest_machine_fits_below_the_bios() {
    let mut config = with_numa(machine(1024));
    config.pci[0].prt = rotating_prt(&[16]);
    let built = build(&config).unwrap();
    assert!((built.tables.len() as u64) < AcpiPlacement::PC.tables_size);
    let mut config = machine(254);
    config.cpu_hotplug = Some(0xFE00_0000);
    config.pci[0].slots = Some(slots(0));
    let built = build(&config).unwrap();
    assert!((built.tables.len() as u64) < AcpiPlacement::PC.tables_size / 2);
}

fn slots(fixed: u32) -> PciSlots {
    PciSlots {
        registers: 0xFE02_0000,
        first: 0,
        fixed,
    }
}

/// As many root buses like `first`, with 32 buses each.
pub(super) fn roots(first: &PciSegment, count: u32) -> Vec<PciSegment> {
    let root = |index: u32| PciSegment {
        first_bus: 32 * index as u8,
        last_bus: 32 * index as u8 + 31,
        io: if index == 0 { first.io.clone() } else { vec![] },
        node: index,
        slots: Some(PciSlots {
            first: 32 * index,
            ..slots(u32::from(index == 0) << 4)
        }),
        iommu: first.iommu.clone().filter(|_| index == 0),
        ..first.clone()
    };
    (0..count).map(root).collect()
}

#[test]
fn root_buses_of_one_segment_share_what_is_the_segments() {
    let mut config = with_numa(machine(2));
    config.pci = roots(&config.pci[0], 2);
    let built = build(&config).unwrap();
    let tables = walk(&built);
    let mcfg = &tables["MCFG"];
    assert_eq!(
        (mcfg.len(), u64_at(mcfg, 44), mcfg[52..56].to_vec()),
        (60, ECAM, vec![0, 0, 0, 63])
    );
    let dsdt = &tables["DSDT"];
    let find = |name: &[u8]| dsdt.windows(name.len()).filter(|window| *window == name).count();
    // Both roots, and two processors.
    assert_eq!((find(b"_BBN"), find(b"_PXM")), (2, 4));
    assert_eq!(find(b"_EJ0"), 30 + 31);
    assert_eq!((find(b"S021"), find(b"S03F"), find(b"S020")), (2, 2, 0));
    // One takes the notices: defined, and called by the event device; the other is handed its own.
    assert_eq!((find(b"SNXT"), find(b"SSCN"), find(b"STFY")), (3, 2, 4));
    // Function 0 of slot 31: address 0x1f0000, number 63.
    assert_eq!(find(b"_ADR\x0c\x00\x00\x1f\x00\x08_SUN\x0a\x3f"), 1);
    // All the registers of slots are claimed once.
    let claim = [&0xFE02_0000u32.to_le_bytes()[..], &(0x10 * 65u32).to_le_bytes()].concat();
    assert_eq!(find(&claim), 1);
}

#[test]
fn slots_of_devices_that_can_go_have_methods() {
    let count = |fixed: Option<u32>, name: &[u8]| {
        let mut config = machine(1);
        config.pci[0].slots = fixed.map(slots);
        let tables = build(&config).unwrap().tables;
        tables.windows(name.len()).filter(|window| *window == name).count()
    };
    // The host bridge never goes.
    assert_eq!(count(Some(0), b"_EJ0"), 31);
    assert_eq!(count(Some(1 << 31 | 1 << 1), b"_EJ0"), 29);
    assert_eq!((count(Some(1 << 31), b"S01F"), count(Some(0), b"S01F")), (0, 2));
    assert_eq!(
        (count(None, b"_EJ0"), count(None, b"SSCN"), count(Some(0), b"SSCN")),
        (0, 0, 2)
    );
}

#[test]
fn an_iommu_and_who_is_behind_it_are_told() {
    assert!(!walk(&build(&machine(1)).unwrap()).contains_key("VIOT"));
    let mut config = machine(1);
    config.pci[0].iommu = Some(PciIommu {
        requester: 0x08,
        behind: vec![(0x10, 0x17), (0x28, 0x28)],
    });
    let tables = build(&config).unwrap();
    let viot = &walk(&tables)["VIOT"];
    assert_eq!(viot.len(), 48 + 16 + 2 * 24);
    assert_eq!(viot[36..40], [3, 0, 48, 0], "nodes, and where they begin");
    assert_eq!(viot[48..56], [3, 0, 16, 0, 0, 0, 0x08, 0]);
    let first = [1, 0, 24, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0x17, 0, 48, 0];
    assert_eq!(viot[64..82], first);
    assert_eq!(
        (u32_at(viot, 92), viot[100..106].to_vec()),
        (0x28, vec![0x28, 0, 0x28, 0, 48, 0])
    );
}

#[test]
fn routes_rotate() {
    let prt = rotating_prt(&[16, 17, 18, 19]);
    assert_eq!(prt.len(), 128);
    assert_eq!((prt[0].gsi, prt[4].gsi, prt[5].gsi), (16, 17, 18));
    assert!(rotating_prt(&[]).is_empty());
    assert!(rotating_prt(&[7]).iter().all(|route| route.gsi == 7));
}

/// Configurations whose name spaces differ in every optional part.
fn variants() -> Vec<AcpiConfig> {
    let mut bare = machine(1);
    bare.pci.clear();
    bare.serial.clear();
    bare.events = None;
    bare.rtc = None;
    let mut large = with_numa(machine(300));
    large.events = Some(EventDevice {
        gsi: 23,
        register: Register::Memory(0xFED0_0000),
    });
    large.rtc = Some(Rtc {
        port: 0x70,
        gsi: Some(8),
    });
    large.pci.push(PciSegment {
        segment: 1,
        ecam_base: 0x1_0000_0000,
        prt: vec![],
        io: vec![],
        ..large.pci[0].clone()
    });
    let mut growing = with_numa(machine(254));
    growing.cpu_hotplug = Some(0xFE00_0000);
    growing.memory_hotplug = Some(MemorySlots {
        registers: 0xFE01_0000,
        count: 32,
    });
    growing.pci[0].slots = Some(slots(0b1011));
    growing.pci[0].iommu = Some(PciIommu {
        requester: 0x08,
        behind: vec![(0x10, 0xff)],
    });
    let mut far = machine(2);
    far.pci[0].slots = Some(slots(u32::MAX));
    far.cpu_hotplug = Some(0x12_3400_0000);
    far.memory_hotplug = Some(MemorySlots {
        registers: 0x12_3500_0000,
        count: 1,
    });
    let mut nodes = with_numa(machine(2));
    nodes.pci = roots(&nodes.pci[0], 2);
    vec![machine(2), bare, large, growing, far, nodes]
}

/// Takes every table apart with ACPICA and compiles the name space again: no warning, no remark about an error.
#[test]
fn acpica_finds_nothing_wrong() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (package acpica-tools) is not installed");
        return;
    }
    for config in &variants() {
        acpica_accepts(&build(config).unwrap());
    }
}

/// Fails where ACPICA complains of one of `tables`.
pub(super) fn acpica_accepts(tables: &AcpiTables) {
    let directory = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new("iasl")
            .args(arguments)
            .current_dir(directory.path())
            .output()
            .unwrap();
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text += &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        text
    };
    for (name, table) in walk(tables) {
        let file = format!("{name}.aml");
        std::fs::write(directory.path().join(&file), table).unwrap();
        let text = run(&["-d", &file]);
        let bad = ["Warning", "Error", "Invalid", "Could not"];
        assert!(!bad.iter().any(|word| text.contains(word)), "{name}: {text}");
    }
    let text = run(&["-tc", "-p", "again", "DSDT.dsl"]);
    assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
}

proptest! {
    #[test]
    fn every_accepted_machine_has_sound_tables(
        ids in proptest::collection::vec((0u32..600, any::<bool>()), 1..40),
        mmio in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..4),
        io in proptest::collection::vec((any::<u16>(), any::<u16>()), 0..4),
        buses in (any::<u8>(), any::<u8>()),
        gsis in proptest::collection::vec(any::<u32>(), 0..6),
        register in prop_oneof![any::<u16>().prop_map(Register::Io), any::<u64>().prop_map(Register::Memory)],
    ) {
        let mut config = machine(1);
        config.cpus = ids.iter().map(|&(apic_id, enabled)| Cpu { apic_id, enabled, removable: true, node: 0 }).collect();
        let segment = &mut config.pci[0];
        segment.mmio = mmio
            .iter()
            .map(|&(start, size, prefetchable)| MmioWindow { start, size, prefetchable })
            .collect();
        segment.io = io.iter().map(|&(first, last)| IoWindow { first, last }).collect();
        (segment.first_bus, segment.last_bus) = buses;
        segment.prt = rotating_prt(&gsis);
        config.events = Some(EventDevice { gsi: 5, register });
        if let Ok(built) = build(&config) {
            let tables = walk(&built);
            prop_assert_eq!(madt_entries(&tables["APIC"]).iter().filter(|e| matches!(e.0, 0 | 9)).count(), ids.len());
        }
    }
}
