//! What holds for all CPUs, not only for those that exist.

use proptest::prelude::*;

use super::offered;
use super::recorded::{X86_CPUS, arm, guest, host, host_with};
use crate::features::{Output, Register};
use crate::{Arm64, CpuidEntry, Processor, X86, baseline, compare};

/// Leaves of all kinds: features, numbers, sizes, what is ignored, and what nobody knows.
const LEAVES: &[(u32, u32)] = &[
    (0, 0),
    (1, 0),
    (4, 1),
    (5, 0),
    (6, 0),
    (7, 0),
    (7, 1),
    (7, 2),
    (0xa, 0),
    (0xd, 0),
    (0xd, 1),
    (0xd, 2),
    (0xd, 9),
    (0x1d, 1),
    (0x24, 0),
    (0x29, 0),
    (0x4000_0001, 0),
    (0x8000_0001, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
    (0x8000_000a, 0),
    (0x8000_001f, 0),
    (0x8000_0021, 0),
];
const MSRS: &[u32] = &[0x8b, 0x10a, 0x345, 0x480, 0x485, 0x48b, 0x48c, 0xc001_1029, 0x1234];

prop_compose! {
    fn entry()(input in 0..LEAVES.len(), out in any::<[u32; 4]>()) -> CpuidEntry {
        let (leaf, subleaf) = LEAVES[input];
        let [eax, mut ebx, mut ecx, mut edx] = out;
        if leaf == 0 {
            (ebx, ecx, edx) = (0x756e_6547, 0x6c65_746e, 0x4965_6e69);
        }
        if leaf == 1 {
            ebx = ebx & !0xff00 | 0x0800;
        }
        CpuidEntry { leaf, subleaf, indexed: matches!(leaf, 4 | 7 | 0xd | 0x1d), eax, ebx, ecx, edx }
    }
}

prop_compose! {
    /// Some CPU of Intel's. Leaves 0 and 1 are there, since every CPU has them.
    fn cpu()(
        entries in proptest::collection::vec(entry(), 0..30),
        msrs in proptest::collection::btree_map((0..MSRS.len()).prop_map(|n| MSRS[n]), any::<u64>(), 0..9),
        tsc_khz in proptest::option::of(2_000_000..2_000_003_u32),
    ) -> X86 {
        let zero = CpuidEntry { ebx: 0x756e_6547, ecx: 0x6c65_746e, edx: 0x4965_6e69, ..CpuidEntry::default() };
        let one = CpuidEntry { leaf: 1, ebx: 0x0800, ..CpuidEntry::default() };
        X86 { cpuid: [zero, one].into_iter().chain(entries).collect(), msrs, tsc_khz }
    }
}

prop_compose! {
    fn arm_cpu()(
        values in proptest::collection::btree_map((1_u32..8, 0_u32..8), any::<u64>(), 0..30),
        init in 0_u32..1024,
        lengths in 0_usize..4,
        address_bits in 32_u8..52,
        midr in any::<u32>(),
    ) -> Arm64 {
        let number = |crm, op2| match Register::system(3, 0, 0, crm, op2) {
            Register::Kvm(number) => number,
            _ => unreachable!("a system register"),
        };
        let mut registers: std::collections::BTreeMap<u32, u64> =
            values.into_iter().map(|((crm, op2), value)| (number(crm, op2), value)).collect();
        registers.insert(number(0, 0), midr.into());
        Arm64 {
            registers,
            init,
            vector_lengths: [128, 256, 512, 1024][..lengths].to_vec(),
            counter_hz: 1_000_000_000,
            address_bits,
        }
    }
}

/// Equal but for the order of leaves, and for what is 0, which is the same as not there.
fn same(a: &Processor, b: &Processor) -> bool {
    let set = |processor: &Processor| {
        let mut registers = processor.registers();
        registers.retain(|_, value| *value != 0);
        registers
    };
    let rest = |processor: &Processor| match processor {
        Processor::X86(x86) => (x86.tsc_khz, Vec::new(), 0, 0),
        Processor::Arm64(arm) => (None, arm.vector_lengths.clone(), arm.counter_hz, arm.address_bits),
    };
    set(a) == set(b) && rest(a) == rest(b)
}

fn laws(a: &Processor, b: &Processor, c: &Processor) -> Result<(), TestCaseError> {
    let both = |a: &Processor, b: &Processor| a.intersect(b).expect("CPUs of one kind");
    prop_assert!(same(&both(a, a), a), "idempotent");
    prop_assert!(same(&both(a, b), &both(b, a)), "commutative");
    prop_assert!(same(&both(&both(a, b), c), &both(a, &both(b, c))), "associative");
    Ok(())
}

proptest! {
    #[test]
    fn what_cpus_have_in_common_does_not_depend_on_the_order(a in cpu(), b in cpu(), c in cpu()) {
        laws(&Processor::X86(a), &Processor::X86(b), &Processor::X86(c))?;
    }

    #[test]
    fn nor_does_it_on_arm(a in arm_cpu(), b in arm_cpu(), c in arm_cpu()) {
        laws(&Processor::Arm64(a), &Processor::Arm64(b), &Processor::Arm64(c))?;
    }

    #[test]
    fn every_host_accepts_its_baseline(cpus in proptest::collection::vec(cpu(), 1..5)) {
        let hosts: Vec<_> = cpus.into_iter().map(|cpu| host(Processor::X86(cpu))).collect();
        let common = baseline(&hosts).expect("a baseline");
        for host in &hosts {
            prop_assert!(compare(&common, host).is_accepted());
        }
        let again = baseline(&hosts[..1]).expect("a baseline");
        prop_assert_eq!(again.processor(), hosts[0].processor());
    }

    #[test]
    fn every_arm_host_that_lets_all_be_set_does_too(cpus in proptest::collection::vec(arm_cpu(), 1..5)) {
        let all = || (0x0013_c000..0x0013_c040).chain([0x0013_c000]).map(|number| (number, u64::MAX)).collect();
        let hosts: Vec<_> = cpus.into_iter().map(|cpu| host_with(Processor::Arm64(cpu), all())).collect();
        let common = baseline(&hosts).expect("a baseline");
        for host in &hosts {
            prop_assert!(compare(&common, host).is_accepted());
        }
    }

    #[test]
    fn any_two_descriptions_give_a_verdict(a in cpu(), b in cpu(), c in arm_cpu()) {
        let (a, b) = (Processor::X86(a), Processor::X86(b));
        let verdict = compare(&guest(a.clone()), &host(b));
        prop_assert_eq!(verdict.to_string().is_empty(), false);
        prop_assert!(verdict.blockers.len() <= 512);
        for blocker in &verdict.blockers {
            prop_assert!(!blocker.name.is_empty() && !blocker.remedy.is_empty());
        }
        prop_assert!(compare(&guest(Processor::Arm64(c.clone())), &host(Processor::Arm64(c))).is_accepted());
        prop_assert!(compare(&guest(a.clone()), &host(a)).is_accepted());
    }
}

#[test]
fn recorded_cpus_keep_the_laws_too() {
    let all: Vec<Processor> = X86_CPUS
        .iter()
        .filter(|(name, _)| name.starts_with("amd"))
        .map(|(name, _)| offered::processor(name))
        .collect();
    for a in &all {
        for b in &all {
            for c in &all {
                laws(a, b, c).expect("laws");
            }
        }
    }
    let arms = [
        "qemu-neoverse-n1-linux-6.1",
        "qemu-neoverse-v1-linux-6.1",
        "qemu-neoverse-n2-linux-6.1",
    ];
    let [a, b, c] = arms.map(|name| Processor::Arm64(arm(name)));
    laws(&a, &b, &c).expect("laws");
}

/// Every bit a guest has is missed where it is gone, by its name or its place, unless it is no feature.
#[test]
fn no_missing_bit_goes_unnoticed() {
    let mut missed = 0;
    for name in ["amd-turin", "intel-graniterapids", "hygon-0910f00", "zhaoxin-kx7000"] {
        let cpu = offered::x86(name);
        let (guest, processor) = (guest(Processor::X86(cpu.clone())), Processor::X86(cpu.clone()));
        let (table, vendor) = (processor.features(), processor.vendor());
        for (register, value) in processor.registers() {
            for bit in (0..32).filter(|bit| value >> bit & 1 == 1) {
                let less = without(&cpu, register, bit);
                let layout = matches!(
                    register,
                    Register::Cpuid {
                        leaf: 0xd,
                        subleaf: 2..,
                        ..
                    }
                );
                let verdict = compare(&guest, &host(Processor::X86(less)));
                let feature = table
                    .fields(register, vendor)
                    .find(|feature| feature.mask() >> bit & 1 == 1);
                let expected = match feature {
                    _ if layout => continue,
                    Some(feature) if feature.rule.compares() => feature.name.to_owned(),
                    Some(_) => String::new(),
                    None => table.place(register, bit, 1),
                };
                let vendor_gone = matches!(register, Register::Cpuid { leaf: 0, .. }) && !verdict.is_accepted();
                let names = verdict.names().join(" ");
                assert!(
                    names == expected || vendor_gone,
                    "{name} {register}[{bit}]: {names} instead of {expected}"
                );
                missed += usize::from(!names.is_empty());
            }
        }
    }
    assert!(missed > 400, "{missed}");
}

/// The CPU without one bit.
fn without(cpu: &X86, register: Register, bit: u8) -> X86 {
    let Register::Cpuid { leaf, subleaf, output } = register else {
        panic!("{register} is no leaf");
    };
    let mut entry = *cpu.cpuid.get(leaf, subleaf).expect("a leaf");
    let value = match output {
        Output::Eax => &mut entry.eax,
        Output::Ebx => &mut entry.ebx,
        Output::Ecx => &mut entry.ecx,
        Output::Edx => &mut entry.edx,
    };
    *value &= !(1 << bit);
    X86 {
        cpuid: cpu.cpuid.entries().iter().copied().chain([entry]).collect(),
        ..cpu.clone()
    }
}
