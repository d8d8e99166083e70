//! What KVM makes of recorded hardware: the features it offers to guests, as of Linux 7.3, and its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use super::recorded;
use crate::features::{self, Output, Register};
use crate::{CpuidEntry, CpuidTable, Processor, X86};

/// State components that KVM lets guests have, each with the feature that needs it. Components 0 and 1 are always there.
const COMPONENTS: &[(u32, &str)] = &[
    (2, "avx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx_tile"),
    (18, "amx_tile"),
];
/// The same of supervisor state.
const SUPERVISOR: &[(u32, &str)] = &[(11, "shstk"), (12, "shstk")];
/// Where AVX-512's components are on Intel's CPUs, of which one was recorded without: size and offset.
const INTEL_LAYOUT: &[(u32, [u32; 2])] = &[
    (5, [0x40, 0x440]),
    (6, [0x200, 0x480]),
    (7, [0x400, 0x680]),
    (9, [8, 0xa80]),
];

fn names() -> &'static BTreeSet<&'static str> {
    static NAMES: OnceLock<BTreeSet<&'static str>> = OnceLock::new();
    let read = || include_str!("../../testdata/kvm-offers.txt").lines().collect();
    NAMES.get_or_init(read)
}

/// What KVM offers on a recorded CPU.
pub(crate) fn x86(name: &str) -> X86 {
    let hardware = Processor::X86(recorded::x86(name));
    let mut registers = BTreeMap::new();
    for (register, value) in hardware.registers() {
        let keep = features::x86().fields(register, hardware.vendor()).filter(|feature| {
            let told = [
                "vendor_0",
                "vendor_1",
                "vendor_2",
                "signature",
                "clflush_size",
                "physical_address_bits",
            ];
            let sizes = [
                "max_leaf",
                "max_extended_leaf",
                "linear_address_bits",
                "leaf7_max_subleaf",
                "svm_version",
            ];
            names().contains(feature.name) || told.contains(&feature.name) || sizes.contains(&feature.name)
        });
        let mask = keep.fold(0, |mask, feature| mask | feature.mask());
        if value & mask != 0 {
            registers.insert(register, value & mask);
        }
    }
    // Intel's CPUs tell of SYSCALL in 64-bit mode only, and most were recorded in another. KVM asks in that.
    let leaf = 0x8000_0001;
    let output = Output::Edx;
    *registers
        .entry(Register::Cpuid {
            leaf,
            subleaf: 0,
            output,
        })
        .or_default() |= 1 << 11;
    let mut cpuid: CpuidTable = entries(&registers).collect();
    let listing = hardware.listing();
    let has = |feature: &&(u32, &str)| listing.features.iter().any(|name| name == feature.1);
    let user: Vec<u32> = COMPONENTS.iter().filter(has).map(|component| component.0).collect();
    let supervisor: Vec<u32> = SUPERVISOR.iter().filter(has).map(|component| component.0).collect();
    let flags = cpuid.get(0xd, 1).map_or(0, |entry| entry.eax);
    let state = state(&hardware, &user, &supervisor, flags);
    let kvm = CpuidEntry {
        leaf: 0x4000_0001,
        eax: 0x0100_7efb,
        ..CpuidEntry::default()
    };
    cpuid = cpuid.entries().iter().copied().chain(state).chain([kvm]).collect();
    X86 {
        cpuid,
        msrs: BTreeMap::new(),
        tsc_khz: None,
    }
}

pub(crate) fn processor(name: &str) -> Processor {
    Processor::X86(x86(name))
}

/// Leaf 0xD of a guest with these components.
fn state(hardware: &Processor, user: &[u32], supervisor: &[u32], flags: u32) -> Vec<CpuidEntry> {
    let Processor::X86(X86 { cpuid, .. }) = hardware else {
        return Vec::new();
    };
    let bits = |components: &[u32]| components.iter().fold(0, |bits, n| bits | 1 << n);
    let at = |subleaf, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
        leaf: 0xd,
        subleaf,
        indexed: true,
        eax,
        ebx,
        ecx,
        edx,
    };
    let component = |n: &u32| {
        let recorded = cpuid.get(0xd, *n).filter(|entry| entry.indexed && entry.eax != 0);
        let known = INTEL_LAYOUT.iter().find(|(known, _)| known == n);
        match (recorded, known) {
            (Some(entry), _) => *entry,
            (None, Some((_, [size, offset]))) => at(*n, [*size, *offset, 0, 0]),
            (None, None) => at(*n, [0; 4]),
        }
    };
    let all: Vec<CpuidEntry> = user.iter().chain(supervisor).map(component).collect();
    let size = all
        .iter()
        .map(|entry| entry.eax + entry.ebx)
        .max()
        .unwrap_or(0)
        .max(0x240);
    let head = [
        at(0, [3 | bits(user), size, size, 0]),
        at(1, [flags, 0, bits(supervisor), 0]),
    ];
    head.into_iter().chain(all).collect()
}

/// Entries of CPUID with these outputs, all others 0. Leaf 0xD is made by itself.
fn entries(registers: &BTreeMap<Register, u64>) -> impl Iterator<Item = CpuidEntry> {
    let inputs: BTreeSet<(u32, u32)> = registers
        .keys()
        .filter_map(|register| match register {
            Register::Cpuid { leaf, subleaf, .. } => Some((*leaf, *subleaf)),
            _ => None,
        })
        .collect();
    inputs.into_iter().map(|(leaf, subleaf)| {
        let [eax, ebx, ecx, edx] = Output::ALL.map(|output| {
            let value = registers.get(&Register::Cpuid { leaf, subleaf, output });
            value.copied().unwrap_or(0) as u32
        });
        CpuidEntry {
            leaf,
            subleaf,
            indexed: matches!(leaf, 7 | 0xd),
            eax,
            ebx,
            ecx,
            edx,
        }
    })
}
