//! A stock kernel that works is saved, and goes on in another process.

use super::load::{self, LIMIT, complaints, uptime};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::VmBuilder;

pub const TESTS: &[Test] = &[
    Test::nested("snapshot::linux_6_1_goes_on_in_another_process", |c| {
        goes_on(c, Kernel::V6_1)
    })
    .within(Duration::from_secs(400)),
    Test::nested("snapshot::linux_6_12_goes_on_in_another_process", |c| {
        goes_on(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(400)),
];

/// How long an emulated host may take to write or read all of memory.
const LONG: Duration = Duration::from_secs(120);

fn goes_on(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), 16 << 20)?;
    let mut guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.api().cpus(2).disk(disk.path(), ""))
        .boot()?;
    guest.shell(load::DISK)?;
    load::works(&guest)?;
    let first = complaints(&guest)?;
    for round in 0..2 {
        load::works(&guest)?;
        let before = uptime(&guest)?;
        guest.vm().pause()?;
        let directory = kept.path().join(round.to_string());
        let to = json!({ "destination_url": format!("file://{}", directory.display()) });
        guest
            .vm()
            .api()?
            .within(LONG)
            .put("vm.snapshot", Some(&to.to_string()))?;
        // As a crash ends it.
        drop(guest);
        // Longer than the guest's kernel lets anybody stand still unnoticed, if time went on for it.
        std::thread::sleep(Duration::from_secs(if round == 0 { 30 } else { 0 }));

        let vm = VmBuilder::new(context)?.api().start()?;
        let path = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["vsock"]["socket"] = json!(vm.dir().join("vsock.sock"));
        fs::write(&path, config.to_string())?;
        let from = json!({ "source_url": format!("file://{}", directory.display()) });
        vm.api()?.within(LONG).put("vm.restore", Some(&from.to_string()))?;
        vm.resume()?;
        guest = LinuxVm::attach(vm)?;
        let passed = uptime(&guest)? - before;
        ensure!(
            (0.0..LIMIT.as_secs_f64()).contains(&passed),
            "{passed} s passed for the guest"
        );
        load::works(&guest)?;
    }
    load::ends(&guest)?;
    let last = complaints(&guest)?;
    ensure!(last == first, "before: {first}\nand after: {last}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}
