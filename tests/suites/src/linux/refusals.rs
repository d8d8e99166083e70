//! Kernels that cannot boot on this host, and guests it cannot have: one sentence that says why and what to do.

use anyhow::{Context as _, Result};
use std::fs;
use triarch_harness::images::Kernel;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::VmBuilder;

use crate::bad_input::{failed, refused};

pub const TESTS: &[Test] = &[
    Test::nested("refusals::kernels_that_are_cut_off", cut_off),
    Test::nested("refusals::kernels_of_another_kind", of_another_kind),
    Test::nested("refusals::more_than_there_is_room_for", too_much),
];

fn builder(context: &Context) -> Result<VmBuilder> {
    let kernel = context.images.path(&Kernel::V6_1.elf())?;
    Ok(VmBuilder::new(context)?
        .flag("--kernel", kernel)
        .flag("--serial", "tty")
        .flag("--console", "off")
        .memory_mib(256))
}

fn on_arm() -> bool {
    std::env::consts::ARCH == "aarch64"
}

fn each_kernel(context: &Context, cases: &[(&[u8], &[&str])]) -> Result<Outcome> {
    for (content, words) in cases {
        let vm = builder(context)?;
        let kernel = vm.dir().join("kernel");
        fs::write(&kernel, content)?;
        failed(context, vm.set("--kernel", &kernel), words).with_context(|| format!("{words:?}"))?;
    }
    Ok(Outcome::Passed)
}

/// What a download that stopped leaves behind.
fn cut_off(context: &Context) -> Result<Outcome> {
    let plain = fs::read(context.images.path(&Kernel::V6_1.elf())?)?;
    let packed = fs::read(context.images.path(&Kernel::V6_1.bzimage())?)?;
    let half = |file: &[u8]| file[..file.len() / 2].to_vec();
    let packed_words: &[&str] = if on_arm() {
        &["damaged", "compressed data end too early", "copy it again"]
    } else {
        &["truncated", "copy it again"]
    };
    let words: &[&str] = &["truncated", "copy it again"];
    each_kernel(context, &[(&half(&plain), words), (&half(&packed), packed_words)])?;
    if on_arm() {
        // The last byte is the signature's; an ELF file ends with what nobody loads.
        each_kernel(context, &[(&plain[..plain.len() - 1], words)])?;
    }
    Ok(Outcome::Passed)
}

fn of_another_kind(context: &Context) -> Result<Outcome> {
    let with = |parts: &[(usize, &[u8])]| {
        let mut file = vec![0; 8192];
        for (at, bytes) in parts {
            file[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    };
    let bzimage = with(&[(0, b"MZ"), (0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS")]);
    let x86_elf = with(&[(0, b"\x7fELF\x02\x01\x01"), (16, &[2, 0, 62, 0])]);
    let image = with(&[(0, b"MZ"), (16, &[0, 0x20]), (56, b"ARM\x64")]);
    let arm_elf = with(&[(0, b"\x7fELF\x02\x01\x01"), (16, &[2, 0, 183, 0])]);
    let zboot = with(&[(0, b"MZ"), (4, b"zimg"), (8, &[0, 1]), (12, &[0, 1]), (24, b"zstd")]);
    let foreign: [(&[u8], &[&str]); 3] = if on_arm() {
        let words: &[&str] = &["but this guest is arm64", "give a kernel built for arm64"];
        [
            (&bzimage, words),
            (&x86_elf, words),
            (&zboot, &["compressed by zstd", "give the plain Image"]),
        ]
    } else {
        let words: &[&str] = &["but this guest is x86-64", "give a kernel built for x86-64"];
        [
            (&image, words),
            (&arm_elf, words),
            (&zboot, &["compressed EFI kernel (zboot)", "x86-64"]),
        ]
    };
    each_kernel(context, &foreign)?;
    let wanted = if on_arm() {
        "give an arm64 Image"
    } else {
        "give an x86-64 bzImage"
    };
    each_kernel(
        context,
        &[
            (b"\xfd7zXZ\0 ...", &["xz-compressed", wanted]),
            (b"\x28\xb5\x2f\xfd ...", &["zstd-compressed", wanted]),
            (b"BZh91AY&SY ...", &["bzip2-compressed", wanted]),
            (b"", &["is empty", wanted]),
        ],
    )
}

fn too_much(context: &Context) -> Result<Outcome> {
    for (flag, value, words) in [
        ("--cpus", "boot=1,max=255", ["255", "254"]),
        ("--cpus", "boot=100000", ["100000", "254"]),
    ] {
        let vm = builder(context)?.set(flag, value);
        refused(context, vm, &words).with_context(|| format!("{flag} {value}"))?;
    }
    let vm = builder(context)?.set("--memory", "size=1048576G");
    failed(context, vm, &["the host has", "lower"])?;
    Ok(Outcome::Passed)
}
