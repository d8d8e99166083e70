//! Descriptions go from host to host and from release to release, and come from strangers.

use super::offered;
use super::recorded::{arm, guest, host_with};
use crate::{Arm64, CpuidEntry, GuestProcessor, HostProcessor, Processor, Verdict, X86, compare};

fn read<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[test]
fn descriptions_come_back_as_they_were() {
    let mut cpu = offered::x86("amd-milan");
    cpu.msrs.insert(0xc001_1029, u64::MAX);
    cpu.tsc_khz = Some(2_445_000);
    let arm = Processor::Arm64(arm("qemu-neoverse-v1-linux-6.1"));
    for processor in [Processor::X86(cpu), arm] {
        let guest = guest(processor.clone());
        let text = serde_json::to_string(&guest).expect("text");
        assert!(text.starts_with(r#"{"version":1,"cpu":{"#), "{text}");
        assert_eq!(read::<GuestProcessor>(&text).expect("a guest"), guest);
        let host = host_with(processor, [(0x0013_c020, u64::MAX)].into());
        let text = serde_json::to_string(&host).expect("text");
        let back = read::<HostProcessor>(&text).expect("a host");
        assert_eq!(back, host);
        assert!(compare(&guest, &back).is_accepted());
    }
    let verdict = compare(
        &guest(offered::processor("amd-turin")),
        &host_with(offered::processor("amd-genoa"), [].into()),
    );
    let text = serde_json::to_string(&verdict).expect("text");
    assert_eq!(read::<Verdict>(&text).expect("a verdict"), verdict);
}

#[test]
fn another_version_is_refused() {
    let text = serde_json::to_string(&guest(offered::processor("amd-milan"))).expect("text");
    let newer = text.replacen(r#""version":1"#, r#""version":2"#, 1);
    let error = read::<GuestProcessor>(&newer).expect_err("refused");
    assert!(error.contains("version 2"), "{error}");
}

#[test]
fn too_much_is_refused_before_it_is_held() {
    let entry = r#"{"leaf":N,"subleaf":0,"indexed":false,"eax":0,"ebx":0,"ecx":0,"edx":0}"#;
    let cpuid = |count: usize| {
        (0..count)
            .map(|n| entry.replace('N', &n.to_string()))
            .collect::<Vec<_>>()
            .join(",")
    };
    let x86 = |count: usize, msrs: usize| {
        let msrs = (0..msrs).map(|n| format!("\"{n}\":1")).collect::<Vec<_>>().join(",");
        let cpuid = cpuid(count);
        format!(r#"{{"version":1,"cpu":{{"x86_64":{{"cpuid":[{cpuid}],"msrs":{{{msrs}}},"tsc_khz":null}}}}}}"#)
    };
    assert!(read::<GuestProcessor>(&x86(256, 256)).is_ok());
    for (text, what) in [
        (x86(257, 0), "more than 256 entries"),
        (x86(1, 257), "more than 256 entries"),
        (x86(0, 0), "leaf 0"),
    ] {
        let error = read::<GuestProcessor>(&text).expect_err("refused");
        assert!(error.contains(what), "{error}");
    }
    let many = X86 {
        cpuid: (0..300)
            .map(|leaf| CpuidEntry {
                leaf,
                ..CpuidEntry::default()
            })
            .collect(),
        ..X86::default()
    };
    let error = GuestProcessor::new(Processor::X86(many)).expect_err("refused");
    assert!(error.to_string().contains("300 entries of CPUID"), "{error}");
}

#[test]
fn vectors_that_do_not_exist_are_refused() {
    let with = |lengths: &[u16]| {
        GuestProcessor::new(Processor::Arm64(Arm64 {
            vector_lengths: lengths.to_vec(),
            ..arm("qemu-neoverse-v1-linux-6.1")
        }))
    };
    assert!(with(&[]).is_ok() && with(&[128, 256, 2048]).is_ok());
    for lengths in [&[100_u16][..], &[256, 128], &[128, 128], &[0], &[2176]] {
        assert!(with(lengths).is_err(), "{lengths:?}");
    }
}

/// However many reasons there are, the list has an end.
#[test]
fn reasons_have_an_end() {
    let zero = CpuidEntry {
        ebx: 1,
        ..CpuidEntry::default()
    };
    let full = (0x100..0x180).map(|leaf| CpuidEntry {
        leaf,
        eax: !0,
        ebx: !0,
        ecx: !0,
        edx: !0,
        ..CpuidEntry::default()
    });
    let hostile = X86 {
        cpuid: [zero].into_iter().chain(full).collect(),
        ..X86::default()
    };
    let plain = X86 {
        cpuid: [zero].into_iter().collect(),
        ..X86::default()
    };
    let verdict = compare(
        &guest(Processor::X86(hostile)),
        &host_with(Processor::X86(plain), [].into()),
    );
    assert_eq!((verdict.blockers.len(), verdict.omitted), (512, 128 * 128 - 512));
    assert!(verdict.to_string().ends_with("and 15872 more"), "{verdict}");
}
