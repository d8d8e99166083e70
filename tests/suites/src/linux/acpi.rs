//! The machine as a kernel finds it described by ACPI.

use anyhow::{Result, ensure};
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxBuilder;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("acpi::linux_6_1_finds_the_machine", |c| finds_it(c, Kernel::V6_1)),
    Test::nested("acpi::linux_6_12_finds_the_machine", |c| finds_it(c, Kernel::V6_12)),
];

/// Devices by their hardware id, and how many of them are there and in order for a guest with two processors.
const DEVICES: [(&str, usize); 5] = [
    // PCI Express root.
    ("PNP0A08", 1),
    // Generic event device.
    ("ACPI0013", 1),
    // Processors and what holds them.
    ("ACPI0007", 2),
    ("ACPI0010", 1),
    // Power button.
    ("PNP0C0C", 1),
];

fn finds_it(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?.vm(|vm| vm.cpus(2)).boot()?;
    let found =
        guest.shell("cd /sys/bus/acpi/devices; for d in *; do echo $(cat $d/hid) $(cat $d/status || echo 15); done")?;
    for (id, count) in DEVICES {
        // Present, enabled and functioning; a device without _STA has no file and is all of that.
        let in_order = |line: &&str| {
            let (hid, status) = line.split_once(' ').unwrap_or_default();
            hid == id && status.parse().is_ok_and(|status: u32| status & 0xb == 0xb)
        };
        let there = found.lines().filter(in_order).count();
        ensure!(there == count, "{there} of {count} {id} among:\n{found}");
    }
    // The root is not only there: a driver has it, and its functions have interrupts.
    let functions = guest.shell("ls /sys/bus/pci/devices")?;
    ensure!(
        functions.contains("0000:00:00.0") && functions.lines().count() > 1,
        "PCI functions: {functions}"
    );
    guest.power_off()?;
    Ok(Outcome::Passed)
}
