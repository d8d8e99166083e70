//! Stock kernels reach user space.

use anyhow::{Context as _, Result, ensure};
use std::path::Path;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{BANNER, BOOT, LinuxBuilder};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("boot::linux_6_1_on_1_cpu", |c| boots(c, Kernel::V6_1, 1)),
    Test::nested("boot::linux_6_1_on_4_cpus", |c| boots(c, Kernel::V6_1, 4)),
    Test::nested("boot::linux_6_12_on_1_cpu", |c| boots(c, Kernel::V6_12, 1)),
    Test::nested("boot::linux_6_12_on_4_cpus", |c| boots(c, Kernel::V6_12, 4)),
    Test::nested("boot::bzimage_6_1", |c| boots_bzimage(c, Kernel::V6_1)),
    Test::nested("boot::bzimage_6_12", |c| boots_bzimage(c, Kernel::V6_12)),
    Test::nested("boot::memory_around_the_32_bit_hole", around_the_hole),
    Test::nested("boot::guest_sees_the_hosts_vendor", sees_the_vendor),
];

fn boots(context: &Context, kernel: Kernel, cpus: u32) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?.vm(|vm| vm.cpus(cpus));
    let line = banner(guest)?;
    ensure!(line.contains(&format!("kernel {kernel}.")), "another kernel: {line}");
    ensure!(line.contains(&format!(", {cpus} CPUs,")), "not {cpus} CPUs: {line}");
    let mib = mib(&line)?;
    ensure!((190..=256).contains(&mib), "{mib} of 256 MiB: {line}");
    Ok(Outcome::Passed)
}

fn boots_bzimage(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let image = context.images.path(&kernel.bzimage())?;
    let line = banner(LinuxBuilder::new(context, kernel)?.vm(|vm| vm.set("--kernel", image)))?;
    ensure!(line.contains(&format!("kernel {kernel}.")), "another kernel: {line}");
    Ok(Outcome::Passed)
}

/// More memory than fits below the hole: the kernel has to find both parts. Pages that are not
/// touched cost nothing, so the host need not have that much.
fn around_the_hole(context: &Context) -> Result<Outcome> {
    let available = std::fs::read_to_string("/proc/sys/vm/overcommit_memory")?;
    if available.trim() == "2" {
        return Ok(Outcome::Skipped("this host does not overcommit memory".into()));
    }
    let line = banner(LinuxBuilder::new(context, Kernel::V6_1)?.vm(|vm| vm.memory_mib(5120)))?;
    let mib = mib(&line)?;
    ensure!((4800..=5120).contains(&mib), "{mib} of 5120 MiB: {line}");
    Ok(Outcome::Passed)
}

fn sees_the_vendor(context: &Context) -> Result<Outcome> {
    let cpuinfo = std::fs::read_to_string(Path::new("/proc/cpuinfo"))?;
    let vendor = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("vendor_id")?.split_once(": "));
    let (_, vendor) = vendor.context("the host names no vendor")?;
    let line = banner(LinuxBuilder::new(context, Kernel::V6_1)?)?;
    ensure!(
        line.contains(&format!("vendor {vendor},")),
        "host {vendor}, guest {line}"
    );
    Ok(Outcome::Passed)
}

/// Boots a guest that powers off at once, and gives the line that it prints in user space.
fn banner(guest: LinuxBuilder) -> Result<String> {
    let vm = guest.run("true").start()?;
    vm.output().wait_for(BANNER, 0, BOOT).with_context(|| vm.last_words())?;
    let output = vm.expect_end(0)?.output;
    let line = output.lines().find(|line| line.contains(BANNER));
    Ok(line.context("the line is gone")?.to_owned())
}

/// The memory that a guest counts.
fn mib(line: &str) -> Result<u64> {
    let number = line
        .rsplit(", ")
        .next()
        .and_then(|part| part.trim().strip_suffix(" MiB"));
    Ok(number.with_context(|| format!("no memory in {line}"))?.parse()?)
}
