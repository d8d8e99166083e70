//! Snapshots that have only what was written since another one.
//!
//! Each is compared with a whole one of the same moment, byte by byte: a write that nobody noted is found wherever it was.

use super::super::dimms;
use super::super::ends::started_by;
use super::super::guest::{Guest, SERIAL, builder, is_arm, number, test_ram};
use super::{MIB, SECTORS, another, crash, edit, grow, restore_with, snapshot, url};
use crate::storage;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::dice::Dice;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, figure, kills};
use triarch_state::Snapshot;

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload(
        "snapshot::incremental::it_has_what_was_written",
        it_has_what_was_written,
    )
    .within(LONG),
    Test::payload(
        "snapshot::incremental::memory_comes_and_goes_in_between",
        memory_comes_and_goes_in_between,
    )
    .within(LONG),
    Test::payload(
        "snapshot::incremental::memory_devices_take_each_others_place",
        memory_devices_take_each_others_place,
    )
    .within(LONG),
    Test::payload(
        "snapshot::incremental::a_restored_guest_goes_on_with_it",
        a_restored_guest_goes_on_with_it,
    )
    .within(LONG),
    Test::payload(
        "snapshot::incremental::a_failed_one_loses_nothing",
        a_failed_one_loses_nothing,
    )
    .within(LONG),
    Test::payload(
        "snapshot::incremental::a_killed_one_is_whole_or_none",
        a_killed_one_is_whole_or_none,
    )
    .within(Duration::from_secs(180)),
    Test::payload(
        "snapshot::incremental::wrong_bases_are_refused",
        wrong_bases_are_refused,
    )
    .within(LONG),
    Test::payload(
        "snapshot::incremental::vhost::daemons_write_unseen",
        daemons_write_unseen,
    )
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(90);

/// The request of a snapshot into `directory`.
fn body(directory: &Path, base: Option<&Path>, track: Option<bool>) -> Value {
    let mut body = url("destination_url", directory);
    if let Some(base) = base {
        body["base"] = url("base", base)["base"].clone();
    }
    if let Some(track) = track {
        body["track_writes"] = json!(track);
    }
    body
}

/// All memory of the snapshot in `directory`: each region's GPA and bytes.
fn memory(directory: &Path) -> Result<Vec<(u64, Vec<u8>)>> {
    let snapshot = Snapshot::open(directory, std::env::consts::ARCH)?;
    let room = |range: &triarch_state::MemoryRange| (range.gpa, vec![0; range.size as usize]);
    let mut all: Vec<(u64, Vec<u8>)> = snapshot.ranges().iter().map(room).collect();
    let write = |gpa: u64, bytes: &[u8]| {
        let found = all.iter_mut().rev().find(|(start, _)| *start <= gpa);
        let (start, region) = found.ok_or(std::io::ErrorKind::NotFound)?;
        region[(gpa - *start) as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    };
    snapshot.memory(|_| true, write, |_, _| {})?;
    Ok(all)
}

fn same(one: &Path, other: &Path) -> Result<()> {
    let (one, other) = (memory(one)?, memory(other)?);
    let places = |all: &[(u64, Vec<u8>)]| all.iter().map(|(gpa, bytes)| (*gpa, bytes.len())).collect::<Vec<_>>();
    ensure!(
        places(&one) == places(&other),
        "{:x?} and {:x?}",
        places(&one),
        places(&other)
    );
    for ((gpa, one), (_, other)) in one.iter().zip(&other) {
        let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
        let differ: Vec<_> = pages.filter(|(_, (one, other))| one != other).collect();
        let first = differ.first().map(|(page, _)| gpa + *page as u64 * 4096);
        ensure!(
            differ.is_empty(),
            "{} pages differ, the first at {first:x?}",
            differ.len()
        );
    }
    Ok(())
}

/// The guest's snapshots, one on the other.
struct Chain {
    kept: PathBuf,
    last: Option<PathBuf>,
    count: u32,
}

impl Chain {
    fn new(kept: &Path) -> Self {
        Self {
            kept: kept.to_owned(),
            last: None,
            count: 0,
        }
    }

    /// Pauses the guest and saves it: as a whole, and on the one before, which has to be the same. It stays paused.
    fn save(&mut self, guest: &Guest) -> Result<PathBuf> {
        guest.vm().pause()?;
        self.save_paused(guest)
    }

    /// The same of a guest that stands still.
    fn save_paused(&mut self, guest: &Guest) -> Result<PathBuf> {
        let api = guest.vm().api()?;
        let next = self.kept.join(format!("{}", self.count));
        api.put(
            "vm.snapshot",
            Some(&body(&next, self.last.as_deref(), Some(true)).to_string()),
        )?;
        let whole = self.kept.join(format!("whole{}", self.count));
        snapshot(api, &whole)?;
        same(&next, &whole).with_context(|| format!("snapshot {}", self.count))?;
        fs::remove_dir_all(&whole)?;
        self.last = Some(next.clone());
        self.count += 1;
        Ok(next)
    }
}

/// Bytes of memory in the snapshot itself.
fn held(directory: &Path) -> Result<u64> {
    Ok(fs::metadata(directory.join("memory-ranges"))?.len())
}

/// The checksum of a part of the guest's memory.
fn checksum(guest: &mut Guest, at: u64, len: u64) -> Result<u64> {
    number(&guest.ask(&format!("mem checksum {at} {len}"))?, "crc32")
}

fn it_has_what_was_written(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), SECTORS * 512)?;
    let vm = builder(context)?.disk(disk.path(), "");
    let mut guest = Guest::start(vm.api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 24 * MIB))?;
    guest.ask(&format!("blk 0 write 0 {} 3", 2048))?;
    let rest = checksum(&mut guest, ram + 12 * MIB, 12 * MIB)?;
    let mut chain = Chain::new(kept.path());
    let first = chain.save(&guest)?;
    ensure!(held(&first)? == 64 * MIB, "{}", held(&first)?);
    guest.vm().resume()?;
    // By a vCPU, and by a disk of the VMM's.
    guest.ask(&format!("mem fill {} {} 6", ram + 2 * MIB, MIB))?;
    guest.ask(&format!("blk 0 dma in 0 2048 {}", ram + 8 * MIB))?;
    let second = chain.save(&guest)?;
    ensure!((2 * MIB..6 * MIB).contains(&held(&second)?), "{}", held(&second)?);
    guest.vm().resume()?;
    guest.ask(&format!("mem fill {} {} 7", ram + 3 * MIB, MIB))?;
    let third = chain.save(&guest)?;
    ensure!((MIB..4 * MIB).contains(&held(&third)?), "{}", held(&third)?);
    // With nothing in between there is next to nothing in it; and again, since the guest has not run.
    let fourth = chain.save_paused(&guest)?;
    ensure!(held(&fourth)? < MIB / 4, "{}", held(&fourth)?);
    crash(guest);
    for mode in ["Copy", "OnDemand"] {
        let mut guest = restore_with(context, &fourth, json!({ "memory_restore_mode": mode }))?;
        for (at, len, seed) in [(0, 2, 5), (2, 1, 6), (3, 1, 7)] {
            guest.ask(&format!("mem verify {} {} {seed}", ram + at * MIB, len * MIB))?;
        }
        ensure!(
            checksum(&mut guest, ram + 12 * MIB, 12 * MIB)? == rest,
            "the rest differs"
        );
        guest.ask("blk 0 verify 0 2048 3")?;
        guest.power_off()?;
    }
    let (_vm, api) = another(context)?;
    let mapped = json!({ "source_url": url("source_url", &fourth)["source_url"], "memory_restore_mode": "Mapped" });
    api.refused(
        "vm.restore",
        &mapped,
        400,
        &["Mapped", "builds on no other", "OnDemand"],
    )?;
    Ok(Outcome::Passed)
}

fn memory_comes_and_goes_in_between(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    for shared in ["off", "on"] {
        let vm = builder(context)?.flag("--balloon", "size=0,free_page_reporting=on");
        let options = format!("size=64M,hotplug_method=virtio-mem,hotplug_size=128M,shared={shared}");
        let mut guest = Guest::start(vm.set("--memory", options).api())?;
        let ram = test_ram();
        let room = number(&guest.ask("vmem 0 info")?, "addr")?;
        guest.ask(&format!("mem fill {ram} {} 5", 8 * MIB))?;
        let rest = checksum(&mut guest, ram + 4 * MIB, 4 * MIB)?;
        let below = kept.path().join(shared);
        fs::create_dir(&below)?;
        let mut chain = Chain::new(&below);
        chain.save(&guest)?;
        guest.vm().resume()?;
        // The host gets pages back: they are zeroes.
        guest.ask(&format!("balloon inflate {} 64", ram + MIB))?;
        guest.ask(&format!("balloon report {} {}", ram + 2 * MIB, 256 << 10))?;
        grow(&mut guest, room)?;
        chain.save(&guest)?;
        guest.vm().resume()?;
        // What it had there is gone, and what is there now came later.
        guest.ask(&format!("vmem 0 reach {}", 2 * MIB))?;
        chain.save(&guest)?;
        guest.vm().resume()?;
        guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
        guest.ask(&format!("mem fill {} {MIB} 9", room + 8 * MIB))?;
        guest.ask(&format!("balloon deflate {} 64", ram + MIB))?;
        let last = chain.save(&guest)?;
        crash(guest);
        let mut guest = restore_with(context, &last, json!({}))?;
        guest.ask(&format!("mem verify {room} {} 3", 2 * MIB))?;
        guest.ask(&format!("mem verify {} {MIB} 9", room + 8 * MIB))?;
        ensure!(
            checksum(&mut guest, ram + 4 * MIB, 4 * MIB)? == rest,
            "the rest differs"
        );
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn memory_devices_take_each_others_place(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (mut guest, api) = dimms::start(context, "")?;
    let room = dimms::room();
    let come = |guest: &mut Guest, blocks| -> Result<()> {
        dimms::resize(&api, blocks)?;
        guest.ask("dimm serve 1 5000")?;
        Ok(())
    };
    come(&mut guest, 1)?;
    guest.ask(&format!("mem fill {room:#x} {:#x} 1", 4 * MIB))?;
    let mut chain = Chain::new(kept.path());
    chain.save(&guest)?;
    guest.vm().resume()?;
    // Another one at the same place, which is empty but for a little.
    come(&mut guest, 0)?;
    come(&mut guest, 1)?;
    guest.ask(&format!("mem fill {:#x} {:#x} 2", room + MIB, MIB))?;
    let second = chain.save(&guest)?;
    guest.vm().resume()?;
    // One more, and then none.
    come(&mut guest, 2)?;
    guest.ask(&format!("mem fill {:#x} {:#x} 3", room + dimms::BLOCK, MIB))?;
    let third = chain.save(&guest)?;
    guest.vm().resume()?;
    come(&mut guest, 0)?;
    let fourth = chain.save(&guest)?;
    crash(guest);
    let mut guest = restore_with(context, &second, json!({}))?;
    guest.ask(&format!("mem verify {:#x} {:#x} 2", room + MIB, MIB))?;
    crash(guest);
    let mut guest = restore_with(context, &third, json!({}))?;
    guest.ask(&format!("mem verify {:#x} {:#x} 2", room + MIB, MIB))?;
    guest.ask(&format!("mem verify {:#x} {:#x} 3", room + dimms::BLOCK, MIB))?;
    crash(guest);
    restore_with(context, &fourth, json!({}))?.power_off()?;
    Ok(Outcome::Passed)
}

fn a_restored_guest_goes_on_with_it(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let mut guest = Guest::start(builder(context)?.api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 8 * MIB))?;
    let mut chain = Chain::new(kept.path());
    let first = chain.save(&guest)?;
    crash(guest);
    for (seed, mode) in [(6, "Copy"), (7, "OnDemand"), (8, "Copy")] {
        let last = chain.last.clone().context("none was saved")?;
        let request = json!({ "track_writes": true, "memory_restore_mode": mode });
        let mut guest = restore_with(context, &last, request)?;
        guest.ask(&format!("mem fill {} {MIB} {seed}", ram + seed * MIB))?;
        let next = chain.save(&guest)?;
        ensure!(held(&next)? < 4 * MIB, "{}", held(&next)?);
        crash(guest);
    }
    // From a whole one that is mapped, too.
    let request = json!({ "track_writes": true, "memory_restore_mode": "Mapped" });
    let mut guest = restore_with(context, &first, request)?;
    guest.ask(&format!("mem fill {ram} {MIB} 9"))?;
    let mut other = Chain::new(&kept.path().join("other"));
    fs::create_dir(&other.kept)?;
    other.last = Some(first);
    let next = other.save(&guest)?;
    ensure!(held(&next)? < 4 * MIB, "{}", held(&next)?);
    guest.vm().resume()?;
    guest.power_off()?;
    let last = chain.last.context("none was saved")?;
    let mut guest = restore_with(context, &last, json!({}))?;
    for seed in [6, 7, 8] {
        guest.ask(&format!("mem verify {} {MIB} {seed}", ram + seed * MIB))?;
    }
    guest.ask(&format!("mem verify {ram} {} 5", 6 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_failed_one_loses_nothing(context: &Context) -> Result<Outcome> {
    if !Path::new("/usr/bin/unshare").exists() || rustix::process::geteuid().as_raw() != 0 {
        return Ok(Outcome::Skipped("a disk of its own takes root and unshare(1)".into()));
    }
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = kept.path().join("disk");
    fs::create_dir(&disk)?;
    // Nothing fits there.
    let script = format!(
        "exec unshare --mount /bin/sh -c 'mount -t tmpfs -o size=64k none {} && exec \"$0\" \"$@\"'",
        disk.display()
    );
    let mut guest = Guest::start(builder(&started_by(context, &script, "")?)?.api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 8 * MIB))?;
    let mut chain = Chain::new(kept.path());
    let first = chain.save(&guest)?;
    // It is the VMM's alone.
    let seen = PathBuf::from(format!("/proc/{}/root", guest.vm().pid())).join(disk.strip_prefix("/")?);
    for seed in [6, 7] {
        guest.vm().resume()?;
        guest.ask(&format!("mem fill {} {MIB} {seed}", ram + seed * MIB))?;
        guest.vm().pause()?;
        let full = disk.join("snapshot");
        let request = body(&full, Some(&first), Some(true));
        guest
            .vm()
            .api()?
            .refused("vm.snapshot", &request, 500, &["No space left on device"])?;
        ensure!(fs::read_dir(&seen)?.next().is_none(), "something was left");
    }
    // Another one on the same base: without track_writes it changes nothing.
    let differs = kept.path().join("differs");
    guest
        .vm()
        .api()?
        .put("vm.snapshot", Some(&body(&differs, Some(&first), None).to_string()))?;
    let next = chain.save_paused(&guest)?;
    ensure!(
        held(&differs)? == held(&next)? && held(&next)? >= 2 * MIB,
        "{}",
        held(&next)?
    );
    same(&differs, &next)?;
    guest.vm().resume()?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_killed_one_is_whole_or_none(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let mut guest = Guest::start(builder(context)?.api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 24 * MIB))?;
    let rest = checksum(&mut guest, ram + 12 * MIB, 12 * MIB)?;
    guest.vm().pause()?;
    let base = kept.path().join("base");
    guest
        .vm()
        .api()?
        .put("vm.snapshot", Some(&body(&base, None, Some(true)).to_string()))?;
    crash(guest);
    let target = kept.path().join("target");
    let (mut whole, mut begun, mut dice) = (0, 0, Dice::new(17));
    let mut took = None;
    for round in 0..kills() {
        let mut guest = restore_with(context, &base, json!({ "track_writes": true }))?;
        guest.ask(&format!("mem fill {ram} {} 6", 12 * MIB))?;
        guest.vm().pause()?;
        let api = guest.vm().api()?.clone();
        let request = body(&target, Some(&base), Some(true)).to_string();
        let Some(took) = took else {
            let asked = Instant::now();
            api.put("vm.snapshot", Some(&request))?;
            took = Some(asked.elapsed());
            fs::remove_dir_all(&target)?;
            continue;
        };
        let client = thread::spawn(move || drop(api.request("PUT", "vm.snapshot", Some(&request))));
        thread::sleep(took.mul_f64(1.5 * dice.below(1000) as f64 / 1000.0));
        crash(guest);
        client.join().ok().context("the client panicked")?;
        if target.join("state.json").exists() {
            let mut guest = restore_with(context, &target, json!({})).with_context(|| format!("round {round}"))?;
            guest.ask(&format!("mem verify {ram} {} 6", 12 * MIB))?;
            let found = checksum(&mut guest, ram + 12 * MIB, 12 * MIB)?;
            ensure!(found == rest, "round {round}: the rest differs");
            guest.power_off()?;
            fs::remove_dir_all(&target)?;
            whole += 1;
        } else if target.exists() {
            begun += 1;
            let (_vm, api) = another(context)?;
            api.refused("vm.restore", &url("source_url", &target), 400, &["holds no snapshot"])?;
        }
    }
    figure(&format!(
        "kills in incremental snapshots of {took:?}: {whole} whole, {begun} begun"
    ))?;
    // The base is what it was.
    let mut guest = restore_with(context, &base, json!({}))?;
    guest.ask(&format!("mem verify {ram} {} 5", 24 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn refused(api: &Api, body: &Value, words: &[&str]) -> Result<()> {
    api.refused("vm.snapshot", body, 400, words)
}

fn wrong_bases_are_refused(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let [plain, first, second, third, fourth] = ["plain", "1", "2", "3", "4"].map(|name| kept.path().join(name));
    let guest = Guest::start(builder(context)?.api())?;
    guest.vm().pause()?;
    let api = guest.vm().api()?.clone();
    snapshot(&api, &plain)?;
    refused(
        &api,
        &body(&first, Some(&plain), None),
        &["plain", "track_writes", "as a whole"],
    )?;
    refused(
        &api,
        &body(&first, Some(&third), None),
        &[&third.display().to_string(), "no snapshot"],
    )?;
    let nowhere = json!({ "destination_url": url("d", &first)["d"], "base": "tcp:1.2.3.4:5" });
    refused(&api, &nowhere, &["base", "file://"])?;
    let put = |to: &Path, base: Option<&Path>, track| api.put("vm.snapshot", Some(&body(to, base, track).to_string()));
    put(&first, None, Some(true))?;
    put(&second, Some(&first), Some(true))?;
    // Not the last one any more.
    let now = second.display().to_string();
    refused(
        &api,
        &body(&third, Some(&first), None),
        &["writes are logged since", &now, "name that"],
    )?;
    // One that was deleted, in the midst of the chain.
    let away = kept.path().join("away");
    fs::rename(&first, &away)?;
    let gone = first.display().to_string();
    refused(&api, &body(&third, Some(&second), None), &[&gone, "no snapshot"])?;
    fs::rename(&away, &first)?;
    ensure!(!third.exists(), "a refusal left something");
    // Nobody wants the log any more.
    put(&third, Some(&second), Some(false))?;
    refused(&api, &body(&fourth, Some(&third), None), &["without track_writes"])?;
    put(&fourth, None, Some(true))?;
    // The guest begins anew.
    guest.vm().resume()?;
    api.put("vm.reboot", None)?;
    guest.vm().pause()?;
    let fifth = kept.path().join("5");
    refused(
        &api,
        &body(&fifth, Some(&fourth), None),
        &["not logged", "reset", "as a whole"],
    )?;
    crash(guest);

    // A restore names what is missing.
    let (vm, api) = another(context)?;
    let from = |directory: &Path| -> Result<Value> {
        edit(directory, |config| {
            config["serial"]["socket"] = json!(vm.dir().join(SERIAL));
        })?;
        Ok(url("source_url", directory))
    };
    let source = from(&third)?;
    fs::rename(&first, &away)?;
    api.refused("vm.restore", &source, 400, &[&now, &gone, "no snapshot"])?;
    fs::create_dir(&first)?;
    for name in ["config.json", "memory-ranges", "state.json"] {
        fs::copy(fourth.join(name), first.join(name))?;
    }
    api.refused("vm.restore", &source, 400, &[&gone, "another snapshot by now"])?;
    fs::remove_dir_all(&first)?;
    fs::rename(&away, &first)?;
    let mut track = from(&third)?;
    track["track_writes"] = json!(true);
    api.refused("vm.restore", &track, 400, &["track_writes"])?;
    // A base's memory is compared with its checksums, too.
    let file = File::options().write(true).open(first.join("memory-ranges"))?;
    let kernel = if is_arm() { 4 * MIB } else { MIB };
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xa5; 64], kernel)?;
    api.refused("vm.restore", &source, 400, &[&gone, "damaged"])?;
    Ok(Outcome::Passed)
}

fn daemons_write_unseen(context: &Context) -> Result<Outcome> {
    let Some(rig) =
        super::super::vhost::Rig::with(context, storage::Program::Blkd, 1, |daemon| ("--disk", daemon.flag("")))?
    else {
        return Ok(Outcome::Skipped(storage::missing()));
    };
    let kept = tempfile::tempdir_in(&context.dir)?;
    rig.guest.vm().pause()?;
    let api = rig.guest.vm().api()?;
    let request = body(&kept.path().join("1"), None, Some(true));
    refused(api, &request, &["track_writes", "'served'", "daemons"])?;
    Ok(Outcome::Passed)
}
