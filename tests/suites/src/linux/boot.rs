//! Stock kernels reach user space.

use anyhow::{Context as _, Result, ensure};
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

/// More memory than fits below the hole, which begins at 3 GiB: the kernel has to find both parts.
/// Pages that are not touched cost the host nothing, but it has to have that many.
fn around_the_hole(context: &Context) -> Result<Outcome> {
    const MIB: u64 = 3584;
    let host = triarch_guest_init::setup::machine().memory_mib;
    if host < MIB {
        return Ok(Outcome::Skipped(format!(
            "the host has {host} MiB, the guest needs {MIB}"
        )));
    }
    let line = banner(LinuxBuilder::new(context, Kernel::V6_1)?.vm(|vm| vm.memory_mib(MIB)))?;
    let mib = mib(&line)?;
    ensure!((3350..=MIB).contains(&mib), "{mib} of {MIB} MiB: {line}");
    Ok(Outcome::Passed)
}

fn sees_the_vendor(context: &Context) -> Result<Outcome> {
    let vendor = triarch_guest_init::setup::machine().vendor;
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
