//! What the guest boots.

use super::{STRANGER, WITHOUT_RIGHTS, builder, each_fails, failed, give_away, payload_tests, surrounded, text};
use crate::payload::data::pattern;
use crate::payload::guest::is_arm;
use anyhow::{Context as _, Result};
use std::fs;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("bad_input":
    kernels,
    kernels_of_others,
    initramfs,
    command_line,
);

/// The header of a Linux Image for arm64 (Documentation/arch/arm64/booting.rst), in a file of 4096 bytes.
fn arm64_image(as_efi_program: bool) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[16..24].copy_from_slice(&4096u64.to_le_bytes());
    image[56..60].copy_from_slice(b"ARM\x64");
    if as_efi_program {
        image[..2].copy_from_slice(b"MZ");
    }
    image
}

/// What is no kernel for guests here, and what is said about it.
fn no_kernels(context: &Context) -> Result<Vec<(Vec<u8>, [&'static str; 2])>> {
    let noise = pattern(1, 0, 4096);
    if is_arm() {
        let mut foreign = vec![0; 4096];
        foreign[..6].copy_from_slice(b"\x7fELF\x02\x01");
        // e_machine: EM_X86_64.
        foreign[18] = 62;
        return Ok(vec![
            (Vec::new(), ["is empty", "arm64 Image"]),
            (noise, ["not like a kernel", "arm64 Image"]),
            (foreign, ["x86-64", "built for arm64"]),
        ]);
    }
    let image = fs::read(context.images.path("triarch-payload")?)?;
    let mut foreign = image.clone();
    // e_machine of an ELF file: EM_AARCH64.
    foreign[18..20].copy_from_slice(&183u16.to_le_bytes());
    let gzip = [&[0x1f, 0x8b, 8][..], &[0; 4096]].concat();
    Ok(vec![
        (Vec::new(), ["is empty", "bzImage"]),
        (image[..20].to_vec(), ["truncated", "it has 20"]),
        (image[..3000].to_vec(), ["truncated", "it has 3000"]),
        (noise, ["not like a kernel", "bzImage"]),
        (gzip, ["gzip", "bzImage"]),
        (foreign, ["arm64", "x86-64"]),
        (arm64_image(false), ["arm64 Linux Image", "x86-64"]),
        (arm64_image(true), ["arm64 Linux Image", "x86-64"]),
    ])
}

fn kernels(context: &Context) -> Result<Outcome> {
    for (content, words) in no_kernels(context)? {
        let vm = builder(context)?;
        let kernel = vm.dir().join("kernel");
        fs::write(&kernel, content)?;
        failed(context, vm.set("--kernel", &kernel), &words).with_context(|| format!("{words:?}"))?;
    }
    let dir = text(&context.dir)?;
    let missing = format!("{dir}/missing");
    each_fails(
        context,
        "--kernel",
        &[
            (&missing, &[&missing, "does not exist"]),
            (dir, &[dir, "is a directory"]),
            ("/dev/zero", &["/dev/zero", "not a regular file"]),
        ],
    )
}

fn kernels_of_others(context: &Context) -> Result<Outcome> {
    let kernel = context.dir.join("kernel");
    fs::copy(context.images.path("triarch-payload")?, &kernel)?;
    if let Some(why) = give_away(&kernel) {
        return Ok(Outcome::Skipped(why));
    }
    let path = text(&kernel)?;
    match surrounded(context, "without-rights", WITHOUT_RIGHTS)? {
        Err(why) => Ok(Outcome::Skipped(why)),
        Ok(context) => each_fails(
            &context,
            "--kernel",
            &[(path, &["no permission", path, "owner or mode"])],
        )
        .with_context(|| format!("a kernel that belongs to user {STRANGER}")),
    }
}

fn initramfs(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let large = DiskImage::empty(vm.dir().join("large"), 100 << 20)?;
    failed(
        context,
        vm.flag("--initramfs", large.path()),
        &["104857600 bytes", "more memory"],
    )?;
    let empty = DiskImage::empty(context.dir.join("empty"), 0)?;
    let dir = text(&context.dir)?;
    let missing = format!("{dir}/missing");
    each_fails(
        context,
        "--initramfs",
        &[
            (&missing, &[&missing, "does not exist"]),
            (dir, &[dir, "is a directory"]),
            (text(empty.path())?, &["is empty", "leave the option out"]),
        ],
    )
}

fn command_line(context: &Context) -> Result<Outcome> {
    let long = "a".repeat(70_000);
    each_fails(context, "--cmdline", &[(&long, &["70000 bytes", "shorten"])])
}
