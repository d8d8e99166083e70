//! The guest's CPUID, computed from what the host offers.
//!
//! Intel SDM volume 2A (CPUID); AMD APM volume 3, appendix E. Hygon's and AMD's leaves are the same, Zhaoxin's and Intel's are.

use serde::{Deserialize, Serialize};

use crate::{Topology, Vendor, bounded};

/// Entries of a table that somebody else wrote: as many as KVM takes.
const MAX_ENTRIES: usize = 256;

/// The answer of one leaf and subleaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// Input EAX.
    pub leaf: u32,
    /// Input ECX; meaningful when `indexed`.
    pub subleaf: u32,
    /// Whether the leaf's answer depends on ECX.
    pub indexed: bool,
    /// Output EAX.
    pub eax: u32,
    /// Output EBX.
    pub ebx: u32,
    /// Output ECX.
    pub ecx: u32,
    /// Output EDX.
    pub edx: u32,
}

/// All answers of a CPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Entries")]
pub struct CpuidTable(Vec<CpuidEntry>);

#[derive(Deserialize)]
#[serde(transparent)]
struct Entries(#[serde(deserialize_with = "bounded::list::<_, _, MAX_ENTRIES>")] Vec<CpuidEntry>);

impl From<Entries> for CpuidTable {
    fn from(read: Entries) -> Self {
        read.0.into_iter().collect()
    }
}

impl FromIterator<CpuidEntry> for CpuidTable {
    /// Of two entries for one leaf and subleaf the later one counts.
    fn from_iter<I: IntoIterator<Item = CpuidEntry>>(entries: I) -> Self {
        let mut table = Self::default();
        for entry in entries {
            let same = |e: &CpuidEntry| (e.leaf, e.subleaf, e.indexed) == (entry.leaf, entry.subleaf, entry.indexed);
            match table.0.iter_mut().find(|e| same(e)) {
                Some(earlier) => *earlier = entry,
                None => table.0.push(entry),
            }
        }
        table
    }
}

impl CpuidTable {
    /// Every entry, in no particular order.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.0
    }

    /// The answer of a leaf and subleaf.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.0
            .iter()
            .find(|e| e.leaf == leaf && (!e.indexed || e.subleaf == subleaf))
    }

    /// Who made the CPU.
    pub fn vendor(&self) -> Vendor {
        self.get(0, 0)
            .map_or(Vendor::Other, |e| Vendor::from_leaf0(e.ebx, e.ecx, e.edx))
    }

    /// Width of a physical address in bits (leaf 0x8000_0008).
    pub fn physical_address_bits(&self) -> u8 {
        match self.get(0x8000_0008, 0).map(|e| e.eax as u8) {
            Some(bits) if bits >= 32 => bits,
            _ => 36,
        }
    }

    /// Makes physical addresses `bits` wide if they are wider, for guests that are to run on hosts with less, too.
    pub fn limit_physical_address_bits(&mut self, bits: u8) {
        let least = self.physical_address_bits().min(bits);
        self.change(0x8000_0008, |e| e.eax = e.eax & !0xff | u32::from(least));
    }

    fn change(&mut self, leaf: u32, edit: impl Fn(&mut CpuidEntry)) {
        self.0.iter_mut().filter(|e| e.leaf == leaf).for_each(edit);
    }

    fn replace(&mut self, leaf: u32, entries: impl IntoIterator<Item = CpuidEntry>) {
        self.0.retain(|e| e.leaf != leaf);
        self.0.extend(entries);
    }
}

/// What is individual about one vCPU's CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestCpu {
    /// Index of the vCPU.
    pub index: u32,
    /// Shape of the guest's processor.
    pub topology: Topology,
    /// The host's interrupt controller has the TSC deadline timer. (KVM tells by a capability, not by CPUID.)
    pub tsc_deadline: bool,
}

mod bit {
    /// Leaf 1 ECX.
    pub const X2APIC: u32 = 1 << 21;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
    /// Leaf 1 EDX: EBX holds the number of logical processors.
    pub const HTT: u32 = 1 << 28;
    /// Leaf 0x8000_0001 ECX.
    pub const CMP_LEGACY: u32 = 1 << 1;
    pub const TOPOEXT: u32 = 1 << 22;
}

/// CPUID of one vCPU of a guest on a host that offers `host`.
pub fn guest_cpuid(host: &CpuidTable, cpu: &GuestCpu) -> CpuidTable {
    let mut table = host.clone();
    let vendor = host.vendor();
    common(&mut table, cpu);
    extended_topology(&mut table, cpu, vendor);
    if vendor.is_amd_like() {
        amd_topology(&mut table, cpu);
        amd_caches(&mut table, &cpu.topology);
    } else {
        intel_caches(&mut table, &cpu.topology);
    }
    table
}

fn common(table: &mut CpuidTable, cpu: &GuestCpu) {
    let apic_id = cpu.topology.apic_id(cpu.index);
    let threads = cpu.topology.threads_per_package();
    table.change(1, |e| {
        // CLFLUSH line size stays in bits 15:8.
        let logical = threads.next_power_of_two().min(255);
        e.ebx = (apic_id & 0xff) << 24 | logical << 16 | e.ebx & 0xff00;
        e.ecx |= bit::HYPERVISOR | bit::X2APIC;
        e.ecx = if cpu.tsc_deadline {
            e.ecx | bit::TSC_DEADLINE
        } else {
            e.ecx & !bit::TSC_DEADLINE
        };
        e.edx = if threads > 1 {
            e.edx | bit::HTT
        } else {
            e.edx & !bit::HTT
        };
    });
}

/// Leaves 0xB and, for Intel guests with several dies, 0x1F. AMD's and Hygon's CPUs before Zen 2 do not have 0xB, yet every guest
/// kernel understands it, and it is the only one that holds x2APIC ids.
fn extended_topology(table: &mut CpuidTable, cpu: &GuestCpu, vendor: Vendor) {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    const DIE: u32 = 5;
    let t = &cpu.topology;
    let apic_id = t.apic_id(cpu.index);
    let level = |leaf, subleaf, kind: u32, shift, count| CpuidEntry {
        leaf,
        subleaf,
        indexed: true,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | subleaf,
        edx: apic_id,
    };
    let threads = u32::from(t.threads_per_core);
    let package = t.threads_per_package();
    let smt = |leaf| level(leaf, 0, SMT, t.thread_bits(), threads);
    table.replace(
        0xb,
        [
            smt(0xb),
            level(0xb, 1, CORE, t.package_shift(), package),
            level(0xb, 2, 0, 0, 0),
        ],
    );
    let with_dies = t.dies_per_package > 1 && !vendor.is_amd_like();
    if with_dies {
        let die = threads * u32::from(t.cores_per_die);
        table.replace(
            0x1f,
            [
                smt(0x1f),
                level(0x1f, 1, CORE, t.core_bits(), die),
                level(0x1f, 2, DIE, t.package_shift(), package),
                level(0x1f, 3, 0, 0, 0),
            ],
        );
    } else {
        table.replace(0x1f, []);
    }
    let highest = if with_dies { 0x1f } else { 0xb };
    table.change(0, |e| e.eax = e.eax.max(highest));
    // AMD's own successor of 0xB describes the host's complexes; without it guests use 0xB.
    table.replace(0x8000_0026, []);
}

/// Leaves 0x8000_0001, 0x8000_0008 and 0x8000_001E.
fn amd_topology(table: &mut CpuidTable, cpu: &GuestCpu) {
    let t = cpu.topology;
    let threads = t.threads_per_package();
    let apic_id = t.apic_id(cpu.index);
    table.change(0x8000_0000, |e| e.eax = e.eax.max(0x8000_001e));
    table.change(0x8000_0001, |e| {
        e.ecx |= bit::TOPOEXT;
        e.ecx = if threads > 1 {
            e.ecx | bit::CMP_LEGACY
        } else {
            e.ecx & !bit::CMP_LEGACY
        };
    });
    table.change(0x8000_0008, |e| {
        e.ecx = t.package_shift() << 12 | (threads - 1) & 0xff;
    });
    let core = cpu.index / u32::from(t.threads_per_core) % (u32::from(t.cores_per_die) * u32::from(t.dies_per_package));
    let node = core / u32::from(t.cores_per_die);
    table.replace(
        0x8000_001e,
        [CpuidEntry {
            leaf: 0x8000_001e,
            eax: apic_id,
            ebx: (u32::from(t.threads_per_core) - 1) << 8 | core & 0xff,
            ecx: ((u32::from(t.dies_per_package) - 1) & 7) << 8 | node & 0xff,
            ..CpuidEntry::default()
        }],
    );
}

/// Leaf 0x8000_001D from the legacy cache leaves, which KVM passes through, shared as the guest's topology has it.
fn amd_caches(table: &mut CpuidTable, t: &Topology) {
    const LEAF: u32 = 0x8000_001d;
    const DATA: u32 = 1;
    const INSTRUCTION: u32 = 2;
    const UNIFIED: u32 = 3;
    let (Some(l1), Some(l2)) = (table.get(0x8000_0005, 0).copied(), table.get(0x8000_0006, 0).copied()) else {
        return;
    };
    let core = u32::from(t.threads_per_core);
    let die = core * u32::from(t.cores_per_die);
    let l1_of = |kind, r: u32| (kind, 1, (r >> 24) * 1024, r >> 16 & 0xff, r & 0xff, core);
    let caches = [
        l1_of(DATA, l1.ecx),
        l1_of(INSTRUCTION, l1.edx),
        (
            UNIFIED,
            2,
            (l2.ecx >> 16) * 1024,
            ways(l2.ecx >> 12 & 0xf),
            l2.ecx & 0xff,
            core,
        ),
        (
            UNIFIED,
            3,
            (l2.edx >> 18) * 512 * 1024,
            ways(l2.edx >> 12 & 0xf),
            l2.edx & 0xff,
            die,
        ),
    ];
    let present = caches
        .into_iter()
        .filter(|(_, _, size, ways, line, _)| *size > 0 && *ways > 0 && *line > 0);
    let mut entries: Vec<CpuidEntry> = (0..)
        .zip(present)
        .map(|(subleaf, (kind, level, size, ways, line, sharing))| CpuidEntry {
            leaf: LEAF,
            subleaf,
            indexed: true,
            eax: (sharing - 1) << 14 | 1 << 8 | level << 5 | kind,
            ebx: (ways - 1) << 22 | (line - 1),
            ecx: (size / (ways * line)).saturating_sub(1),
            edx: 0,
        })
        .collect();
    let end = CpuidEntry {
        leaf: LEAF,
        subleaf: entries.len() as u32,
        indexed: true,
        ..CpuidEntry::default()
    };
    entries.push(end);
    table.replace(LEAF, entries);
}

/// Associativity codes of leaf 0x8000_0006.
fn ways(code: u32) -> u32 {
    match code {
        1 | 2 | 4 => code,
        3 => 3,
        5 => 6,
        6 => 8,
        8 => 16,
        // 9: "see leaf 0x8000_001D"; Zen's L3 has 16 ways.
        9 => 16,
        0xa => 32,
        0xb => 48,
        0xc => 64,
        0xd => 96,
        0xe => 128,
        _ => 0,
    }
}

/// Leaf 4: how many logical processors share each cache.
fn intel_caches(table: &mut CpuidTable, t: &Topology) {
    let package = t.threads_per_package();
    let cores = package / u32::from(t.threads_per_core);
    table.change(4, |e| {
        let level = e.eax >> 5 & 7;
        if level == 0 {
            return;
        }
        let sharing = if level >= 3 {
            package
        } else {
            u32::from(t.threads_per_core)
        };
        let field = |n: u32, width: u32| (n.next_power_of_two() - 1) & ((1 << width) - 1);
        e.eax = e.eax & 0x3fff | field(sharing, 12) << 14 | field(cores, 6) << 26;
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::recorded::cpuid as recorded;

    fn hygon() -> CpuidTable {
        recorded(include_str!("../testdata/x86/hygon-0900f22.txt"))
    }

    fn guest(host: &CpuidTable, index: u32, topology: Topology) -> CpuidTable {
        guest_cpuid(
            host,
            &GuestCpu {
                index,
                topology,
                tsc_deadline: true,
            },
        )
    }

    const SMT2: Topology = Topology {
        threads_per_core: 2,
        cores_per_die: 4,
        dies_per_package: 1,
        packages: 2,
    };

    #[test]
    fn addresses_get_narrower_and_never_wider() {
        let sizes = CpuidEntry {
            leaf: 0x8000_0008,
            eax: 0x0000_3030,
            ..CpuidEntry::default()
        };
        let mut table: CpuidTable = [sizes].into_iter().collect();
        for (asked, eax) in [(52, 0x3030), (46, 0x302e), (48, 0x302e)] {
            table.limit_physical_address_bits(asked);
            assert_eq!(table.get(0x8000_0008, 0).expect("sizes").eax, eax, "{asked}");
        }
    }

    #[test]
    fn vendors_are_told_apart() {
        assert_eq!(hygon().vendor(), Vendor::Hygon);
        assert_eq!(
            recorded(include_str!("../testdata/x86/amd-milan.txt")).vendor(),
            Vendor::Amd
        );
        assert_eq!(
            recorded(include_str!("../testdata/x86/intel-sapphirerapids.txt")).vendor(),
            Vendor::Intel
        );
        assert!(Vendor::Hygon.is_amd_like() && !Vendor::Zhaoxin.is_amd_like());
    }

    #[test]
    fn hygon_takes_the_branches_of_amd() {
        let cpu13 = guest(&hygon(), 13, SMT2);
        let e = cpu13.get(0x8000_001e, 0).expect("topology");
        // vCPU 13: package 1, core 2, thread 1.
        assert_eq!((e.eax, e.ebx, e.ecx), (0b1101, 1 << 8 | 2, 0));
        let e = cpu13.get(0x8000_0008, 0).expect("sizes");
        assert_eq!((e.ecx & 0xff, e.ecx >> 12), (7, 3));
        assert_ne!(cpu13.get(0x8000_0001, 0).expect("features").ecx & bit::TOPOEXT, 0);
        let l3 = cpu13.get(0x8000_001d, 3).expect("L3");
        assert_eq!(
            (l3.eax >> 14 & 0xfff, l3.eax >> 5 & 7),
            (7, 3),
            "shared by the 8 threads of the package"
        );
        let l2 = cpu13.get(0x8000_001d, 2).expect("L2");
        assert_eq!((l2.ecx + 1) * ((l2.ebx >> 22) + 1) * ((l2.ebx & 0xfff) + 1), 512 * 1024);
    }

    #[test]
    fn every_vendor_gets_leaf_b() {
        for text in [
            include_str!("../testdata/x86/hygon-0900f22.txt"),
            include_str!("../testdata/x86/amd-milan.txt"),
            include_str!("../testdata/x86/intel-sapphirerapids.txt"),
        ] {
            let table = guest(&recorded(text), 5, SMT2);
            let smt = table.get(0xb, 0).expect("SMT level");
            let core = table.get(0xb, 1).expect("core level");
            assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (1, 2, 0x100, 5));
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 8, 0x201, 5));
            assert!(table.get(0, 0).expect("leaf 0").eax >= 0xb);
            let one = table.get(1, 0).expect("leaf 1");
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (5, 8));
            assert_ne!(one.ecx & bit::HYPERVISOR, 0);
        }
    }

    #[test]
    fn intel_caches_are_shared_by_the_guests_threads() {
        let table = guest(
            &recorded(include_str!("../testdata/x86/intel-sapphirerapids.txt")),
            0,
            SMT2,
        );
        for e in table.entries().iter().filter(|e| e.leaf == 4 && e.eax >> 5 & 7 != 0) {
            let expected = if e.eax >> 5 & 7 >= 3 { 7 } else { 1 };
            assert_eq!((e.eax >> 14 & 0xfff, e.eax >> 26), (expected, 3));
        }
    }

    #[test]
    fn a_single_cpu_is_alone() {
        let table = guest(&hygon(), 0, Topology::flat(1));
        assert_eq!(table.get(1, 0).expect("leaf 1").edx & bit::HTT, 0);
        assert_eq!(table.get(0x8000_0001, 0).expect("features").ecx & bit::CMP_LEGACY, 0);
        assert_eq!(table.get(0x8000_0008, 0).expect("sizes").ecx, 0);
    }

    #[test]
    fn dies_show_on_intel() {
        let topology = Topology {
            threads_per_core: 1,
            cores_per_die: 2,
            dies_per_package: 2,
            packages: 1,
        };
        let table = guest(
            &recorded(include_str!("../testdata/x86/intel-sapphirerapids.txt")),
            3,
            topology,
        );
        let die = table.get(0x1f, 2).expect("die level");
        assert_eq!((die.eax, die.ebx, die.ecx >> 8, die.edx), (2, 4, 5, 3));
    }
}
