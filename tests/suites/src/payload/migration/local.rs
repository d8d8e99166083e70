//! Memory is handed over to another VMM on the same host: nothing of it is copied.

use super::super::data::crc32;
use super::super::dimms;
use super::super::guest::{Guest, builder, number, test_ram};
use super::super::payload_tests;
use super::super::snapshot::same_machine;
use super::{MIB, Waiting, begin, joined, lay, moved, progress, send, to, with_disk};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, figure, patient};

payload_tests!("migration::local":
    memory_is_handed_over,
    what_came_while_it_ran_is_handed_over,
    memory_devices_are_handed_over,
    zones_are_handed_over_and_one_that_is_private_is_named,
    a_paused_guest_arrives_paused,
    what_cannot_be_handed_over_is_refused,
    a_destination_that_fails_changes_nothing,
    it_is_asked_for_before,
);

/// All tests: some move a guest again and again.
pub(super) const ALL: [Test; 8] = {
    let mut all = [TESTS[0]; 8];
    let mut at = 0;
    while at < all.len() {
        all[at] = TESTS[at].within(Duration::from_secs(120));
        at += 1;
    }
    all
};

/// What asks for that.
pub(super) fn local() -> Value {
    json!({ "local": true })
}

/// Files of guest memory that the process has, by their numbers: bytes that they take of the host.
fn files(pid: u32) -> Result<BTreeMap<u64, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let is_ram = |target: &Path| target.to_string_lossy().starts_with("/memfd:guest-ram");
        // Some are closed meanwhile.
        if fs::read_link(&path).is_ok_and(|target| is_ram(&target))
            && let Ok(file) = fs::metadata(&path)
            && file.len() > 4096
        {
            found.insert(file.ino(), file.blocks() * 512);
        }
    }
    ensure!(!found.is_empty(), "it has no memory files");
    Ok(found)
}

/// Moves the guest, and makes sure that its memory is the same, and takes no more.
fn handed(context: &Context, guest: Guest, receive: &Value) -> Result<Guest> {
    let before = files(guest.vm().pid())?;
    let waiting = Waiting::start(context, "unix", receive)?;
    send(&guest, &waiting, &local())?;
    let last = progress(guest.vm().api()?)?;
    let figures = |name: &str| last[name].as_u64().unwrap_or(u64::MAX);
    ensure!(last["phase"] == "done" && figures("downtime_ms") < u64::MAX, "{last}");
    ensure!(
        figures("pages") == 0 && figures("wire_bytes") < 64 << 10,
        "memory was sent: {last}"
    );
    figure(&format!(
        "migration::local: stood still for {} ms",
        figures("downtime_ms")
    ))?;
    let arrived = waiting.guest(guest)?;
    let after = files(arrived.vm().pid())?;
    // Room in which nothing is has another file there.
    for (file, bytes) in before.into_iter().filter(|(_, bytes)| *bytes > 0) {
        let now = *after.get(&file).context("another file than before")?;
        // What the guest does meanwhile takes some.
        ensure!(now <= bytes + MIB, "{now} bytes where {bytes} were: holes were filled");
    }
    Ok(arrived)
}

fn memory_is_handed_over(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, _) = with_disk(context, kept.path())?;
    let mut guest = Guest::start(
        vm.cpus(2)
            .set("--memory", "size=512M,shared=on")
            .flag("--balloon", "size=0"),
    )?;
    guest.ask("cpus")?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 64 * MIB))?;
    guest.ask("blk 0 write 20000 64 7")?;
    for round in 0..5 {
        // It is moved in the middle of its work.
        guest.send(&format!("blk 0 soak 2000 16 {round} 2000"))?;
        guest = handed(context, guest, &json!({})).with_context(|| format!("round {round}"))?;
        let answer = guest.answer()?;
        ensure!(number(&answer, "requests")? >= 2000, "{answer}");
        guest.ask(&format!("mem verify {ram} {} 5", 64 * MIB))?;
        guest.ask("blk 0 verify 20000 64 7")?;
        ensure!(number(&guest.ask("ipi 20")?, "sent")? == 20);
        guest.ask("sleep 5")?;
    }
    // Copied again, which needs a log of all that is written.
    let kept = ram + 300 * MIB;
    guest.ask(&format!("mem fill {kept} {MIB} 3"))?;
    guest.send("dirty 2048 10000 0")?;
    let mut guest = moved(context, guest, "unix", &json!({}), &json!({}))?;
    guest.send("")?;
    guest.answer()?;
    guest.ask(&format!("mem verify {kept} {MIB} 3"))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_came_while_it_ran_is_handed_over(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let vm = builder(context)?.set("--cpus", "boot=1,max=3").set(
        "--memory",
        "size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=1G",
    );
    let mut guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    api.put("vm.resize", Some(&json!({ "desired_vcpus": 2 }).to_string()))?;
    guest.ask("hot serve 1 2000")?;
    // Before anything came there.
    guest = handed(context, guest, &json!({}))?;
    let api = guest.vm().api()?.clone();
    let more = json!({ "desired_ram": 80 * MIB, "desired_vcpus": 2 });
    api.put("vm.resize", Some(&more.to_string()))?;
    guest.ask(&format!("vmem 0 wait {} 2000", 16 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
    guest.ask(&format!("mem fill {room} {} 3", 16 * MIB))?;
    // What it gives back is a hole, there too.
    guest.ask(&format!("vmem 0 reach {}", 4 * MIB))?;
    let disk = DiskImage::empty(kept.path().join("disk"), super::SECTORS * 512)?;
    let late = json!({ "path": disk.path(), "id": "late" });
    api.put("vm.add-disk", Some(&late.to_string()))?;
    guest.ask("slots serve 1 2000")?;
    guest.ask("blk 0 write 0 64 4")?;
    let before = api.get("vm.info")?;
    for _ in 0..2 {
        guest = handed(context, guest, &json!({}))?;
        let after = guest.vm().api()?.get("vm.info")?;
        same_machine(&before, &after)?;
        guest.ask(&format!("mem verify {room} {} 3", 4 * MIB))?;
        guest.ask("blk 0 verify 0 64 4")?;
        guest.ask("hot ping 1")?;
    }
    // It goes on growing, in memory that is empty.
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
    let sum = guest.ask(&format!("mem checksum {} {}", room + 4 * MIB, 12 * MIB))?;
    let zeroes = crc32(&vec![0; 12 * MIB as usize]);
    ensure!(number(&sum, "crc32")? == u64::from(zeroes), "{sum}, not {zeroes:#x}");
    guest.ask(&format!("mem verify {room} {} 3", 4 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn memory_devices_are_handed_over(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = dimms::start(context, ",shared=on")?;
    for blocks in [1, 3] {
        dimms::resize(&api, blocks)?;
        guest.ask("dimm serve 1 5000")?;
    }
    let (base, end) = (dimms::room(), dimms::room() + 3 * dimms::BLOCK);
    guest.ask(&format!("mem fill {base:#x} {MIB:#x} 4"))?;
    guest.ask(&format!("mem fill {:#x} {MIB:#x} 6", end - MIB))?;
    for _ in 0..2 {
        guest = handed(context, guest, &json!({}))?;
        guest.ask(&format!("mem verify {base:#x} {MIB:#x} 4"))?;
        guest.ask(&format!("mem verify {:#x} {MIB:#x} 6", end - MIB))?;
    }
    dimms::resize(guest.vm().api()?, 4)?;
    guest.ask("dimm serve 1 5000")?;
    dimms::works(&mut guest, end, MIB)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn zones_are_handed_over_and_one_that_is_private_is_named(context: &Context) -> Result<Outcome> {
    let zoned = |second: &str| -> Result<Guest> {
        let vm = builder(context)?.set("--memory", "size=0,hotplug_method=virtio-mem");
        let vm = vm.flag("--memory-zone", "id=a,size=24M,shared=on,hotplug_size=256M");
        Guest::start(vm.flag("--memory-zone", format!("id=b,size=40M,{second}")).api())
    };
    let mut guest = zoned("shared=on")?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 24 * MIB))?;
    let mut guest = handed(context, guest, &json!({}))?;
    guest.ask(&format!("mem verify {ram} {} 5", 24 * MIB))?;
    guest.power_off()?;
    let mut guest = zoned("shared=off")?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let api = guest.vm().api()?.clone();
    let words = ["memory zone 'b' is private", "shared=on", "leave local out"];
    api.refused("vm.send-migration", &to(&waiting.address, &local()), 400, &words)?;
    send(&guest, &waiting, &json!({}))?;
    guest = waiting.guest(guest)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn shared(context: &Context) -> Result<Guest> {
    let mut guest = Guest::start(builder(context)?.set("--memory", "size=64M,shared=on").api())?;
    guest.ask(&format!("mem fill {} {MIB} 5", test_ram()))?;
    Ok(guest)
}

fn a_paused_guest_arrives_paused(context: &Context) -> Result<Outcome> {
    let guest = shared(context)?;
    guest.vm().pause()?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    send(&guest, &waiting, &local())?;
    let mut guest = waiting.guest(guest)?;
    let state = guest.vm().api()?.get("vm.info")?["state"].clone();
    ensure!(state == "Paused", "{state}");
    guest.vm().resume()?;
    guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_cannot_be_handed_over_is_refused(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let api = guest.vm().api()?.clone();
    let words = ["the guest's memory is private", "shared=on"];
    api.refused("vm.send-migration", &to(&waiting.address, &local()), 400, &words)?;
    for (route, more) in [
        ("vm.send-migration", json!({ "post_copy": true })),
        ("vm.send-migration", json!({ "timeout_strategy": "PostCopy" })),
        ("vm.check-migration", json!({ "post_copy": true })),
    ] {
        let mut body = to(&waiting.address, &local());
        lay(&mut body, &more);
        api.refused(route, &body, 400, &["leave post_copy out, or local"])?;
    }
    guest.ask("hello")?;
    guest.power_off()?;
    let mut guest = shared(context)?;
    let api = guest.vm().api()?.clone();
    for network in ["tcp-plain:127.0.0.1:1", "tcp:127.0.0.1:1"] {
        api.refused("vm.send-migration", &to(network, &local()), 400, &["unix:/path"])?;
    }
    // A destination whose guest would be another one.
    let other = json!({ "config": { "memory": { "shared": false } } });
    let waiting = Waiting::start(context, "unix", &other)?;
    let error = joined(begin(&guest, &waiting.address, &local())?)
        .err()
        .context("it was moved")?;
    let error = format!("{error:#}");
    ensure!(error.contains("shared") && error.contains("runs here"), "{error}");
    waiting.failed()?;
    let larger = json!({ "config": { "memory": { "size": 128 * MIB } } });
    let waiting = Waiting::start(context, "unix", &larger)?;
    let error = joined(begin(&guest, &waiting.address, &local())?)
        .err()
        .context("it was moved")?;
    let error = format!("{error:#}");
    ensure!(
        error.contains("bytes where the guest has") && error.contains("runs here"),
        "{error}"
    );
    waiting.failed()?;
    guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
    let mut guest = handed(context, guest, &json!({}))?;
    guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The destination has restored the guest in the memory with which it goes on here.
fn a_destination_that_fails_changes_nothing(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, disk) = with_disk(context, kept.path())?;
    let mut guest = Guest::start(vm.cpus(2).set("--memory", "size=64M,shared=on"))?;
    guest.ask("cpus")?;
    let other = kept.path().join("other");
    fs::copy(&disk, &other)?;
    let holder = Guest::start(builder(context)?.disk(&other, ""))?;
    for round in 0..5 {
        guest.ask(&format!("mem fill {} {} {round}", test_ram(), 32 * MIB))?;
        // A disk that somebody has: it is found out when all is restored, and the guest was given away.
        let receive = json!({ "config": { "disks": [{ "id": "_disk0", "path": other }] } });
        let waiting = Waiting::start(context, "unix", &receive)?;
        guest.send(&format!("blk 0 soak 500 16 {round} 2000"))?;
        let error = joined(begin(&guest, &waiting.address, &local())?)
            .err()
            .context("it was moved")?;
        let error = format!("{error:#}");
        ensure!(error.contains("holds a lock") && error.contains("runs here"), "{error}");
        waiting.failed()?;
        guest.answer()?;
        guest.ask(&format!("mem verify {} {} {round}", test_ram(), 32 * MIB))?;
        ensure!(number(&guest.ask("ipi 20")?, "sent")? == 20);
    }
    holder.power_off()?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn it_is_asked_for_before(context: &Context) -> Result<Outcome> {
    let mut guest = shared(context)?;
    let api = guest.vm().api()?.within(patient(Duration::from_secs(60)));
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let ask = |address: &str| -> Result<Value> {
        let answer = api.put("vm.check-migration", Some(&to(address, &local()).to_string()))?;
        Ok(serde_json::from_str::<Value>(&answer)?["blockers"].clone())
    };
    for _ in 0..3 {
        let found = ask(&waiting.address)?;
        ensure!(found == json!([]), "{found}");
    }
    send(&guest, &waiting, &local())?;
    guest = waiting.guest(guest)?;
    guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
    guest.power_off()?;
    // Both sides are looked at.
    let guest = Guest::start(builder(context)?.api())?;
    let waiting = Waiting::start(
        context,
        "unix",
        &json!({ "config": { "serial": { "socket": "/nowhere/serial" } } }),
    )?;
    let body = to(&waiting.address, &local()).to_string();
    let answer = guest.vm().api()?.put("vm.check-migration", Some(&body))?;
    for words in ["private", "shared=on", "/nowhere"] {
        ensure!(answer.contains(words), "{answer}");
    }
    let mut guest = guest;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
