//! Bad input: one clear sentence on standard error with cause and fix, exit code 1, no panic, nothing left behind.

use super::guest::builder;
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::path::Path;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::VmBuilder;

payload_tests!("refusals":
    kernels,
    initramfs,
    command_line,
    memory_sizes,
    processor_counts,
    disks,
    disk_in_use,
    interfaces,
    sockets_and_sources,
    flags,
);

/// Starts it and expects the refusal to say all of `words`.
fn refused(vm: VmBuilder, words: &[&str]) -> Result<()> {
    let ended = vm
        .start()?
        .expect_end(1)
        .with_context(|| format!("should be refused for {words:?}"))?;
    let lines: Vec<_> = ended.stderr.lines().collect();
    let [line] = lines[..] else {
        anyhow::bail!("not one sentence but: {}", ended.stderr);
    };
    ensure!(line.starts_with("triarch: "), "`{line}` does not say who speaks");
    ensure!(!line.contains("panicked"), "{line}");
    for word in words {
        ensure!(line.contains(word), "no `{word}` in `{line}`");
    }
    ensure!(ended.output.is_empty(), "on standard output: {}", ended.output);
    Ok(())
}

/// Each value of `flag` is refused with its words.
fn each(context: &Context, flag: &str, cases: &[(&str, &[&str])]) -> Result<Outcome> {
    for (value, words) in cases {
        refused(builder(context)?.set(flag, value), words).with_context(|| format!("{flag} {value}"))?;
    }
    Ok(Outcome::Passed)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the test directory's name is not UTF-8")
}

fn kernels(context: &Context) -> Result<Outcome> {
    let image = fs::read(context.images.path("triarch-payload")?)?;
    let mut foreign = image.clone();
    // e_machine of an ELF file: EM_AARCH64.
    foreign[18..20].copy_from_slice(&183u16.to_le_bytes());
    let noise = super::data::pattern(1, 0, 4096);
    for (content, words) in [
        (&[][..], ["is empty", "bzImage"]),
        (&image[..20], ["truncated", "it has 20"]),
        (&image[..3000], ["truncated", "it has 3000"]),
        (&noise, ["not like a kernel", "bzImage"]),
        (&foreign, ["arm64", "x86-64"]),
    ] {
        let vm = builder(context)?;
        let kernel = vm.dir().join("kernel");
        fs::write(&kernel, content)?;
        refused(vm.set("--kernel", &kernel), &words)?;
    }
    let dir = text(&context.dir)?;
    let missing = format!("{dir}/missing");
    each(
        context,
        "--kernel",
        &[(&missing, &["missing", "does not exist"]), (dir, &["is a directory"])],
    )
}

fn initramfs(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let large = DiskImage::empty(vm.dir().join("large"), 100 << 20)?;
    refused(
        vm.flag("--initramfs", large.path()),
        &["104857600 bytes", "more memory"],
    )?;
    let missing = format!("{}/missing", text(&context.dir)?);
    each(context, "--initramfs", &[(&missing, &["missing", "does not exist"])])
}

fn command_line(context: &Context) -> Result<Outcome> {
    let long = "a".repeat(70_000);
    each(context, "--cmdline", &[(&long, &["70000 bytes", "shorten"])])
}

fn memory_sizes(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--memory",
        &[
            ("0", &["size is 0", "MiB"]),
            ("size=12345", &["size is 12345", "MiB"]),
            ("size=1000000G", &["the host has", "lower"]),
            ("1X", &["1X", "key=value"]),
            ("size=1G,sharde=on", &["sharde", "shared"]),
        ],
    )
}

fn processor_counts(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--cpus",
        &[
            ("boot=0", &["boot is 0", "between 1 and 254"]),
            ("255", &["boot is 255", "between 1 and 254"]),
            ("boot=4,max=2", &["max is 2", "boot (4)"]),
            ("boot=3,topology=2:1:1:1", &["2:1:1:1", "max is 3"]),
            ("boot=1,topology=4", &["topology=4", "threads per core"]),
        ],
    )
}

fn disks(context: &Context) -> Result<Outcome> {
    let dir = text(&context.dir)?;
    let odd = DiskImage::empty(context.dir.join("odd"), 1000)?;
    let empty = DiskImage::empty(context.dir.join("empty"), 0)?;
    let disk = DiskImage::empty(context.dir.join("disk"), 1 << 20)?;
    let path = |path: &Path| format!("path={}", path.display());
    let good = path(disk.path());
    each(
        context,
        "--disk",
        &[
            (&format!("path={dir}/missing"), &["missing", "does not exist"]),
            (&format!("path={dir}"), &["is a directory"]),
            (&path(odd.path()), &["1000 bytes", "512"]),
            (&path(empty.path()), &["is empty", "truncate"]),
            ("readonly=on", &["no path", "path=FILE"]),
            (&format!("{good},queue_size=3"), &["queue_size is 3", "power of two"]),
            (&format!("{good},num_queues=0"), &["num_queues is 0", "between 1"]),
            (&format!("{good},serial=123456789012345678901"), &["at most 20"]),
            (&format!("{good},image_type=qcow2"), &["qcow2", "raw"]),
            (&format!("{good},speed=fast"), &["speed", "readonly"]),
        ],
    )
}

fn disk_in_use(context: &Context) -> Result<Outcome> {
    let disk = DiskImage::empty(context.dir.join("disk"), 1 << 20)?;
    let _first = super::guest::Guest::start(builder(context)?.disk(disk.path(), ""))?;
    refused(builder(context)?.disk(disk.path(), ""), &["in use", "readonly=on"])?;
    refused(builder(context)?.disk(disk.path(), "readonly=on"), &["in use"])?;
    Ok(Outcome::Passed)
}

fn interfaces(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--net",
        &[
            ("tap=a_name_that_is_too_long", &["1 to 15 characters"]),
            ("tap=lo", &["lo is not a tap", "ip tuntap add"]),
            ("num_queues=3", &["num_queues is 3", "even"]),
            ("mac=12:34", &["12:34", "six hexadecimal bytes"]),
            ("fd=99", &["_net0", "Bad file descriptor"]),
        ],
    )
}

fn sockets_and_sources(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--vsock",
        &[
            ("cid=2,socket=/nonexistent/v", &["cid is 2", "between 3"]),
            ("cid=3", &["socket=PATH"]),
            ("cid=3,socket=/nonexistent/v", &["/nonexistent/v", "No such file"]),
        ],
    )?;
    each(
        context,
        "--rng",
        &[("src=/nonexistent", &["/nonexistent", "No such file"])],
    )?;
    each(
        context,
        "--console",
        &[("socket=/nonexistent/c", &["--console", "/nonexistent/c"])],
    )?;
    each(
        context,
        "--serial",
        &[
            ("socket=/nonexistent/s", &["--serial", "/nonexistent/s"]),
            ("bogus", &["bogus", "file=PATH"]),
        ],
    )
}

fn flags(context: &Context) -> Result<Outcome> {
    refused(builder(context)?.flag("--bogus", "1"), &["--bogus", "--help"])?;
    refused(VmBuilder::new(context)?, &["nothing to do", "--kernel"])?;
    Ok(Outcome::Passed)
}
