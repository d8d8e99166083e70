//! The virtio console and the serial line.

use anyhow::{Result, ensure};
use std::fs;
use triarch_harness::disk::pattern;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{BANNER, BOOT, Channel, LinuxBuilder};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("console::carries_data_both_ways", both_ways),
    Test::nested("console::is_the_kernels_console", kernels_console),
    Test::nested("console::serial_to_a_file", serial_to_a_file),
];

/// The agent itself speaks over hvc0 here.
fn both_ways(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?
        .channel(Channel::Console)
        .boot()?;
    let content = pattern(1, 300_000);
    guest.agent().put("/tmp/file", 0o600, &content)?;
    ensure!(guest.agent().get("/tmp/file")? == content, "the file came back changed");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn kernels_console(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?;
    let file = context.dir.join("console.log");
    let mut value = std::ffi::OsString::from("file=");
    value.push(&file);
    let guest = guest.cmdline("console=hvc0").run("echo written to the console");
    let vm = guest.console(value).start()?;
    vm.expect_end_within(0, BOOT)?;
    let text = fs::read_to_string(&file)?;
    ensure!(
        text.contains(BANNER) && text.contains("written to the console"),
        "{text}"
    );
    Ok(Outcome::Passed)
}

fn serial_to_a_file(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.run("true");
    let file = context.dir.join("serial.log");
    let mut value = std::ffi::OsString::from("file=");
    value.push(&file);
    let vm = guest.vm(|vm| vm.set("--serial", value)).start()?;
    vm.expect_end_within(0, BOOT)?;
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains(BANNER) && text.contains("reboot: Power down"), "{text}");
    Ok(Outcome::Passed)
}
