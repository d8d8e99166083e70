//! The files of features are what they claim to be: complete, without contradictions, and known by the names people know.

use std::collections::{BTreeMap, BTreeSet};

use super::recorded;
use crate::Vendor;
use crate::features::{self, Feature, LinuxName, Output, Register, Rule, Table, arm64, linux_name, x86};

fn both() -> [&'static Table; 2] {
    [x86(), arm64()]
}

#[test]
fn names_are_unique() {
    for table in both() {
        let mut names = BTreeSet::new();
        for (register, feature) in table.all() {
            assert!(
                names.insert(feature.name),
                "{} is twice, once in {register}",
                feature.name
            );
            assert!(!feature.name.contains(['[', ']', ' ']), "{}", feature.name);
        }
    }
    assert!(x86().all().count() > 800 && arm64().all().count() > 300);
}

#[test]
fn no_bit_has_two_names_on_one_cpu() {
    let vendors = [
        Vendor::Intel,
        Vendor::Amd,
        Vendor::Hygon,
        Vendor::Zhaoxin,
        Vendor::Other,
    ];
    for table in both() {
        for vendor in vendors.map(Some).into_iter().chain([None]) {
            let mut taken: BTreeMap<Register, u64> = BTreeMap::new();
            for (register, feature) in table.all().filter(|(_, feature)| feature.is_of(vendor)) {
                let bits = taken.entry(register).or_default();
                assert_eq!(*bits & feature.mask(), 0, "{} in {register}", feature.name);
                *bits |= feature.mask();
            }
        }
    }
}

#[test]
fn a_register_of_32_bits_has_no_others() {
    for (register, feature) in x86().all() {
        if matches!(register, Register::Cpuid { .. }) {
            assert!(feature.low + feature.width <= 32, "{}", feature.name);
        }
    }
}

#[test]
fn what_a_feature_needs_is_a_feature() {
    let mut needs = BTreeSet::new();
    for table in both() {
        for (_, feature) in table.all() {
            needs.extend(feature.needs);
            assert!(
                feature.needs.is_none_or(|needs| table.find(needs).is_some()),
                "{}",
                feature.name
            );
        }
    }
    let known = [
        "KVM_ARM_VCPU_PMU_V3",
        "KVM_ARM_VCPU_PTRAUTH_ADDRESS",
        "KVM_ARM_VCPU_PTRAUTH_GENERIC",
    ];
    let others = ["KVM_ARM_VCPU_SVE", "pmu_version", "vmx"];
    assert!(needs.into_iter().eq(known.into_iter().chain(others)));
}

#[test]
fn what_is_not_compared_says_why() {
    for table in both() {
        for (place, why) in table.all_ignored() {
            assert!(why.len() > 10, "{place}: {why}");
        }
        for (_, feature) in table.all().filter(|(_, feature)| !feature.rule.compares()) {
            assert!(feature.reason.is_some_and(|why| why.len() > 10), "{}", feature.name);
        }
    }
    let ignored: Vec<String> = x86().all_ignored().map(|(place, _)| place).collect();
    for place in [
        "CPUID.3",
        "CPUID.4",
        "CPUID.B",
        "CPUID.80000002",
        "CPUID.8000001E",
        "MSR.8B",
    ] {
        assert!(ignored.iter().any(|known| known == place), "{place}");
    }
}

#[test]
fn features_are_where_the_manuals_have_them() {
    let cpuid = |leaf, subleaf, output| Register::Cpuid { leaf, subleaf, output };
    for (name, register, low) in [
        ("avx512_vnni", cpuid(7, 0, Output::Ecx), 11),
        ("avx_vnni", cpuid(7, 1, Output::Eax), 4),
        ("bhi_ctrl", cpuid(7, 2, Output::Edx), 4),
        ("aes", cpuid(1, 0, Output::Ecx), 25),
        ("nx", cpuid(0x8000_0001, 0, Output::Edx), 20),
        ("clzero", cpuid(0x8000_0008, 0, Output::Ebx), 0),
        ("npt", cpuid(0x8000_000a, 0, Output::Edx), 0),
        ("xsavec", cpuid(0xd, 1, Output::Eax), 1),
        ("kvm_pv_eoi", cpuid(0x4000_0001, 0, Output::Eax), 6),
        ("ace", cpuid(0xc000_0001, 0, Output::Edx), 6),
        ("rdcl_no", Register::Msr(0x10a), 0),
        ("vmx_secondary_ept", Register::Msr(0x48b), 33),
    ] {
        let (found, feature) = x86().find(name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!((found, feature.low, feature.width), (register, low, 1), "{name}");
    }
    for (name, encoding, low, signed, rule) in [
        ("ID_AA64PFR1_EL1.SSBS", [3, 0, 0, 4, 1], 4, false, Rule::AtMost),
        ("ID_AA64MMFR0_EL1.PARange", [3, 0, 0, 7, 0], 0, false, Rule::AtMost),
        ("ID_AA64PFR0_EL1.FP", [3, 0, 0, 4, 0], 16, true, Rule::AtMost),
        ("ID_AA64ISAR1_EL1.API", [3, 0, 0, 6, 1], 8, false, Rule::Same),
        ("ID_AA64DFR0_EL1.PMUVer", [3, 0, 0, 5, 0], 8, true, Rule::AtMost),
        ("CTR_EL0.DminLine", [3, 3, 0, 0, 1], 16, false, Rule::AtMost),
        ("MIDR_EL1", [3, 0, 0, 0, 0], 0, false, Rule::Any),
    ] {
        let [op0, op1, crn, crm, op2] = encoding;
        let (found, feature) = arm64().find(name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(found, Register::system(op0, op1, crn, crm, op2), "{name}");
        assert_eq!(
            (feature.low, feature.signed, feature.rule),
            (low, signed, rule),
            "{name}"
        );
    }
}

#[test]
fn every_flag_of_linux_is_known() {
    let flags = include_str!("../../testdata/linux-flags.txt").lines();
    let mut count = 0;
    for flag in flags.filter(|flag| !flag.starts_with('#')) {
        count += 1;
        match linux_name(flag).unwrap_or_else(|| panic!("{flag} is unknown")) {
            LinuxName::Features(names) => {
                assert!(!names.is_empty());
                for name in names {
                    assert!(x86().find(name).is_some() || name.starts_with("cdp_"), "{flag}: {name}");
                }
            }
            LinuxName::Derived(reason) => assert!(reason.len() > 5, "{flag}"),
        }
    }
    assert!(count > 200);
    assert_eq!(
        linux_name("avx512_vnni"),
        Some(LinuxName::Features(vec!["avx512_vnni"]))
    );
    assert!(matches!(linux_name("ssbd"), Some(LinuxName::Features(names)) if names.contains(&"amd_ssbd")));
    assert!(matches!(linux_name("rep_good"), Some(LinuxName::Derived(_))));
    assert_eq!(linux_name("no_such_flag"), None);
    assert_eq!(linux_name("#"), None);
}

/// What a Linux host with AMD's Turin shows, and what its leaves say, agree.
#[test]
fn flags_that_linux_shows_are_in_the_leaves() {
    let listing = crate::Processor::X86(recorded::x86("amd-turin")).listing();
    for flag in [
        "avx512_vnni",
        "vaes",
        "constant_tsc",
        "ssbd",
        "ibpb",
        "stibp",
        "movdir64b",
        "avx_vnni",
        "npt",
        "perfmon_v2",
        "sev_snp",
        "autoibrs",
        "ibrs_enhanced",
        "x2avic",
        "fsrm",
        "flush_l1d",
        "avx512_vp2intersect",
    ] {
        let Some(LinuxName::Features(names)) = linux_name(flag) else {
            panic!("{flag} is no feature");
        };
        assert!(
            names.iter().any(|name| listing.features.iter().any(|has| has == name)),
            "{flag}: {names:?}"
        );
    }
    for flag in ["ace", "kl", "amx_tile", "hle"] {
        assert!(listing.features.iter().all(|has| has != flag), "{flag}");
    }
}

#[test]
fn bits_without_a_name_have_a_place() {
    let cpuid = |leaf, subleaf, output| Register::Cpuid { leaf, subleaf, output };
    for (register, low, width, place) in [
        (cpuid(7, 1, Output::Eax), 13, 1, "CPUID.7.1:EAX[13]"),
        (cpuid(7, 0, Output::Ebx), 22, 1, "CPUID.7.0:EBX[22]"),
        (cpuid(0x8000_0021, 0, Output::Eax), 12, 1, "CPUID.80000021:EAX[12]"),
        (cpuid(0x29, 3, Output::Edx), 0, 1, "CPUID.29.3:EDX[0]"),
        (Register::Msr(0x10a), 63, 1, "MSR.10A[63]"),
    ] {
        assert_eq!(x86().place(register, low, width), place);
    }
    assert_eq!(
        arm64().place(Register::system(3, 0, 0, 4, 1), 20, 4),
        "ID_AA64PFR1_EL1[23:20]"
    );
    assert_eq!(
        arm64().place(Register::system(3, 0, 0, 4, 3), 0, 4),
        "S3_0_C0_C4_3[3:0]"
    );
    assert_eq!(arm64().place(Register::Kvm(0x14_0009), 4, 4), "KVM.140009[7:4]");
}

fn feature(rule: Rule, width: u8, signed: bool) -> Feature {
    let (_, any) = x86().find("avx2").expect("avx2");
    Feature {
        rule,
        width,
        signed,
        ..any.clone()
    }
}

#[test]
fn rules_compare_and_combine() {
    // Rule, guest, host, whether it fits, what both have.
    for (rule, guest, host, fits, common) in [
        (Rule::Subset, 0b0101, 0b0111, true, Some(0b0101)),
        (Rule::Subset, 0b1000, 0b0111, false, Some(0)),
        (Rule::AtMost, 2, 3, true, Some(2)),
        (Rule::AtMost, 3, 2, false, Some(2)),
        (Rule::AtLeast, 2, 3, false, Some(3)),
        (Rule::Same, 0, 3, true, Some(0)),
        (Rule::Same, 2, 3, false, Some(0)),
        (Rule::Same, 3, 3, true, Some(3)),
        (Rule::Exact, 0, 3, false, None),
        (Rule::Exact, 3, 3, true, Some(3)),
        (Rule::Burden, 0b01, 0b11, false, Some(0b11)),
        (Rule::Burden, 0b11, 0b01, true, Some(0b11)),
        (Rule::Granule, 0, 4, true, Some(0)),
        (Rule::Granule, 4, 0, false, Some(0)),
        (Rule::Granule, 5, 4, true, Some(5)),
        (Rule::Width, 9, 0, true, Some(9)),
        (Rule::Width, 9, 8, false, Some(8)),
        (Rule::Any, 9, 8, true, Some(8)),
        (Rule::Lowest, 9, 8, true, Some(8)),
        (Rule::Ignored, 9, 8, true, Some(0)),
    ] {
        let feature = feature(rule, 4, false);
        assert_eq!(feature.fits(guest, host), fits, "{rule:?} {guest} {host}");
        assert_eq!(feature.common(guest, host), common, "{rule:?} {guest} {host}");
    }
    // 0xf is -1: no floating point at all.
    let signed = feature(Rule::AtMost, 4, true);
    assert!(signed.fits(0xf, 0) && !signed.fits(0, 0xf));
    assert_eq!(signed.common(0xf, 1), Some(0xf));
}

#[test]
fn all_embedded_files_are_read() {
    for (text, table) in [
        (include_str!("../../data/x86/vmx.txt"), x86()),
        (include_str!("../../data/x86/centaur.txt"), x86()),
        (include_str!("../../data/arm64/aarch32.txt"), arm64()),
    ] {
        let last = text.lines().rfind(|line| line.contains('[')).expect("a feature");
        let name = last.split_whitespace().nth(1).expect("a name");
        assert!(table.find(name).is_some(), "{name}");
    }
    assert!(features::Table::parse(&["MSR.1[0] x maybe"]).is_err());
}
