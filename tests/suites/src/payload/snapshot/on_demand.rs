//! Memory that comes from a snapshot when it is touched.

use super::super::data::crc32;
use super::super::guest::{Guest, SERIAL, builder, number, test_ram};
use super::{MIB, SECTORS, another, crash, edit, grow, restore_with, small, snapshot, url};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, patient};
use triarch_harness::vm::VmBuilder;

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload(
        "snapshot::on_demand::it_comes_when_it_is_touched",
        it_comes_when_it_is_touched,
    )
    .within(LONG),
    Test::payload(
        "snapshot::on_demand::what_is_given_back_is_zeroes",
        what_is_given_back_is_zeroes,
    )
    .within(LONG),
    Test::payload("snapshot::on_demand::it_comes_under_load", it_comes_under_load).within(LONG),
    Test::payload(
        "snapshot::on_demand::a_snapshot_of_it_is_whole",
        a_snapshot_of_it_is_whole,
    )
    .within(LONG),
    Test::payload(
        "snapshot::on_demand::what_is_damaged_ends_the_guest",
        what_is_damaged_ends_the_guest,
    )
    .within(LONG),
    Test::payload(
        "snapshot::on_demand::what_does_not_go_with_it_is_refused",
        what_does_not_go_with_it_is_refused,
    ),
];

const LONG: Duration = Duration::from_secs(60);
/// What the guest has in its memory.
const FILLED: u64 = 48 * MIB;

fn mode() -> Value {
    json!({ "memory_restore_mode": "OnDemand" })
}

/// Saves a guest and ends it.
fn saved(guest: Guest, kept: &Path) -> Result<PathBuf> {
    guest.vm().pause()?;
    let directory = kept.join("snapshot");
    snapshot(guest.vm().api()?, &directory)?;
    crash(guest);
    Ok(directory)
}

/// Waits until all of its memory is there.
fn is_there(api: &Api) -> Result<()> {
    let deadline = Instant::now() + patient(Duration::from_secs(20));
    loop {
        let events = api.request("GET", "vm.events?follow=false", None)?.body;
        if events.contains("\"memory-restored\"") {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "memory does not come: {events}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Looks at what was filled, piece by piece.
fn verify(guest: &mut Guest, pieces: &[u64]) -> Result<()> {
    for at in pieces.iter().rev() {
        guest.ask(&format!("mem verify {} {} {at}", test_ram() + at, 6 * MIB))?;
    }
    Ok(())
}

fn it_comes_when_it_is_touched(context: &Context) -> Result<Outcome> {
    for memory in ["size=96M", "size=96M,shared=on", "size=96M,thp=off"] {
        let kept = tempfile::tempdir_in(&context.dir)?;
        let mut guest = Guest::start(builder(context)?.set("--memory", memory).api())?;
        let pieces: Vec<u64> = (0..FILLED).step_by(6 * MIB as usize).collect();
        for at in &pieces {
            guest.ask(&format!("mem fill {} {} {at}", test_ram() + at, 6 * MIB))?;
        }
        let directory = saved(guest, kept.path())?;
        let mut guest = restore_with(context, &directory, mode())?;
        // From its end: what comes by itself comes from its begin.
        verify(&mut guest, &pieces)?;
        // When all of it is there nobody needs the snapshot.
        is_there(guest.vm().api()?)?;
        fs::remove_dir_all(&directory)?;
        verify(&mut guest, &pieces)?;
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn what_is_given_back_is_zeroes(context: &Context) -> Result<Outcome> {
    for shared in ["", ",shared=on"] {
        let kept = tempfile::tempdir_in(&context.dir)?;
        let vm = builder(context)?.flag("--balloon", "size=0");
        let memory = format!("size=64M,hotplug_method=virtio-mem,hotplug_size=128M{shared}");
        let mut guest = Guest::start(vm.set("--memory", memory).api())?;
        let room = number(&guest.ask("vmem 0 info")?, "addr")?;
        grow(&mut guest, room)?;
        let ram = test_ram();
        guest.ask(&format!("mem fill {ram} {} 5", 32 * MIB))?;
        let directory = saved(guest, kept.path())?;
        let mut guest = restore_with(context, &directory, mode())?;
        // At once, while it still comes.
        let given = (ram + 20 * MIB, MIB / 4096);
        guest.ask(&format!("balloon inflate {} {}", given.0, given.1))?;
        guest.ask(&format!("vmem 0 reach {}", 2 * MIB))?;
        guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
        guest.ask(&format!("balloon deflate {} {}", given.0, given.1))?;
        for (at, len) in [(room + 2 * MIB, 14 * MIB), (given.0, MIB)] {
            let fresh = crc32(&vec![0; len as usize]);
            let found = number(&guest.ask(&format!("mem checksum {at} {len}"))?, "crc32")?;
            ensure!(found == u64::from(fresh), "{at:#x}: {found:#x}, not {fresh:#x}{shared}");
        }
        guest.ask(&format!("mem verify {room} {} 3", 2 * MIB))?;
        guest.ask(&format!("mem verify {ram} {} 5", 20 * MIB))?;
        is_there(guest.vm().api()?)?;
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn it_comes_under_load(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), SECTORS * 512)?;
    let vm = builder(context)?.cpus(2).disk(disk.path(), "num_queues=2");
    let mut guest = Guest::start(vm.set("--memory", "size=96M").api())?;
    guest.ask("blk 0 init queues=2")?;
    guest.ask("cpus")?;
    guest.ask(&format!("mem fill {} {FILLED} 5", test_ram()))?;
    for round in 0..3 {
        guest.send(&format!("blk 0 soak 3000 16 {round} 2000"))?;
        thread::sleep(Duration::from_millis(20));
        let place = kept.path().join(round.to_string());
        fs::create_dir(&place)?;
        let directory = saved(guest, &place)?;
        guest = restore_with(context, &directory, mode())?;
        guest.answer()?;
        guest.ask(&format!("mem verify {} {FILLED} 5", test_ram()))?;
        let sent = guest.ask("ipi 20")?;
        ensure!(number(&sent, "sent")? == 20, "{sent}");
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_snapshot_of_it_is_whole(context: &Context) -> Result<Outcome> {
    for memory in ["size=96M", "size=96M,shared=on"] {
        let kept = tempfile::tempdir_in(&context.dir)?;
        let mut guest = Guest::start(builder(context)?.set("--memory", memory).api())?;
        guest.ask(&format!("mem fill {} {FILLED} 5", test_ram()))?;
        let first = saved(guest, kept.path())?;
        // It is saved again before it has touched anything; and a guest that resets needs nothing of it.
        let guest = restore_with(context, &first, mode())?;
        guest.vm().pause()?;
        let second = kept.path().join("second");
        snapshot(guest.vm().api()?, &second)?;
        crash(guest);
        let mut guest = restore_with(context, &second, json!({}))?;
        guest.ask(&format!("mem verify {} {FILLED} 5", test_ram()))?;
        crash(guest);
        let mut guest = restore_with(context, &second, mode())?;
        guest.send("pm reset")?;
        guest.wait_ready()?;
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

/// It never goes on with anything else, and says why it ended.
fn what_is_damaged_ends_the_guest(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let path = directory.join("memory-ranges");
    let mut bytes = fs::read(&path)?;
    bytes[(16 << 20) + 5] ^= 1;
    fs::write(&path, bytes)?;
    let events = kept.path().join("events");
    let vm = VmBuilder::new(context)?;
    let serial = vm.dir().join(SERIAL);
    edit(&directory, |config| config["serial"]["socket"] = json!(serial))?;
    let vm = vm.flag("--event-monitor", format!("path={}", events.display()));
    let from = format!(
        "source_url=file://{},memory_restore_mode=ondemand,resume=on",
        directory.display()
    );
    let ended = vm.flag("--restore", from).start()?.expect_end(1)?;
    ensure!(ended.stderr.contains("damaged"), "{}", ended.stderr);
    let told = fs::read_to_string(&events)?;
    let failed = told.lines().find(|line| line.contains("\"event\":\"failed\""));
    ensure!(failed.is_some_and(|line| line.contains("damaged")), "{told}");
    Ok(Outcome::Passed)
}

fn what_does_not_go_with_it_is_refused(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let config = fs::read(directory.join("config.json"))?;
    let (_vm, api) = another(context)?;
    let mut request = mode();
    request["source_url"] = url("source_url", &directory)["source_url"].clone();
    let with = |change: &dyn Fn(&mut Value), words: &[&str]| -> Result<()> {
        edit(&directory, change)?;
        api.refused("vm.restore", &request, 400, words)?;
        Ok(fs::write(directory.join("config.json"), &config)?)
    };
    let served = json!([{ "vhost_user": true, "vhost_socket": "/nowhere", "id": "served" }]);
    with(
        &|config| config["disks"] = served.clone(),
        &["OnDemand", "daemons serve", "use Copy"],
    )?;
    with(
        &|config| config["memory"]["hugepages"] = json!(true),
        &["OnDemand", "huge pages"],
    )?;
    with(
        &|config| config["memory"]["prefault"] = json!(true),
        &["OnDemand", "prefault"],
    )?;
    request["prefault"] = json!(true);
    api.refused("vm.restore", &request, 400, &["OnDemand", "prefault"])?;
    Ok(Outcome::Passed)
}
