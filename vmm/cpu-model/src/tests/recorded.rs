//! CPUs as they were recorded on real hosts, and on emulated ones of ARM's.

use std::collections::BTreeMap;

use crate::features::Register;
use crate::{Arm64, CpuidEntry, CpuidTable, GuestProcessor, Host, HostProcessor, Processor, X86};

macro_rules! recorded {
    ($($place:literal: $($name:literal),* $(,)?);*) => {
        &[$($(($name, include_str!(concat!("../../testdata/", $place, "/", $name, ".txt")))),*),*]
    };
}

/// x86 CPUs: what the hardware says.
pub(crate) const X86_CPUS: &[(&str, &str)] = recorded!("x86":
    "amd-naples", "amd-rome", "amd-milan", "amd-genoa", "amd-bergamo", "amd-turin",
    "hygon-0900f02", "hygon-0900f11", "hygon-0900f22", "hygon-0910f00",
    "intel-haswell-ep", "intel-broadwell-ep", "intel-skylake-sp", "intel-cascadelake-sp", "intel-icelake-sp",
    "intel-sapphirerapids", "intel-emeraldrapids", "intel-graniterapids",
    "zhaoxin-kx7000");

/// CPUs of ARM's: what KVM of Linux 6.1 shows with all features of vCPUs.
pub(crate) const ARM_CPUS: &[(&str, &str)] = recorded!("arm64":
    "qemu-cortex-a76-linux-6.1", "qemu-neoverse-n1-linux-6.1", "qemu-neoverse-v1-linux-6.1",
    "qemu-neoverse-n2-linux-6.1", "qemu-max-linux-6.1");

/// Features of KVM_ARM_VCPU_INIT: PSCI 0.2, PMU, and pointer authentication, SVE.
pub(crate) const INIT: u32 = 1 << 2 | 1 << 3;
pub(crate) const INIT_ALL: u32 = INIT | 1 << 4 | 1 << 5 | 1 << 6;

fn text(list: &[(&'static str, &'static str)], name: &str) -> &'static str {
    let found = list.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("{name} was not recorded")).1
}

/// Reads a recorded table: `CPUID LEAF: EAX-EBX-ECX-EDX [SL subleaf]`, hexadecimal.
pub(crate) fn cpuid(text: &str) -> CpuidTable {
    let hex = |s: &str| u32::from_str_radix(s, 16).expect("hexadecimal");
    let entry = |line: &str| {
        let (leaf, rest) = line.strip_prefix("CPUID ")?.split_once(": ")?;
        let registers: Vec<u32> = rest.get(..35)?.split('-').map(hex).collect();
        let subleaf = rest
            .split_once("[SL ")
            .and_then(|(_, s)| s.split_once(']'))
            .map(|(s, _)| hex(s));
        let [eax, ebx, ecx, edx] = registers[..] else {
            return None;
        };
        Some(CpuidEntry {
            leaf: hex(leaf),
            subleaf: subleaf.unwrap_or(0),
            indexed: subleaf.is_some(),
            eax,
            ebx,
            ecx,
            edx,
        })
    };
    let mut entries: Vec<CpuidEntry> = text.lines().filter_map(entry).collect();
    // One recording does not number subleaves. They are in order.
    for index in 1..entries.len() {
        let (before, this) = (entries[index - 1], entries[index]);
        if before.leaf == this.leaf && !this.indexed {
            (entries[index].subleaf, entries[index].indexed) = (before.subleaf + 1, true);
            entries[index - 1].indexed = true;
        }
    }
    // One was made in a guest of another hypervisor, whose leaves are not the CPU's.
    entries.retain(|entry| entry.leaf >> 28 != 4);
    entries.into_iter().collect()
}

/// A recorded x86 CPU.
pub(crate) fn x86(name: &str) -> X86 {
    X86 {
        cpuid: cpuid(text(X86_CPUS, name)),
        msrs: BTreeMap::new(),
        tsc_khz: None,
    }
}

/// Reads recorded ID registers: name and hexadecimal value. Names lack `_EL1` now and then.
pub(crate) fn arm(name: &str) -> Arm64 {
    let table = crate::features::arm64();
    let number = |register: &str| {
        let register = register.rsplit('?').next().unwrap_or(register);
        let long = format!("{register}_EL1");
        let known = |(_, feature): &(Register, &crate::features::Feature)| {
            let owner = feature.name.split('.').next().unwrap_or_default();
            owner == register || owner == long
        };
        match (register, table.all().find(known)) {
            ("MPIDR_EL1", _) => Register::system(3, 0, 0, 0, 5),
            (_, Some((register, _))) => register,
            (_, None) => panic!("{register} is no register"),
        }
    };
    let line = |line: &'static str| {
        let (register, value) = line.split_once(' ').expect("a name and a value");
        let Register::Kvm(number) = number(register) else {
            panic!("{register} is no register of ARM's");
        };
        (number, u64::from_str_radix(value, 16).expect("hexadecimal"))
    };
    let sve = ["v1", "n2", "max"].iter().any(|with| name.contains(with));
    let lengths: &[u16] = if name.contains("max") {
        &[128, 256, 512]
    } else {
        &[128, 256]
    };
    Arm64 {
        registers: text(ARM_CPUS, name).lines().map(line).collect(),
        init: if sve { INIT_ALL } else { INIT },
        vector_lengths: if sve { lengths.to_vec() } else { Vec::new() },
        counter_hz: 62_500_000,
        address_bits: 40,
    }
}

pub(crate) fn guest(processor: Processor) -> GuestProcessor {
    GuestProcessor::new(processor).expect("a CPU")
}

/// A host whose KVM lets nothing be set, as Linux 6.1's.
pub(crate) fn host(processor: Processor) -> HostProcessor {
    host_with(processor, BTreeMap::new())
}

pub(crate) fn host_with(processor: Processor, writable: BTreeMap<u32, u64>) -> HostProcessor {
    let host = Host {
        processor,
        kernel: "6.1.0".to_owned(),
        tsc_scaling: false,
        writable,
    };
    HostProcessor::new(host).expect("a host")
}

/// Every recorded x86 CPU.
pub(crate) fn all_x86() -> impl Iterator<Item = (&'static str, Processor)> {
    X86_CPUS.iter().map(|(name, _)| (*name, Processor::X86(x86(name))))
}

/// Every recorded CPU of ARM's.
pub(crate) fn all_arm() -> impl Iterator<Item = (&'static str, Processor)> {
    ARM_CPUS.iter().map(|(name, _)| (*name, Processor::Arm64(arm(name))))
}
