//! What is left of a snapshot whose VMM was killed, or whose disk was full.

use super::super::ends::started_by;
use super::super::guest::{Guest, builder, test_ram};
use super::{MIB, crash, restore_with, snapshot, url};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::dice::Dice;
use triarch_harness::suite::{Context, Outcome, Test, figure, kills, patient};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("snapshot::killed::it_is_whole_or_none", it_is_whole_or_none).within(Duration::from_secs(120)),
    Test::payload(
        "snapshot::killed::a_full_disk_leaves_nothing",
        a_full_disk_leaves_nothing,
    ),
];

const FILLED: u64 = 24 * MIB;
const NAMES: [&str; 4] = ["config.json", "memory-ranges", "state.json", "state.json.tmp"];

/// The names in a directory.
fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A guest with memory to save, paused.
fn start(context: &Context) -> Result<Guest> {
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.ask(&format!("mem fill {} {FILLED} 5", test_ram()))?;
    guest.vm().pause()?;
    Ok(guest)
}

/// Goes on from what is in `directory`, which has to be all of it.
fn is_whole(context: &Context, directory: &Path) -> Result<()> {
    let mut guest = restore_with(context, directory, json!({}))?;
    guest.ask(&format!("mem verify {} {FILLED} 5", test_ram()))?;
    guest.power_off()?;
    Ok(())
}

fn it_is_whole_or_none(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    // Guests that are killed come from this one, which is never touched.
    let origin = kept.path().join("origin");
    let guest = start(context)?;
    let asked = Instant::now();
    snapshot(guest.vm().api()?, &origin)?;
    let took = asked.elapsed();
    crash(guest);
    let target = kept.path().join("target");
    let (mut whole, mut begun, mut dice) = (0, 0, Dice::new(11));
    let rounds = 2 * kills();
    for round in 0..rounds {
        let guest = restore_with(context, &origin, json!({ "memory_restore_mode": "Mapped" }))?;
        guest.vm().pause()?;
        let api = guest.vm().api()?.clone();
        let to = url("destination_url", &target).to_string();
        // Nobody answers it.
        let client = thread::spawn(move || drop(api.request("PUT", "vm.snapshot", Some(&to))));
        // From before its begin until after its end.
        let moment = took.mul_f64(1.5 * dice.below(1000) as f64 / 1000.0);
        thread::sleep(moment);
        crash(guest);
        client.join().ok().context("the client panicked")?;
        let left = names(&target).unwrap_or_default();
        ensure!(
            left.iter().all(|name| NAMES.contains(&name.as_str())),
            "round {round}: {left:?}"
        );
        if left.contains(&"state.json".to_owned()) {
            is_whole(context, &target).with_context(|| format!("round {round}, killed after {moment:?}"))?;
            fs::remove_dir_all(&target)?;
            whole += 1;
            continue;
        }
        // What is left stays for the next one to overwrite.
        begun += u32::from(!left.is_empty());
        if target.exists() {
            let (_vm, api) = super::another(context)?;
            api.refused("vm.restore", &url("source_url", &target), 400, &["holds no snapshot"])?;
        }
    }
    figure(&format!(
        "{rounds} kills in snapshots of {took:?}: {whole} whole, {begun} begun"
    ))?;
    // Over whatever the last one left.
    let guest = start(context)?;
    snapshot(guest.vm().api()?, &target)?;
    crash(guest);
    is_whole(context, &target)?;
    Ok(Outcome::Passed)
}

/// Bytes that the files in `directory` take on its disk.
fn taken(directory: &Path) -> Result<u64> {
    let blocks = NAMES
        .iter()
        .map(|name| fs::metadata(directory.join(name)).map_or(0, |file| file.blocks()));
    Ok(512 * blocks.sum::<u64>())
}

fn a_full_disk_leaves_nothing(context: &Context) -> Result<Outcome> {
    if !Path::new("/usr/bin/unshare").exists() || rustix::process::geteuid().as_raw() != 0 {
        return Ok(Outcome::Skipped("a disk of its own takes root and unshare(1)".into()));
    }
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = kept.path().join("disk");
    fs::create_dir(&disk)?;
    let script = format!(
        "exec unshare --mount /bin/sh -c 'mount -t tmpfs -o size=64m none {} && exec \"$0\" \"$@\"'",
        disk.display()
    );
    let guest = start(&started_by(context, &script, "")?)?;
    let api = guest.vm().api()?;
    // It is the VMM's alone.
    let seen = PathBuf::from(format!("/proc/{}/root", guest.vm().pid())).join(disk.strip_prefix("/")?);
    let directory = disk.join("snapshot");
    let attempt = || {
        api.request(
            "PUT",
            "vm.snapshot",
            Some(&url("destination_url", &directory).to_string()),
        )
    };
    let free = |filler: &File, bytes: u64| -> Result<()> {
        filler.set_len(0)?;
        Ok(rustix::fs::fallocate(
            filler,
            rustix::fs::FallocateFlags::empty(),
            0,
            64 * MIB - bytes,
        )?)
    };
    let filler = File::create(seen.join("filler"))?;
    ensure!(attempt()?.is_success(), "it does not fit on an empty disk");
    let whole = taken(&seen.join("snapshot"))?;
    let state = fs::metadata(seen.join("snapshot/state.json"))?.blocks() * 512;
    ensure!(whole > FILLED && state > 0, "{whole} bytes, {state} of them state");
    fs::remove_dir_all(seen.join("snapshot"))?;
    // In the midst of memory; so that only the state is missing; and a page of it.
    for missing in [FILLED, whole - MIB, state, 4096] {
        free(&filler, whole - missing)?;
        let answer = attempt()?;
        ensure!(
            answer.status == 500,
            "without {missing} bytes: {} {}",
            answer.status,
            answer.body
        );
        ensure!(answer.body.contains("No space left"), "{}", answer.body);
        let job = api.ended("vm.snapshot", patient(Duration::from_secs(1)))?;
        ensure!(job["state"] == "failed", "{job}");
        let left = names(&seen)?;
        ensure!(left == ["filler"], "without {missing} bytes: {left:?}");
    }
    // The guest is as it was, and can be saved as soon as there is room.
    filler.set_len(0)?;
    ensure!(attempt()?.is_success(), "there is room");
    let mut guest = guest;
    guest.vm().resume()?;
    guest.ask(&format!("mem verify {} {FILLED} 5", test_ram()))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
