//! A guest that was saved goes on in another process where it was.

use super::data::crc32;
use super::dimms;
use super::guest::{Guest, SERIAL, builder, number};
use super::payload_tests;
use super::snapshot_cpu::for_emulated_cpus;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, patient};
use triarch_harness::vm::{Vm, VmBuilder};

mod clock;
mod daemons;
mod elsewhere;
mod flag;
mod incremental;
mod killed;
mod on_demand;

/// This module's tests.
pub fn tests() -> Vec<Test> {
    [
        TESTS,
        flag::TESTS,
        elsewhere::TESTS,
        daemons::TESTS,
        killed::TESTS,
        incremental::TESTS,
        clock::TESTS,
        on_demand::TESTS,
    ]
    .concat()
}

payload_tests!("snapshot":
    goes_on_where_it_was,
    what_came_while_it_ran_is_there,
    memory_devices_are_there,
    shared_memory_is_saved,
    mapped_memory_is_copied_when_it_is_written,
    only_a_paused_guest_is_saved,
    what_is_damaged_is_refused,
    what_does_not_fit_is_refused,
    a_link_is_not_followed,
);

const MIB: u64 = 1 << 20;
const SECTORS: u64 = 16 * MIB / 512;

pub(super) fn url(field: &str, directory: &Path) -> Value {
    json!({ field: format!("file://{}", directory.display()) })
}

pub(super) fn snapshot(api: &Api, directory: &Path) -> Result<()> {
    api.put("vm.snapshot", Some(&url("destination_url", directory).to_string()))?;
    let mut names: Vec<_> = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<std::io::Result<_>>()?;
    names.sort();
    ensure!(names == ["config.json", "memory-ranges", "state.json"], "{names:?}");
    for_emulated_cpus(directory)
}

/// A VMM without a VM, with another socket.
pub(super) fn another(context: &Context) -> Result<(Vm, Api)> {
    let vm = VmBuilder::new(context)?.api().start()?;
    let api = vm.api()?.clone();
    Ok((vm, api))
}

/// Changes the configuration in a snapshot, as agents do.
pub(super) fn edit(directory: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let path = directory.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path)?)?;
    change(&mut config);
    Ok(fs::write(path, config.to_string())?)
}

/// Restores what is in `directory` in a process of its own, with a serial line of its own, and lets it go on.
pub(super) fn restore(context: &Context, directory: &Path) -> Result<Guest> {
    restore_with(context, directory, json!({}))
}

/// The same with more in the request.
fn restore_with(context: &Context, directory: &Path, request: Value) -> Result<Guest> {
    let (vm, _) = another(context)?;
    let guest = restore_in(vm, directory, request)?;
    guest.vm().resume()?;
    Ok(guest)
}

/// Restores what is in `directory` in `vm`, with a serial line of its own; it stays paused.
fn restore_in(vm: Vm, directory: &Path, mut request: Value) -> Result<Guest> {
    let api = vm.api()?.clone();
    let serial = vm.dir().join(SERIAL);
    edit(directory, |config| config["serial"]["socket"] = json!(serial))?;
    request["source_url"] = url("source_url", directory)["source_url"].clone();
    api.put("vm.restore", Some(&request.to_string()))?;
    let info = api.get("vm.info")?;
    ensure!(info["state"] == "Paused", "{}", info["state"]);
    Guest::attach_restored(vm, &serial)
}

/// Has a guest of 64 MiB take 16 MiB more by virtio-mem, and fill them with the pattern 3; they begin at `room`.
fn grow(guest: &mut Guest, room: u64) -> Result<()> {
    let more = json!({ "desired_ram": 80 * MIB });
    guest.vm().api()?.put("vm.resize", Some(&more.to_string()))?;
    guest.ask(&format!("vmem 0 wait {} 2000", 16 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
    guest.ask(&format!("mem fill {room} {} 3", 16 * MIB))?;
    Ok(())
}

/// That a guest has what it had, by what `vm.info` tells `before` and `after`.
pub(super) fn same_machine(before: &Value, after: &Value) -> Result<()> {
    for what in ["memory_actual_size", "vcpus", "device_tree"] {
        ensure!(
            before[what] == after[what],
            "{what}: {} and then {}",
            before[what],
            after[what]
        );
    }
    Ok(())
}

/// Ends the VMM as a crash does.
fn crash(guest: Guest) -> PathBuf {
    let directory = guest.vm().dir().to_owned();
    drop(guest);
    directory
}

fn goes_on_where_it_was(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), SECTORS * 512)?;
    let vsock = kept.path().join("vsock.sock");
    let vm = builder(context)?
        .cpus(2)
        .disk(disk.path(), "num_queues=2")
        .flag("--vsock", format!("cid=42,socket={}", vsock.display()))
        .flag("--balloon", "size=0");
    let mut guest = Guest::start(vm.api())?;
    guest.ask("cpus")?;
    guest.ask("blk 0 init queues=2")?;
    guest.ask("vsock info")?;
    let ram = super::guest::test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 4 * MIB))?;
    guest.ask("blk 0 write 20000 64 7")?;
    let boots = guest.vm().api()?.get("vm.info")?;
    for round in 0..2 {
        // It is saved in the middle of its work, which it ends in another process, and answers there.
        guest.send("blk 0 soak 3000 16 9 2000")?;
        std::thread::sleep(Duration::from_millis(30));
        guest.vm().pause()?;
        let directory = kept.path().join(round.to_string());
        snapshot(guest.vm().api()?, &directory)?;
        crash(guest);
        guest = restore(context, &directory)?;
        let answer = guest.answer()?;
        ensure!(number(&answer, "requests")? >= 3000, "{answer}");
        guest.ask(&format!("mem verify {ram} {} 5", 4 * MIB))?;
        guest.ask("blk 0 verify 20000 64 7")?;
        let sent = guest.ask("ipi 20")?;
        ensure!(number(&sent, "sent")? == 20, "{sent}");
        guest.ask("sleep 5")?;
        ensure!(number(&guest.ask("vsock info")?, "cid")? == 42);
        let info = guest.vm().api()?.get("vm.info")?;
        ensure!(info["device_tree"] == boots["device_tree"], "{}", info["device_tree"]);
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_came_while_it_ran_is_there(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let vm = builder(context)?
        .set("--cpus", "boot=1,max=3")
        .set("--memory", "size=64M,hotplug_method=virtio-mem,hotplug_size=1G");
    let mut guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    api.put("vm.resize", Some(&json!({ "desired_vcpus": 2 }).to_string()))?;
    guest.ask("hot serve 1 2000")?;
    grow(&mut guest, room)?;
    let disk = DiskImage::empty(kept.path().join("disk"), SECTORS * 512)?;
    api.put(
        "vm.add-disk",
        Some(&json!({ "path": disk.path(), "id": "late" }).to_string()),
    )?;
    guest.ask("slots serve 1 2000")?;
    guest.ask("blk 0 write 0 64 4")?;
    guest.vm().pause()?;
    let before = api.get("vm.info")?;
    let directory = kept.path().join("snapshot");
    snapshot(&api, &directory)?;
    crash(guest);

    let mut guest = restore(context, &directory)?;
    let api = guest.vm().api()?.clone();
    let after = api.get("vm.info")?;
    same_machine(&before, &after)?;
    guest.ask(&format!("mem verify {room} {} 3", 16 * MIB))?;
    guest.ask("blk 0 verify 0 64 4")?;
    guest.ask("hot ping 1")?;
    // All of it goes on: the disk goes, another processor and more memory come.
    api.put("vm.remove-device", Some(&json!({ "id": "late" }).to_string()))?;
    guest.ask("slots serve 1 2000")?;
    let job = api.ended("vm.remove-device", patient(Duration::from_secs(5)))?;
    ensure!(job["state"] == "done", "{job}");
    api.put("vm.resize", Some(&json!({ "desired_vcpus": 3 }).to_string()))?;
    guest.ask("hot serve 1 2000")?;
    guest.ask("hot ping 2")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn memory_devices_are_there(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (mut guest, api) = dimms::start(context, "")?;
    let (first, second) = (dimms::room(), dimms::room() + dimms::BLOCK);
    for (blocks, base) in [(1, first), (2, second)] {
        dimms::resize(&api, blocks)?;
        guest.ask("dimm serve 1 5000")?;
        dimms::done(&api, "the guest took 128 MiB")?;
        guest.ask(&format!("mem fill {base:#x} {:#x} {base}", 4 * MIB))?;
    }
    // It is asked for one of them, and has not heard of it.
    dimms::resize(&api, 1)?;
    guest.vm().pause()?;
    let before = api.get("vm.info")?;
    let directory = kept.path().join("snapshot");
    snapshot(&api, &directory)?;
    crash(guest);

    let mut guest = restore(context, &directory)?;
    let api = guest.vm().api()?.clone();
    let after = api.get("vm.info")?;
    ensure!(
        before["memory"] == after["memory"],
        "{} and then {}",
        before["memory"],
        after["memory"]
    );
    for base in [first, second] {
        guest.ask(&format!("mem verify {base:#x} {:#x} {base}", 4 * MIB))?;
    }
    guest.ask("dimm serve 1 5000")?;
    dimms::done(&api, "the guest gave back 128 MiB")?;
    dimms::resize(&api, 3)?;
    guest.ask("dimm serve 1 5000")?;
    dimms::done(&api, "the guest took 256 MiB")?;
    guest.ask(&format!("mem verify {first:#x} {:#x} {first}", 4 * MIB))?;
    guest.power_off()?;
    // It is there only in the room that the configuration has.
    let (vm, api) = another(context)?;
    edit(&directory, |config| {
        config["memory"]["hotplug_size"] = json!(0);
        config["serial"]["socket"] = json!(vm.dir().join(SERIAL));
    })?;
    api.refused("vm.restore", &url("source_url", &directory), 400, &["memory"])?;
    Ok(Outcome::Passed)
}

fn shared_memory_is_saved(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let vm = builder(context)?.set("--memory", "size=512M,shared=on");
    let mut guest = Guest::start(vm.api())?;
    let ram = super::guest::test_ram();
    guest.ask(&format!("mem fill {ram} {MIB} 5"))?;
    guest.vm().pause()?;
    let directory = kept.path().join("snapshot");
    snapshot(guest.vm().api()?, &directory)?;
    let memory = fs::metadata(directory.join("memory-ranges"))?;
    ensure!(memory.len() == 512 * MIB, "{} bytes", memory.len());
    let held = memory.blocks() * 512;
    ensure!(held < 16 * MIB, "{held} bytes for what the guest has never used");
    crash(guest);
    let mut guest = restore(context, &directory)?;
    guest.ask(&format!("mem verify {ram} {MIB} 5"))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn mapped_memory_is_copied_when_it_is_written(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let vm = builder(context)?.flag("--balloon", "size=0");
    let vm = vm.set("--memory", "size=64M,hotplug_method=virtio-mem,hotplug_size=128M");
    let mut guest = Guest::start(vm.api())?;
    let ram = super::guest::test_ram();
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    grow(&mut guest, room)?;
    guest.ask(&format!("mem fill {ram} {} 5", 8 * MIB))?;
    guest.vm().pause()?;
    let directory = kept.path().join("snapshot");
    snapshot(guest.vm().api()?, &directory)?;
    crash(guest);
    let file = directory.join("memory-ranges");
    let before = fs::read(&file)?;
    // Twice: the first guest leaves the file as it was.
    for _ in 0..2 {
        let mode = json!({ "memory_restore_mode": "Mapped" });
        let mut guest = restore_with(context, &directory, mode)?;
        guest.ask(&format!("mem verify {ram} {} 5", 8 * MIB))?;
        guest.ask(&format!("mem verify {room} {} 3", 16 * MIB))?;
        guest.ask(&format!("mem fill {ram} {} 6", 8 * MIB))?;
        // What it gives back and takes again is not what the file has.
        guest.ask(&format!("vmem 0 reach {}", 2 * MIB))?;
        guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
        let mut zeroes = vec![0; 2 * MIB as usize];
        let fresh = crc32(&zeroes);
        let found = number(
            &guest.ask(&format!("mem checksum {} {}", room + 14 * MIB, 2 * MIB))?,
            "crc32",
        )?;
        ensure!(found == u64::from(fresh), "{found:#x}, not {fresh:#x}");
        zeroes.clear();
        guest.ask(&format!("mem verify {ram} {} 6", 8 * MIB))?;
        guest.ask(&format!("mem verify {room} {} 3", 2 * MIB))?;
        guest.power_off()?;
        ensure!(fs::read(&file)? == before, "a guest changed the file");
    }
    // With memory that is shared there is no such thing.
    edit(&directory, |config| config["memory"]["shared"] = json!(true))?;
    let (_vm, api) = another(context)?;
    let mapped = json!({ "source_url": url("source_url", &directory)["source_url"], "memory_restore_mode": "Mapped" });
    api.refused("vm.restore", &mapped, 400, &["Mapped", "not shared", "use Copy"])?;
    Ok(Outcome::Passed)
}

fn only_a_paused_guest_is_saved(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?;
    let directory = kept.path().join("snapshot");
    let to = url("destination_url", &directory);
    api.refused("vm.snapshot", &to, 409, &["Running", "Paused"])?;
    api.refused("vm.restore", &url("source_url", &directory), 409, &["vm.delete"])?;
    guest.vm().pause()?;
    let nowhere = json!({ "destination_url": "tcp:1.2.3.4:5" });
    api.refused("vm.snapshot", &nowhere, 400, &["destination_url", "file://"])?;
    let file = kept.path().join("file");
    fs::write(&file, "mine")?;
    api.refused("vm.snapshot", &url("destination_url", &file), 400, &["file"])?;
    api.refused(
        "vm.snapshot",
        &url("destination_url", &file.join("below")),
        400,
        &["below"],
    )?;
    snapshot(api, &directory)?;
    api.refused(
        "vm.snapshot",
        &to,
        400,
        &["already holds a snapshot", "another directory"],
    )?;
    // All of that harmed neither the snapshot nor the guest.
    guest.vm().resume()?;
    crash(guest);
    restore(context, &directory)?.power_off()?;
    Ok(Outcome::Passed)
}

/// A snapshot of a small guest.
pub(super) fn small(context: &Context, kept: &Path) -> Result<PathBuf> {
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.ask(&format!("mem fill {} {MIB} 5", super::guest::test_ram()))?;
    guest.vm().pause()?;
    let directory = kept.join("snapshot");
    snapshot(guest.vm().api()?, &directory)?;
    edit(&directory, |config| {
        config["serial"]["socket"] = json!(kept.join(SERIAL));
    })?;
    Ok(directory)
}

fn what_is_damaged_is_refused(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let (_vm, api) = another(context)?;
    let from = url("source_url", &directory);
    let wrong = |name: &str, change: &dyn Fn(&mut Vec<u8>), words: &[&str]| -> Result<()> {
        let path = directory.join(name);
        let good = fs::read(&path)?;
        let mut bad = good.clone();
        change(&mut bad);
        fs::write(&path, bad)?;
        api.refused("vm.restore", &from, 400, words)?;
        // A file that is not there either.
        fs::remove_file(&path)?;
        api.refused("vm.restore", &from, 400, &[&directory.display().to_string()])?;
        Ok(fs::write(&path, good)?)
    };
    // In what the guest filled.
    wrong(
        "memory-ranges",
        &|bytes| bytes[(16 << 20) + 5] ^= 1,
        &["memory", "damaged"],
    )?;
    wrong(
        "memory-ranges",
        &|bytes| bytes.truncate(bytes.len() - 1),
        &["cut short"],
    )?;
    wrong("state.json", &|bytes| flip_last(bytes), &["damaged"])?;
    wrong("state.json", &|bytes| bytes.truncate(100), &["damaged"])?;
    wrong("state.json", &Vec::clear, &["not that of a snapshot"])?;
    wrong("config.json", &Vec::clear, &["config.json"])?;
    resign(&directory, |text| {
        text.replace("\"version\":1,\"vmm\"", "\"version\":7,\"vmm\"")
    })?;
    api.refused("vm.restore", &from, 400, &["format 7", "reads formats up to 2"])?;
    resign(&directory, |text| {
        text.replace("\"version\":7,\"vmm\"", "\"version\":1,\"vmm\"")
    })?;
    let (here, other) = match super::guest::is_arm() {
        true => ("\"arch\":\"aarch64\"", "x86_64"),
        false => ("\"arch\":\"x86_64\"", "aarch64"),
    };
    let foreign = format!("\"arch\":\"{other}\"");
    resign(&directory, |text| text.replace(here, &foreign))?;
    api.refused("vm.restore", &from, 400, &["guest on", other])?;
    resign(&directory, |text| text.replace(&foreign, here))?;
    // After all of that there is no VM, and this process takes the good one.
    ensure!(api.request("GET", "vm.info", None)?.status == 404);
    api.put("vm.restore", Some(&from.to_string()))?;
    Ok(Outcome::Passed)
}

/// Flips a bit of the last byte that is not zero.
fn flip_last(bytes: &mut [u8]) {
    if let Some(byte) = bytes.iter_mut().rev().find(|byte| **byte != 0) {
        *byte ^= 1;
    }
}

/// Changes `state.json` as somebody does who knows of its checksum.
pub(super) fn resign(directory: &Path, change: impl FnOnce(&str) -> String) -> Result<()> {
    let path = directory.join("state.json");
    let text = fs::read_to_string(&path)?;
    let (head, body) = text.split_once('\n').context("one line")?;
    let changed = change(body);
    ensure!(changed != body, "nothing changed");
    let at = head.find("checksum\":\"").context("no checksum")? + "checksum\":\"".len();
    let checksum = crc32(changed.as_bytes());
    let text = format!("{}{checksum:08x}{}\n{changed}", &head[..at], &head[at + 8..]);
    Ok(fs::write(path, text)?)
}

fn what_does_not_fit_is_refused(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let (_vm, api) = another(context)?;
    let from = url("source_url", &directory);
    let config = fs::read(directory.join("config.json"))?;
    let with = |change: &dyn Fn(&mut Value), words: &[&str]| -> Result<()> {
        edit(&directory, change)?;
        api.refused("vm.restore", &from, 400, words)?;
        Ok(fs::write(directory.join("config.json"), &config)?)
    };
    let disk = DiskImage::empty(kept.path().join("disk"), MIB)?;
    with(
        &|config| config["memory"]["size"] = json!(128 * MIB),
        &["64 MiB", "128 MiB"],
    )?;
    with(
        &|config| config["disks"] = json!([{ "path": disk.path(), "id": "new" }]),
        &["no saved state", "new"],
    )?;
    with(&|config| config["serial"] = json!({ "mode": "Off" }), &["serial port"])?;
    with(&|config| config["console"] = json!({ "mode": "Null" }), &["_console"])?;
    with(&|config| config["payload"] = json!(7), &["config.json", "payload"])?;
    let two = json!({ "source_url": from["source_url"], "net_fds": [{ "id": "net0", "num_fds": 1 }] });
    api.refused("vm.restore", &two, 400, &["0 descriptors", "1"])?;
    api.refused("vm.restore", &url("source_url", kept.path()), 400, &["no snapshot"])?;
    // It goes on at once when it should.
    let at_once = json!({ "source_url": from["source_url"], "resume": true });
    api.put("vm.restore", Some(&at_once.to_string()))?;
    ensure!(api.get("vm.info")?["state"] == "Running");
    Ok(Outcome::Passed)
}

fn a_link_is_not_followed(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let guest = Guest::start(builder(context)?.api())?;
    guest.vm().pause()?;
    let api = guest.vm().api()?;
    // Somebody wants the guest's memory elsewhere.
    let (directory, elsewhere) = (kept.path().join("snapshot"), kept.path().join("elsewhere"));
    fs::write(&elsewhere, "mine")?;
    fs::create_dir(&directory)?;
    let link = directory.join("memory-ranges");
    std::os::unix::fs::symlink(&elsewhere, &link)?;
    let target = url("destination_url", &directory);
    api.refused("vm.snapshot", &target, 400, &["memory-ranges", "symbolic links"])?;
    let left: Vec<_> = fs::read_dir(&directory)?.collect::<Result<_, _>>()?;
    ensure!(left.len() == 1 && left[0].path() == link, "{left:?}");
    ensure!(fs::read_to_string(&elsewhere)? == "mine", "it was written to");
    fs::remove_file(&link)?;
    api.ended("vm.snapshot", Duration::from_secs(1))?;
    snapshot(api, &directory)?;
    guest.vm().resume()?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
