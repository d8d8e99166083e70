//! The ends of a guest reach the right end of the VMM.

use anyhow::{Result, ensure};
use std::time::Duration;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{BANNER, BOOT, LinuxBuilder};
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::Vm;

pub const TESTS: &[Test] = &[
    Test::nested("power::off_ends_with_0", off),
    Test::nested("power::ten_reboots", ten_reboots).within(Duration::from_secs(600)),
    Test::nested("power::a_panic_resets", panics),
    Test::nested("power::button", button),
];

fn off(context: &Context) -> Result<Outcome> {
    let vm = LinuxBuilder::new(context, Kernel::V6_1)?.run("exit 7").start()?;
    let ended = boot_and_wait(vm)?;
    ensure!(ended.contains("run finished, exit status: 7"), "{ended}");
    Ok(Outcome::Passed)
}

fn boot_and_wait(vm: Vm) -> Result<String> {
    vm.output().wait_for(BANNER, 0, BOOT)?;
    Ok(vm.expect_end(0)?.output)
}

fn ten_reboots(context: &Context) -> Result<Outcome> {
    let vm = LinuxBuilder::new(context, Kernel::V6_1)?.run("reboot -f").start()?;
    let mut from = 0;
    for _ in 0..=10 {
        from = vm.output().wait_for(BANNER, from, BOOT)?.end;
    }
    Ok(Outcome::Passed)
}

/// The kernel panics and, as told on its command line, resets at once.
fn panics(context: &Context) -> Result<Outcome> {
    let vm = LinuxBuilder::new(context, Kernel::V6_1)?
        .run("echo c > /proc/sysrq-trigger")
        .start()?;
    let first = vm.output().wait_for(BANNER, 0, BOOT)?.end;
    let panic = vm.output().wait_for("Kernel panic - not syncing", first, BOOT)?.end;
    vm.output().wait_for(BANNER, panic, BOOT)?;
    Ok(Outcome::Passed)
}

fn button(context: &Context) -> Result<Outcome> {
    let vm = LinuxBuilder::new(context, Kernel::V6_1)?
        .vm(|vm| vm.api())
        .run("sleep 600")
        .start()?;
    vm.output().wait_for(BANNER, 0, BOOT)?;
    vm.press_power_button()?;
    let output = vm.expect_end(0)?.output;
    ensure!(output.contains("power button pressed"), "{output}");
    Ok(Outcome::Passed)
}
