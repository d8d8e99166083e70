//! ARM guests that are told of their machine by a device tree instead of ACPI.

use anyhow::{Result, ensure};
use std::time::{SystemTime, UNIX_EPOCH};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::VmBuilder;

use crate::bad_input::failed;

pub const TESTS: &[Test] = &[
    Test::nested("device_tree::linux_6_1_on_4_cpus", |c| boots(c, Kernel::V6_1)),
    Test::nested("device_tree::linux_6_12_on_4_cpus", |c| boots(c, Kernel::V6_12)),
];

/// Seconds that may pass between two looks at a clock.
const SLOW: u64 = 60;

fn boots(context: &Context, kernel: Kernel) -> Result<Outcome> {
    if std::env::consts::ARCH != "aarch64" {
        let vm = VmBuilder::new(context)?
            .flag("--kernel", context.images.path(&kernel.elf())?)
            .flag("--serial", "tty")
            .flag("--console", "off")
            .flag("--platform", "dtb=on");
        failed(context, vm, &["dtb=on is for ARM guests", "leave it out"])?;
        return Ok(Outcome::Passed);
    }
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.api().set("--cpus", "boot=4,max=6").flag("--platform", "dtb=on"))
        .boot()?;
    let told = guest.shell("cat /proc/device-tree/model; ls -d /sys/firmware/acpi/tables || true")?;
    ensure!(told.contains("Triarch"), "model: {told}");
    ensure!(!told.contains("acpi"), "there is ACPI, too: {told}");
    let online = guest.shell("cat /sys/devices/system/cpu/online /sys/devices/system/cpu/possible")?;
    ensure!(
        online.split_whitespace().eq(["0-3", "0-3"]),
        "CPUs online, possible: {online}"
    );
    let host = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let time: u64 = guest.shell("cat /sys/class/rtc/rtc0/since_epoch")?.trim().parse()?;
    ensure!(host.abs_diff(time) <= SLOW, "the clock says {time}, the host's {host}");
    presses_the_key(&guest)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Debian's kernels for clouds have no driver for keys, but one for the pins they are at: the pin goes up, and down when it was seen.
fn presses_the_key(guest: &LinuxVm) -> Result<()> {
    let pin = guest.shell(
        "cd /sys/class/gpio; for c in gpiochip*; do grep -q 9040000.pl061 $c/label && n=$(($(cat $c/base) + 3)); done
         echo $n >export; echo both >gpio$n/edge; echo /sys/class/gpio/gpio$n",
    )?;
    let value = format!("cat {}/value", pin.trim());
    let interrupts = || guest.shell("awk '/pl061/ && /gpio/ { print $2 + $3 + $4 + $5 }' /proc/interrupts");
    for round in 1..=2 {
        guest.vm().press_power_button()?;
        // The key waits for somebody to look.
        let seen = guest.shell(&format!("{value}; {value}; {value}"))?;
        ensure!(seen.split_whitespace().eq(["1", "0", "0"]), "round {round}: {seen}");
    }
    let count = interrupts()?;
    ensure!(
        count.trim() == "4",
        "interrupts for two keystrokes: {count}\n{}",
        guest.shell("cat /proc/interrupts")?
    );
    Ok(())
}
