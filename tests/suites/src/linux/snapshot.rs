//! A stock kernel that works is saved, and goes on in another process.

use super::load::{self, LIMIT};
use anyhow::{Context as _, Result, ensure};
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

/// Writes other data to the disk each time and reads it back from there.
const LOAD: &str = r#"mkdir /load; : >/load/good
(n=0; while [ ! -e /load/stop ]; do
  n=$((n+1)); { echo $n; head -c 65000 /dev/urandom; } | head -c 65000 >/load/data; want=$(md5sum </load/data)
  dd if=/load/data of=/dev/vda bs=4096 conv=fsync 2>/dev/null
  if [ "$(dd if=/dev/vda bs=4096 count=16 iflag=direct 2>/dev/null | head -c 65000 | md5sum)" = "$want" ]; then echo >>/load/good
  else echo "round $n differs" >>/load/bad; fi
done) </dev/null >/dev/null 2>&1 &"#;

/// Words of a kernel that has found somebody standing still, or worse.
const COMPLAINTS: &str =
    "rcu.*stall|soft lockup|hard LOCKUP|hung_task|blocked for more than|BUG:|Oops|clocksource.*unstable|I/O error";

fn uptime(guest: &LinuxVm) -> Result<f64> {
    let text = guest.shell("cut -d' ' -f1 /proc/uptime")?;
    text.trim().parse().with_context(|| text)
}

/// What the kernel complained about so far: an emulated host may be slow before anything is saved.
fn complaints(guest: &LinuxVm) -> Result<String> {
    guest.shell(&format!("dmesg | grep -E '{COMPLAINTS}' || true"))
}

fn goes_on(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), 16 << 20)?;
    let mut guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.api().cpus(2).disk(disk.path(), ""))
        .boot()?;
    guest.shell(LOAD)?;
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
