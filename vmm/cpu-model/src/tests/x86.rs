//! Verdicts on recorded x86 CPUs.

use super::recorded::{X86_CPUS, guest, host, x86};
use super::{offered, recorded};
use crate::{CpuidEntry, Host, HostProcessor, Processor, Verdict, X86, baseline, compare};

/// Whether a guest with all that KVM offers on one host can go to another.
fn go(from: &str, to: &str) -> Verdict {
    compare(&guest(offered::processor(from)), &host(offered::processor(to)))
}

fn compared(from: X86, to: X86) -> Verdict {
    compare(&guest(Processor::X86(from)), &host(Processor::X86(to)))
}

#[test]
fn guests_go_to_newer_cpus_of_their_vendor() {
    for (from, to) in [
        ("amd-naples", "amd-rome"),
        ("amd-naples", "amd-turin"),
        ("amd-rome", "amd-milan"),
        ("amd-milan", "amd-genoa"),
        ("amd-milan", "amd-turin"),
        ("amd-genoa", "amd-bergamo"),
        ("amd-bergamo", "amd-genoa"),
        ("amd-genoa", "amd-turin"),
        ("hygon-0900f02", "hygon-0900f11"),
        ("hygon-0900f11", "hygon-0900f22"),
        ("hygon-0900f22", "hygon-0900f11"),
        ("hygon-0900f22", "hygon-0910f00"),
        ("intel-haswell-ep", "intel-skylake-sp"),
        ("intel-broadwell-ep", "intel-skylake-sp"),
        ("intel-skylake-sp", "intel-cascadelake-sp"),
        ("intel-cascadelake-sp", "intel-icelake-sp"),
        ("intel-sapphirerapids", "intel-graniterapids"),
    ] {
        let verdict = go(from, to);
        assert!(verdict.is_accepted(), "{from} -> {to}: {verdict}");
    }
}

#[test]
fn guests_do_not_go_to_cpus_that_lack_something() {
    for (from, to, names) in [
        ("hygon-0900f11", "hygon-0900f02", "pclmulqdq aes sha_ni"),
        (
            "hygon-0910f00",
            "hygon-0900f22",
            "umip amd_ibrs amd_stibp amd_stibp_always_on amd_ssbd",
        ),
        (
            "intel-cascadelake-sp",
            "intel-skylake-sp",
            "avx512_vnni arch_capabilities",
        ),
        (
            "intel-broadwell-ep",
            "intel-haswell-ep",
            "hle rtm rdseed adx smap 3dnowprefetch",
        ),
        // The older CPU has newer microcode.
        (
            "intel-haswell-ep",
            "intel-broadwell-ep",
            "md_clear spec_ctrl intel_stibp flush_l1d spec_ctrl_ssbd",
        ),
        ("intel-sapphirerapids", "intel-emeraldrapids", "physical_address_bits"),
        ("intel-emeraldrapids", "intel-graniterapids", "sgx sgx_lc"),
        (
            "intel-graniterapids",
            "intel-sapphirerapids",
            "amx_fp16 prefetchiti avx10 ddpd_u mcdt_no avx10_128 avx10_256 avx10_512",
        ),
        (
            "amd-turin",
            "amd-genoa",
            "tsc_adjust bus_lock_detect movdiri movdir64b avx512_vp2intersect avx_vnni prefetchi eraps sbpb ibpb_brtype \
             srso_user_kernel_no",
        ),
        (
            "amd-genoa",
            "amd-milan",
            "x2apic avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 gfni avx512_vnni \
             avx512_bitalg avx512_vpopcntdq la57 flush_l1d avx512_bf16 xcr0_avx512_opmask xcr0_avx512_zmm_hi256 \
             xcr0_avx512_hi16_zmm physical_address_bits linear_address_bits amd_ibpb_ret vnmi wrmsr_xx_base_ns autoibrs \
             no_smm_ctl_msr gp_on_user_cpuid perfmon_v2",
        ),
        (
            "amd-milan",
            "amd-rome",
            "pcid erms invpcid pku shstk vaes vpclmulqdq fsrm xcr0_pkru xsave_area_size xss_cet_u xss_cet_s amd_ibrs \
             amd_stibp_always_on efer_lmsle_mbz amd_psfd svme_addr_chk sme_coherent no_nested_data_bp lfence_rdtsc \
             null_sel_clr_base",
        ),
    ] {
        let names: Vec<&str> = names.split_whitespace().collect();
        assert_eq!(go(from, to).names(), names, "{from} -> {to}");
    }
}

#[test]
fn another_vendor_is_refused_in_one_sentence() {
    for (from, to, has, offers) in [
        ("hygon-0900f22", "amd-naples", "HygonGenuine", "AuthenticAMD"),
        ("amd-rome", "hygon-0910f00", "AuthenticAMD", "HygonGenuine"),
        ("amd-genoa", "intel-sapphirerapids", "AuthenticAMD", "GenuineIntel"),
        ("zhaoxin-kx7000", "intel-haswell-ep", "CentaurHauls", "GenuineIntel"),
    ] {
        let verdict = go(from, to);
        assert_eq!(verdict.names(), ["vendor"], "{from} -> {to}");
        let blocker = &verdict.blockers[0];
        assert_eq!((blocker.guest.as_str(), blocker.destination.as_str()), (has, offers));
        assert!(blocker.remedy.contains("profile"), "{blocker}");
    }
}

/// Every pair: a CPU takes its own guests, and what takes what is an order.
#[test]
fn acceptance_is_an_order() {
    let names: Vec<&str> = X86_CPUS.iter().map(|(name, _)| *name).collect();
    let vendor = |name: &str| name.split('-').next().map(str::to_owned);
    for raw in [true, false] {
        let cpu = |name: &str| {
            if raw {
                Processor::X86(x86(name))
            } else {
                offered::processor(name)
            }
        };
        let accepts: Vec<Vec<bool>> = names
            .iter()
            .map(|from| {
                let guest = guest(cpu(from));
                let to = names.iter().map(|to| {
                    let verdict = compare(&guest, &host(cpu(to)));
                    let only_vendor = verdict.names() == ["vendor"];
                    assert_eq!(only_vendor, vendor(from) != vendor(to), "{from} -> {to}: {verdict}");
                    verdict.is_accepted()
                });
                to.collect()
            })
            .collect();
        for a in 0..names.len() {
            assert!(accepts[a][a], "{}", names[a]);
            for b in 0..names.len() {
                for c in 0..names.len() {
                    let chain = accepts[a][b] && accepts[b][c];
                    assert!(!chain || accepts[a][c], "{} {} {}", names[a], names[b], names[c]);
                }
            }
        }
    }
}

/// What the hardware has is more than KVM offers, and has names, too.
#[test]
fn hardware_itself_has_few_bits_without_a_name() {
    for (name, processor) in recorded::all_x86() {
        let unnamed = processor.listing().unnamed;
        let most = if name == "amd-turin" { 40 } else { 5 };
        assert!(unnamed.len() < most, "{name}: {unnamed:?}");
    }
    let turin = Processor::X86(x86("amd-turin")).listing();
    assert!(
        turin.unnamed.contains(&"CPUID.80000021:EAX[12]".to_owned()),
        "{:?}",
        turin.unnamed
    );
}

fn with(mut cpu: X86, leaf: u32, subleaf: u32, edit: impl Fn(&mut CpuidEntry)) -> X86 {
    let indexed = matches!(leaf, 7 | 0xd);
    let mut entry = cpu.cpuid.get(leaf, subleaf).copied().unwrap_or(CpuidEntry {
        leaf,
        subleaf,
        indexed,
        ..CpuidEntry::default()
    });
    edit(&mut entry);
    cpu.cpuid = cpu.cpuid.entries().iter().copied().chain([entry]).collect();
    cpu
}

#[test]
fn bits_that_nobody_knows_are_compared() {
    let host = offered::x86("intel-sapphirerapids");
    let newer = with(host.clone(), 7, 1, |entry| entry.eax |= 1 << 13);
    assert_eq!(compared(newer.clone(), host.clone()).names(), ["CPUID.7.1:EAX[13]"]);
    assert!(compared(host.clone(), newer).is_accepted());
    let leaf = with(host.clone(), 0x29, 0, |entry| entry.edx = 1 << 31);
    assert_eq!(compared(leaf, host.clone()).names(), ["CPUID.29:EDX[31]"]);
    let mut msr = host.clone();
    msr.msrs.insert(0x10a, 1 << 63);
    assert_eq!(compared(msr, host).names(), ["MSR.10A[63]"]);
}

#[test]
fn addresses_and_save_areas_must_fit() {
    let host = offered::x86("amd-rome");
    let wide = with(host.clone(), 0x8000_0008, 0, |entry| entry.eax = 0x3034);
    let verdict = compared(wide, host.clone());
    assert_eq!(verdict.names(), ["physical_address_bits"]);
    let blocker = &verdict.blockers[0];
    assert_eq!((blocker.guest.as_str(), blocker.destination.as_str()), ("52", "48"));
    assert_eq!(blocker.place, "CPUID.80000008:EAX[7:0]");
    let narrow = with(host.clone(), 0x8000_0008, 0, |entry| entry.eax = 0x3020);
    assert!(compared(narrow, host.clone()).is_accepted());
    // A kernel that tells how wide nested addresses are, and one that does not.
    let told = |bits: u32| with(host.clone(), 0x8000_0008, 0, move |entry| entry.eax |= bits << 16);
    assert!(compared(told(48), host.clone()).is_accepted());
    assert_eq!(compared(told(48), told(40)).names(), ["guest_physical_address_bits"]);

    let large = with(host.clone(), 0xd, 0, |entry| entry.ecx = 0x988);
    assert_eq!(compared(large, host.clone()).names(), ["xsave_area_size"]);
    let moved = with(host.clone(), 0xd, 2, |entry| entry.ebx = 0x340);
    assert_eq!(
        compared(moved.clone(), host.clone()).names(),
        ["xsave_component_offset_2"]
    );
    assert_eq!(compared(host.clone(), moved).names(), ["xsave_component_offset_2"]);
    let line = with(host.clone(), 1, 0, |entry| entry.ebx = entry.ebx & !0xff00 | 0x1000);
    assert_eq!(compared(line, host).names(), ["clflush_size"]);
}

#[test]
fn what_belongs_to_a_vcpu_or_the_hosts_shape_does_not_matter() {
    let host = offered::x86("amd-milan");
    let mut other = with(host.clone(), 1, 0, |entry| {
        entry.ebx |= 0xff00_0000 | 8 << 16;
        entry.edx |= 1 << 28;
        entry.ecx |= 1 << 31 | 1 << 27;
    });
    for leaf in [
        2,
        3,
        4,
        0xb,
        0x16,
        0x1f,
        0x8000_0002,
        0x8000_0006,
        0x8000_001d,
        0x8000_001e,
        0x8000_0026,
    ] {
        other = with(other, leaf, 0, |entry| {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (!0, !0, !0, !0);
        });
    }
    other.msrs.insert(0x8b, 0x0a00_1234);
    let verdict = compared(other, host);
    assert!(verdict.is_accepted(), "{verdict}");
}

#[test]
fn a_tsc_is_scaled_or_the_same() {
    let cpu = |khz| X86 {
        tsc_khz: khz,
        ..offered::x86("amd-milan")
    };
    let go = |from, to, tsc_scaling| {
        let processor = Processor::X86(cpu(to));
        let host = Host {
            processor,
            kernel: "6.12.0".to_owned(),
            tsc_scaling,
            writable: [].into(),
        };
        let host = HostProcessor::new(host).expect("a host");
        let verdict = compare(&guest(Processor::X86(cpu(from))), &host);
        verdict
            .names()
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    let none = Vec::<String>::new();
    assert_eq!(go(Some(2_445_000), Some(2_445_000), false), none);
    assert_eq!(go(Some(2_445_000), Some(2_445_400), false), none, "within 250 ppm");
    assert_eq!(go(Some(2_445_000), Some(2_446_000), false), ["tsc_khz"]);
    assert_eq!(go(Some(2_445_000), None, false), ["tsc_khz"], "nobody knows");
    assert_eq!(go(Some(2_445_000), Some(3_000_000), true), none, "scaled");
    assert_eq!(go(None, Some(3_000_000), false), none, "the guest takes what it gets");
    assert_eq!(go(Some(u32::MAX), Some(0), false), ["tsc_khz"]);
}

#[test]
fn weaknesses_must_be_known_and_safety_must_be_there() {
    let host = |capabilities| {
        let mut cpu = offered::x86("intel-icelake-sp");
        cpu.msrs.insert(0x10a, capabilities);
        cpu
    };
    let (rdcl_no, rrsba) = (1, 1 << 19);
    assert_eq!(compared(host(rdcl_no), host(0)).names(), ["rdcl_no"]);
    assert!(compared(host(0), host(rdcl_no)).is_accepted());
    let verdict = compared(host(rdcl_no), host(rdcl_no | rrsba));
    assert_eq!(verdict.names(), ["rrsba"]);
    assert!(verdict.blockers[0].remedy.contains("does not know"));
    assert!(compared(host(rdcl_no | rrsba), host(rdcl_no)).is_accepted());
}

#[test]
fn vmx_counts_for_guests_that_have_it() {
    let vmx = |on: bool, demands: u64, can: u64| {
        let mut cpu = with(offered::x86("intel-icelake-sp"), 1, 0, |entry| {
            entry.ecx = entry.ecx & !(1 << 5) | u32::from(on) << 5;
        });
        if on {
            cpu.msrs.insert(0x48b, can << 32 | demands);
        }
        cpu
    };
    let names = |from, to| compared(from, to).names().join(" ");
    assert_eq!(names(vmx(true, 0, 0b10), vmx(true, 0, 0b11)), "");
    assert_eq!(
        names(vmx(true, 0, 0b11), vmx(true, 0, 0b10)),
        "vmx_secondary_virt_apic_accesses"
    );
    assert_eq!(
        names(vmx(true, 0, 0b11), vmx(true, 0b1, 0b11)),
        "vmx_secondary_must_be_1"
    );
    assert_eq!(names(vmx(false, 0, 0), vmx(true, 0b1, 0b11)), "");
    assert!(names(vmx(true, 0, 0b11), vmx(false, 0, 0)).starts_with("vmx vmx_secondary"));
}

#[test]
fn pools_of_one_vendor_have_a_baseline() {
    let hosts = |names: &[&str]| {
        names
            .iter()
            .map(|name| host(offered::processor(name)))
            .collect::<Vec<_>>()
    };
    let pool = hosts(&["amd-rome", "amd-milan", "amd-turin"]);
    let common = baseline(&pool).expect("a baseline");
    let Processor::X86(cpu) = common.processor() else {
        panic!("no x86");
    };
    let listing = common.processor().listing();
    let has = |name: &str| listing.features.iter().any(|feature| feature == name);
    assert!(has("avx2") && has("clwb") && !has("vaes") && !has("avx512f") && !has("xcr0_pkru"));
    // The oldest model of them.
    assert_eq!((cpu.signature().family, cpu.signature().model), (0x17, 0x31));
    assert!(pool.iter().all(|host| compare(&common, host).is_accepted()));
    assert_eq!(cpu.vendor_name(), "AuthenticAMD");

    let error = baseline(&hosts(&["amd-rome", "hygon-0910f00"])).expect_err("two vendors");
    assert!(error.to_string().contains("vendor"), "{error}");
    assert!(baseline(&[]).is_err());
    let [one] = &hosts(&["intel-icelake-sp"])[..] else {
        panic!("one host");
    };
    let alone = baseline(std::slice::from_ref(one)).expect("a baseline");
    assert_eq!(alone.processor(), one.processor());
    let odd = with(offered::x86("amd-rome"), 1, 0, |entry| entry.ebx = 0x1000);
    let error = baseline(&[host(Processor::X86(odd)), host(offered::processor("amd-rome"))]).expect_err("two sizes");
    assert!(error.to_string().contains("clflush_size"), "{error}");
}

#[test]
fn signatures_are_read_as_the_manuals_say() {
    for (name, family, model, stepping) in [
        ("amd-turin", 0x1a, 0x02, 1),
        ("amd-milan", 0x19, 0x01, 1),
        ("hygon-0910f00", 0x18, 0x10, 0),
        ("intel-skylake-sp", 6, 0x55, 4),
        ("zhaoxin-kx7000", 7, 0x6b, 1),
    ] {
        let signature = x86(name).signature();
        let expected = (family, model, stepping);
        assert_eq!(
            (signature.family, signature.model, signature.stepping),
            expected,
            "{name}"
        );
    }
}
