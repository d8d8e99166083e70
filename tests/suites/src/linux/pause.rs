//! Pausing and resuming a guest that works.

use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::Duration;
use triarch_harness::agent::Exec;
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, serial_line};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("pause::stands_still", stands_still),
    Test::nested("pause::hundred_rounds", hundred_rounds).within(Duration::from_secs(300)),
];

/// What is on its way when the guest is paused may still arrive.
const SETTLE: Duration = Duration::from_millis(200);

/// A paused guest does nothing; resumed, it goes on where it was.
fn stands_still(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.vm(|vm| vm.api()).boot()?;
    let line = serial_line();
    guest.agent().detach(&Exec::shell(&format!(
        "while :; do echo tick > /dev/{line}; usleep 20000; done"
    )))?;
    let output = guest.vm().output();
    output.wait_for("tick", 0, Duration::from_secs(30))?;
    guest.vm().pause()?;
    thread::sleep(SETTLE);
    let before = output.len();
    thread::sleep(Duration::from_millis(500));
    ensure!(
        output.len() == before,
        "a paused guest printed {} bytes",
        output.len() - before
    );
    guest.vm().resume()?;
    output.wait_for("tick", before, Duration::from_secs(30))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The guest writes to its disk without end while it is paused again and again: a lost interrupt
/// would stop it.
fn hundred_rounds(context: &Context) -> Result<Outcome> {
    let image = DiskImage::with(context.dir.join("disk.img"), &pattern(1, 1 << 20))?;
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?
        .vm(|vm| vm.api().cpus(2).disk(image.path(), ""))
        .boot()?;
    guest.agent().put("/tmp/fresh", 0o600, &pattern(2, 1 << 20))?;
    let work = "while dd if=/tmp/fresh of=/dev/vda bs=16k oflag=direct 2>/dev/null; do echo x >> /tmp/rounds; done";
    guest.agent().detach(&Exec::shell(work))?;
    guest.shell("while ! [ -s /tmp/rounds ]; do usleep 10000; done")?;
    for round in 0..100 {
        guest.vm().pause().with_context(|| format!("pause {round}"))?;
        thread::sleep(Duration::from_millis(u64::from(round % 7_u32)));
        guest.vm().resume().with_context(|| format!("resume {round}"))?;
        thread::sleep(Duration::from_millis(u64::from(round % 5_u32) * 4));
    }
    let written = |file: &str| guest.shell(&format!("wc -l < {file}"));
    let before: u64 = written("/tmp/rounds")?.parse()?;
    let wait = format!(
        "while [ $(wc -l < /tmp/rounds) -lt {} ]; do usleep 10000; done",
        before + 3
    );
    guest
        .agent()
        .check(&Exec::shell(&wait).timeout(Duration::from_secs(60)))
        .context("the disk does not go on after 100 rounds")?;
    ensure!(
        image.read(0, 1 << 20)? == pattern(2, 1 << 20),
        "the host's file differs"
    );
    guest.power_off()?;
    Ok(Outcome::Passed)
}
