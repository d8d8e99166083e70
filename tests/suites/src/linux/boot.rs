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
    Test::nested("boot::cpus_stop_and_start_again", restarts_cpus),
    Test::nested("boot::linux_6_1_without_the_cpus_to_come", |c| {
        fewer_cpus(c, Kernel::V6_1)
    }),
    Test::nested("boot::linux_6_12_without_the_cpus_to_come", |c| {
        fewer_cpus(c, Kernel::V6_12)
    }),
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

/// What a processor does after it was stopped is what it was told when it was started again.
fn restarts_cpus(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.vm(|vm| vm.cpus(3)).boot()?;
    let online = || guest.shell("cat /sys/devices/system/cpu/online");
    for _ in 0..3 {
        guest.shell("for n in 1 2; do echo 0 >/sys/devices/system/cpu/cpu$n/online; done")?;
        ensure!(online()?.trim() == "0", "CPUs go on: {}", online()?);
        guest.shell("for n in 2 1; do echo 1 >/sys/devices/system/cpu/cpu$n/online; done")?;
        ensure!(online()?.trim() == "0-2", "CPUs do not come back: {}", online()?);
        // Each of them runs something, and more than once.
        let ran = guest.shell("for n in 0 1 2; do taskset -c $n sh -c 'for i in 1 2 3; do echo $0; done' $n; done")?;
        ensure!(
            ran.split_whitespace().eq(["0", "0", "0", "1", "1", "1", "2", "2", "2"]),
            "{ran}"
        );
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// A guest that may get more processors later has those it starts with, and does not wait for the others.
fn fewer_cpus(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.set("--cpus", "boot=2,max=4"))
        .boot()?;
    let online = guest.shell("cat /sys/devices/system/cpu/online")?;
    ensure!(online.trim() == "0-1", "online: {online}");
    let log = guest.shell("dmesg")?;
    for waited in ["failed to come online", "did not come online", "not responding"] {
        ensure!(!log.contains(waited), "the guest waited for a CPU: {log}");
    }
    if can_deny() {
        ensure!(
            !log.contains("failed to boot"),
            "the guest finds fault with a CPU: {log}"
        );
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Whether the host's KVM can tell an ARM guest that a processor is not to be started, which no other guest asks: from Linux 6.4 on.
fn can_deny() -> bool {
    let release = triarch_guest_init::setup::machine().kernel;
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (6, 4) || std::env::consts::ARCH == "x86_64"
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
