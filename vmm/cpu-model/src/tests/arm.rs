//! Verdicts on recorded CPUs of ARM's.

use std::collections::BTreeMap;

use super::recorded::{INIT, all_arm, arm, guest, host, host_with};
use crate::features::Register;
use crate::{Arm64, Processor, Verdict, baseline, compare};

const A76: &str = "qemu-cortex-a76-linux-6.1";
const N1: &str = "qemu-neoverse-n1-linux-6.1";
const V1: &str = "qemu-neoverse-v1-linux-6.1";

fn number(op1: u32, crm: u32, op2: u32) -> u32 {
    match Register::system(3, op1, 0, crm, op2) {
        Register::Kvm(number) => number,
        other => panic!("{other}"),
    }
}

/// What KVM lets be set since 6.x kernels of the 7 series: nearly all of it, the model as well.
fn writable() -> BTreeMap<u32, u64> {
    let ids = (1..8).flat_map(|crm| (0..8).map(move |op2| (number(0, crm, op2), u64::MAX)));
    let others = [(0, 0, 0), (0, 0, 6), (1, 0, 7), (1, 0, 1), (3, 0, 1)];
    ids.chain(others.map(|(op1, crm, op2)| (number(op1, crm, op2), u64::MAX)))
        .collect()
}

fn go(from: Arm64, to: Arm64, writable: BTreeMap<u32, u64>) -> Verdict {
    compare(
        &guest(Processor::Arm64(from)),
        &host_with(Processor::Arm64(to), writable),
    )
}

/// A guest of a host without SVE and pointer authentication, or the host itself.
fn without_options(mut cpu: Arm64) -> Arm64 {
    cpu.init = INIT;
    cpu.vector_lengths.clear();
    let clear = |cpu: &mut Arm64, number: u32, mask: u64| {
        if let Some(value) = cpu.registers.get_mut(&number) {
            *value &= !mask;
        }
    };
    clear(&mut cpu, number(0, 4, 0), 0xf << 32);
    clear(&mut cpu, number(0, 4, 4), u64::MAX);
    clear(&mut cpu, number(0, 6, 1), 0xff00_0ff0);
    cpu
}

#[test]
fn neoverse_n1_and_cortex_a76_differ_in_ssbs_and_parange() {
    // Where KVM lets everything be set, guests of the lesser CPU can go.
    let verdict = go(arm(N1), arm(A76), writable());
    assert_eq!(verdict.names(), ["ID_AA64PFR1_EL1.SSBS", "ID_AA64MMFR0_EL1.PARange"]);
    let blocker = &verdict.blockers[0];
    assert_eq!((blocker.guest.as_str(), blocker.destination.as_str()), ("2", "1"));
    assert_eq!(blocker.place, "ID_AA64PFR1_EL1[7:4]");
    assert!(go(arm(A76), arm(N1), writable()).is_accepted());
    // Where it does not, no guest can, and the kernel is named.
    let verdict = go(arm(A76), arm(N1), BTreeMap::new());
    assert_eq!(
        verdict.names(),
        ["MIDR_EL1", "ID_AA64PFR1_EL1.SSBS", "ID_AA64MMFR0_EL1.PARange"]
    );
    assert!(
        verdict
            .blockers
            .iter()
            .all(|blocker| blocker.remedy.contains("kernel (6.1.0)"))
    );
    // All but the model.
    let mut all = writable();
    all.remove(&number(0, 0, 0));
    assert_eq!(go(arm(A76), arm(N1), all).names(), ["MIDR_EL1"]);
    // All but one field.
    let mut all = writable();
    all.insert(number(0, 4, 1), !0xf0);
    assert_eq!(go(arm(A76), arm(N1), all).names(), ["ID_AA64PFR1_EL1.SSBS"]);
}

#[test]
fn the_same_model_without_sve_is_another_cpu() {
    let (full, less) = (arm(V1), without_options(arm(V1)));
    let verdict = go(full.clone(), less.clone(), BTreeMap::new());
    let names = verdict.names();
    for name in [
        "sve_vector_lengths",
        "KVM_ARM_VCPU_SVE",
        "KVM_ARM_VCPU_PTRAUTH_ADDRESS",
        "ID_AA64PFR0_EL1.SVE",
        "ID_AA64ISAR1_EL1.API",
        "ID_AA64ZFR0_EL1.BF16",
    ] {
        assert!(names.contains(&name), "{name}: {verdict}");
    }
    assert!(!names.contains(&"MIDR_EL1"));
    // A guest without them is made without them, also on a kernel that lets nothing be set.
    let verdict = go(less, full, BTreeMap::new());
    assert!(verdict.is_accepted(), "{verdict}");
}

#[test]
fn vectors_are_all_or_the_shortest() {
    let with = |lengths: &[u16]| Arm64 {
        vector_lengths: lengths.to_vec(),
        ..arm(V1)
    };
    let names = |from: &[u16], to: &[u16]| go(with(from), with(to), BTreeMap::new()).names().join(" ");
    assert_eq!(names(&[128, 256], &[128, 256, 512]), "");
    assert_eq!(names(&[128, 512], &[128, 256, 512]), "sve_vector_lengths");
    assert_eq!(names(&[128, 256, 512], &[128, 256]), "sve_vector_lengths");
}

#[test]
fn counters_and_addresses_cannot_be_changed() {
    let fast = Arm64 {
        counter_hz: 1_000_000_000,
        ..arm(N1)
    };
    let verdict = go(arm(N1), fast.clone(), writable());
    assert_eq!(verdict.names(), ["CNTFRQ_EL0"]);
    assert!(
        verdict.blockers[0].to_string().contains("62500000 Hz"),
        "{}",
        verdict.blockers[0]
    );
    let wide = Arm64 {
        address_bits: 48,
        ..arm(N1)
    };
    assert_eq!(go(wide.clone(), arm(N1), writable()).names(), ["ipa_bits"]);
    assert!(go(arm(N1), wide, writable()).is_accepted());
    let error = baseline(&[host(Processor::Arm64(arm(N1))), host(Processor::Arm64(fast))]).expect_err("two clocks");
    assert!(error.to_string().contains("CNTFRQ_EL0"), "{error}");
}

#[test]
fn fields_nobody_knows_are_compared_and_must_be_settable() {
    let pfr3 = number(0, 4, 3);
    let mut newer = arm(N1);
    newer.registers.insert(pfr3, 0x20);
    assert_eq!(go(newer.clone(), arm(N1), writable()).names(), ["S3_0_C0_C4_3[7:4]"]);
    assert!(go(arm(N1), newer.clone(), writable()).is_accepted());
    assert_eq!(go(arm(N1), newer, BTreeMap::new()).names(), ["S3_0_C0_C4_3[7:4]"]);
}

#[test]
fn firmware_calls_can_always_be_taken_away() {
    let with = |psci: u64, calls: u64| {
        let mut cpu = arm(N1);
        cpu.registers.insert(0x14_0000, psci);
        cpu.registers.insert(0x16_0002, calls);
        cpu
    };
    assert!(go(with(0x1_0001, 1), with(0x1_0003, 3), BTreeMap::new()).is_accepted());
    let verdict = go(with(0x1_0003, 3), with(0x1_0001, 1), BTreeMap::new());
    assert_eq!(
        verdict.names(),
        ["KVM_REG_ARM_PSCI_VERSION", "KVM_REG_ARM_VENDOR_HYP_BMAP"]
    );
}

#[test]
fn every_cpu_takes_its_own_guests_and_no_pair_is_alike() {
    for (from, processor) in all_arm() {
        for (to, other) in all_arm() {
            let verdict = compare(&guest(processor.clone()), &host(other));
            assert_eq!(verdict.is_accepted(), from == to, "{from} -> {to}: {verdict}");
        }
        assert!(
            processor.listing().unnamed.is_empty(),
            "{from}: {:?}",
            processor.listing().unnamed
        );
    }
}

#[test]
fn pools_have_a_baseline_where_kernels_let_it_be_set() {
    let hosts = |writable: BTreeMap<u32, u64>| {
        [A76, N1, V1].map(|name| host_with(Processor::Arm64(arm(name)), writable.clone()))
    };
    let pool = hosts(writable());
    let common = baseline(&pool).expect("a baseline");
    let listing = common.processor().listing();
    assert_eq!(listing.values.get("ID_AA64PFR1_EL1.SSBS"), Some(&1));
    assert_eq!(listing.values.get("ID_AA64MMFR0_EL1.PARange"), Some(&2));
    assert!(!listing.values.contains_key("ID_AA64PFR0_EL1.SVE"));
    assert!(
        listing
            .features
            .iter()
            .all(|name| !name.contains("SVE") && !name.starts_with("sve"))
    );
    assert!(pool.iter().all(|host| compare(&common, host).is_accepted()));
    let error = baseline(&hosts(BTreeMap::new())).expect_err("nothing can be set");
    assert!(error.to_string().contains("MIDR_EL1"), "{error}");
}

#[test]
fn architectures_are_told_apart() {
    let intel = super::offered::processor("intel-haswell-ep");
    let verdict = compare(&guest(Processor::Arm64(arm(N1))), &host(intel));
    assert_eq!(verdict.names(), ["architecture"]);
}
