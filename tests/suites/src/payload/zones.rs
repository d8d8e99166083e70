//! Memory in zones: where they lie, what the guest is told of them, how each grows and shrinks by itself, and what else has them.

use super::balloon::wait;
use super::guest::{Guest, builder, is_arm, number, ram_start, test_ram};
use super::payload_tests;
use super::snapshot;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::VmBuilder;

payload_tests!("zones":
    lie_one_behind_the_other,
    go_around_the_hole,
    and_nodes_are_told_to_the_guest,
    are_resized_side_by_side,
    what_cannot_be_is_refused,
    come_back_after_a_reset,
    are_reached_by_disks_and_daemons,
    go_on_from_a_snapshot,
);

const MIB: u64 = 1 << 20;
/// Bytes of the first and of the second zone.
const FIRST: u64 = 24 * MIB;
const SECOND: u64 = 40 * MIB;
/// Where the room behind RAM begins: at the first multiple of 2 GiB behind where high RAM would begin.
const ROOM: u64 = 2 << 30;

/// A guest of 64 MiB in two zones, `a` and `b`, which may have more keys.
fn zoned(context: &Context, a: &str, b: &str) -> Result<VmBuilder> {
    Ok(with_zones(builder(context)?, a, b))
}

fn with_zones(vm: VmBuilder, a: &str, b: &str) -> VmBuilder {
    vm.set("--memory", "size=0,hotplug_method=virtio-mem")
        .flag("--memory-zone", format!("id=a,size=24M{a}"))
        .flag("--memory-zone", format!("id=b,size=40M{b}"))
}

/// Where the rooms of both zones begin.
fn rooms(guest: &mut Guest) -> Result<[u64; 2]> {
    let first = number(&guest.ask("vmem 0 info")?, "addr")?;
    let second = number(&guest.ask("vmem 1 info")?, "addr")?;
    Ok([first, second])
}

/// The guest was told of so much RAM, less what tables take of it.
fn has_ram(guest: &mut Guest, bytes: u64) -> Result<()> {
    let told = number(&guest.ask("hello")?, "ram")?;
    ensure!((bytes - 4 * MIB..=bytes).contains(&told), "{told} bytes of {bytes}");
    Ok(())
}

fn resize(api: &Api, zone: &str, bytes: u64) -> Result<()> {
    let target = json!({ "id": zone, "desired_ram": bytes }).to_string();
    api.put("vm.resize-zone", Some(&target)).map(drop)
}

/// `memory_zones` of `vm.info`: target and actual bytes of each zone, and what all have.
fn counts(api: &Api) -> Result<(Vec<(u64, u64)>, u64)> {
    let info = api.get("vm.info")?;
    let zones = info["memory_zones"].as_array().context("no zones")?;
    let count = |zone: &Value, of: &str| zone[of].as_u64().with_context(|| format!("no {of} in {zone}"));
    let zones: Result<Vec<_>> = zones
        .iter()
        .map(|zone| Ok((count(zone, "target")?, count(zone, "actual")?)))
        .collect();
    let all = info["memory_actual_size"].as_u64().context("no size")?;
    Ok((zones?, all))
}

/// Waits until the zones have these target and actual bytes.
fn reach(api: &Api, wanted: [(u64, u64); 2]) -> Result<()> {
    wait(&format!("the zones do not get to {wanted:?}"), || {
        Ok((counts(api)?.0 == wanted).then_some(()))
    })
}

fn metric(api: &Api, zone: &str, of: &str) -> Result<u64> {
    let name = format!(r#"triarch_memory_zone_bytes{{zone="{zone}",of="{of}"}}"#);
    api.metric(&name)?.with_context(|| format!("no metric {name}"))
}

fn fill(guest: &mut Guest, at: u64, len: u64, seed: u64) -> Result<()> {
    guest.ask(&format!("mem fill {at:#x} {len:#x} {seed}")).map(drop)
}

fn verify(guest: &mut Guest, at: u64, len: u64, seed: u64) -> Result<()> {
    guest.ask(&format!("mem verify {at:#x} {len:#x} {seed}")).map(drop)
}

fn lie_one_behind_the_other(context: &Context) -> Result<Outcome> {
    for (a, b) in [
        ("", ""),
        (",shared=on", ""),
        (",prefault=on", ",shared=on"),
        (",host_numa_node=0", ",mergeable=on"),
    ] {
        if a.contains("numa") && !std::path::Path::new("/sys/devices/system/node/has_memory").exists() {
            continue;
        }
        let mut guest = Guest::start(zoned(context, a, b)?.api())?;
        let api = guest.vm().api()?.clone();
        has_ram(&mut guest, FIRST + SECOND)?;
        // Over the border of both.
        let (start, border) = (test_ram(), ram_start() + FIRST);
        let len = 2 * (border - start);
        fill(&mut guest, start, len, 3)?;
        verify(&mut guest, start, len, 3).with_context(|| format!("{a} {b}"))?;
        ensure!(counts(&api)? == (vec![(FIRST, FIRST), (SECOND, SECOND)], FIRST + SECOND));
        ensure!(metric(&api, "a", "actual")? == FIRST && metric(&api, "b", "target")? == SECOND);
        let size = api.metric("triarch_memory_size_bytes")?;
        ensure!(size == Some(FIRST + SECOND), "{size:?}");
        let resident = api
            .metric("triarch_memory_resident_bytes")?
            .context("no resident memory")?;
        ensure!(
            resident >= len,
            "{resident} bytes of {len} are resident with '{a}' '{b}'"
        );
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn go_around_the_hole(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?
        .set("--memory", "size=0")
        .flag("--memory-zone", "id=low,size=2G");
    let mut guest = Guest::start(vm.flag("--memory-zone", "id=high,size=1536M,shared=on"))?;
    has_ram(&mut guest, 3584 * MIB)?;
    let last = match is_arm() {
        true => ram_start() + 3584 * MIB,
        false => (4096 + 512) * MIB,
    };
    // Each end of each piece.
    let border = ram_start() + 2048 * MIB;
    let mut places = vec![border - 0x4000, border, last - 0x4000];
    if !is_arm() {
        places.extend([3072 * MIB - 0x4000, 4096 * MIB]);
    }
    for (seed, at) in (0..).zip(&places) {
        fill(&mut guest, *at, 0x4000, seed)?;
    }
    for (seed, at) in (0..).zip(&places) {
        verify(&mut guest, *at, 0x4000, seed)?;
    }
    Ok(Outcome::Passed)
}

fn and_nodes_are_told_to_the_guest(context: &Context) -> Result<Outcome> {
    let vm = zoned(context, ",hotplug_size=128M", ",hotplug_size=256M")?
        .set("--cpus", "boot=2,max=3")
        .flag("--numa", "guest_numa_id=1,cpus=[1-2],memory_zones=[b],distances=[0@31]")
        .flag("--numa", "guest_numa_id=0,cpus=[0],memory_zones=[a]");
    let mut guest = Guest::start(vm)?;
    let told = guest.ask("numa")?;
    let [a, b] = rooms(&mut guest)?;
    ensure!(a.is_multiple_of(ROOM) && b == a + ROOM, "{a:#x} {b:#x}");
    // Processors that come later are among them.
    let start = ram_start();
    let expected = format!(
        "cpu0@0 cpu1@1 cpu2@1 {start:#x}+{FIRST:#x}@0 !{a:#x}+{:#x}@0 {:#x}+{SECOND:#x}@1 !{b:#x}+{:#x}@1 10,31, 31,10,",
        128 * MIB,
        start + FIRST,
        256 * MIB
    );
    ensure!(told == expected, "{told}");
    guest.power_off()?;
    // One piece of memory is the first node's, and without nodes nothing is told.
    let numa = |node: &str| builder(context).map(|vm| vm.set("--cpus", "boot=2").flag("--numa", node));
    let vm = numa("guest_numa_id=0,cpus=[0]")?.flag("--numa", "guest_numa_id=1,cpus=[1]");
    let told = Guest::start(vm)?.ask("numa")?;
    let expected = format!("cpu0@0 cpu1@1 {start:#x}+{:#x}@0 10,20, 20,10,", 64 * MIB);
    ensure!(told == expected, "{told}");
    let told = Guest::start(zoned(context, "", "")?)?.ask("numa")?;
    ensure!(told == "no distances", "{told}");
    Ok(Outcome::Passed)
}

fn are_resized_side_by_side(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(zoned(context, ",hotplug_size=256M", ",hotplug_size=256M,shared=on")?.api())?;
    let api = guest.vm().api()?.clone();
    let [a, b] = rooms(&mut guest)?;
    let jobs = |api: &Api| Ok::<_, anyhow::Error>(api.get("vm.jobs")?.as_array().map_or(0, Vec::len));
    let before = jobs(&api)?;
    resize(&api, "a", FIRST)?;
    ensure!(jobs(&api)? == before, "a target that is reached needs no job");
    resize(&api, "a", FIRST + 16 * MIB)?;
    resize(&api, "b", SECOND + 144 * MIB)?;
    resize(&api, "b", SECOND + 144 * MIB)?;
    ensure!(jobs(&api)? == before + 2, "a job for each");
    guest.ask(&format!("vmem 1 wait {} 5000", 144 * MIB))?;
    guest.ask(&format!("vmem 1 reach {}", 144 * MIB))?;
    let id = api
        .get("vm.jobs")?
        .as_array()
        .and_then(|jobs| jobs.last().cloned())
        .context("no job")?["id"]
        .clone();
    let job = wait("the job does not end", || {
        let job = api.get(&format!("vm.job/{id}"))?;
        Ok((job["state"] != "running").then_some(job))
    })?;
    ensure!(
        job["kind"] == "vm.resize-zone" && job["state"] == "done" && job["phase"] == "the guest has 144 MiB plugged",
        "{job}"
    );
    reach(
        &api,
        [(FIRST + 16 * MIB, FIRST), (SECOND + 144 * MIB, SECOND + 144 * MIB)],
    )?;
    ensure!(counts(&api)?.1 == FIRST + SECOND + 144 * MIB);
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
    fill(&mut guest, a, 16 * MIB, 1)?;
    fill(&mut guest, b + 112 * MIB, 32 * MIB, 2)?;
    verify(&mut guest, a, 16 * MIB, 1)?;
    let config = api.get("vm.info")?["config"]["memory"].clone();
    ensure!(
        config["size"] == 0 && config["zones"][0]["hotplugged_size"] == 16 * MIB,
        "{config}"
    );
    // A newer target replaces one, of this zone only.
    resize(&api, "b", SECOND + 4 * MIB)?;
    resize(&api, "a", FIRST + 32 * MIB)?;
    resize(&api, "b", SECOND)?;
    let all = api.get("vm.jobs")?;
    let replaced = all.as_array().into_iter().flatten();
    let replaced: Vec<_> = replaced
        .filter(|job| {
            job["error"]
                .as_str()
                .is_some_and(|error| error.contains("replaced by a target of 0 bytes"))
        })
        .collect();
    ensure!(replaced.len() == 1, "{all}");
    guest.ask("vmem 1 reach 0")?;
    guest.ask(&format!("vmem 0 reach {}", 32 * MIB))?;
    reach(&api, [(FIRST + 32 * MIB, FIRST + 32 * MIB), (SECOND, SECOND)])?;
    ensure!(metric(&api, "a", "actual")? == FIRST + 32 * MIB && metric(&api, "b", "actual")? == SECOND);
    verify(&mut guest, a, 16 * MIB, 1)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_cannot_be_is_refused(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(zoned(context, ",hotplug_size=128M", "")?.api())?;
    let api = guest.vm().api()?.clone();
    let before = api.get("vm.info")?["config"].clone();
    for (route, body, status, words) in [
        (
            "vm.resize-zone",
            json!({ "id": "c", "desired_ram": FIRST }),
            404,
            "no memory zone 'c'",
        ),
        (
            "vm.resize-zone",
            json!({ "id": "a", "desired_ram": FIRST - MIB }),
            400,
            "keeps the 25165824 bytes",
        ),
        (
            "vm.resize-zone",
            json!({ "id": "a", "desired_ram": FIRST + MIB }),
            400,
            "steps of 2097152",
        ),
        (
            "vm.resize-zone",
            json!({ "id": "a", "desired_ram": FIRST + 130 * MIB }),
            400,
            "up to 134217728 more",
        ),
        (
            "vm.resize-zone",
            json!({ "id": "b", "desired_ram": SECOND + 2 * MIB }),
            400,
            "no hotplug_size",
        ),
        ("vm.resize-zone", json!({ "id": "a" }), 400, "desired_ram"),
        ("vm.resize", json!({ "desired_ram": 128 * MIB }), 400, "vm.resize-zone"),
    ] {
        let answer = api.request("PUT", route, Some(&body.to_string()))?;
        ensure!(
            answer.status == status && answer.body.contains(words),
            "{body}: {} {}",
            answer.status,
            answer.body
        );
    }
    ensure!(api.get("vm.info")?["config"] == before, "a refusal changed something");
    resize(&api, "b", SECOND)?;
    // Between two guests it is the size of the next.
    api.put("vm.shutdown", None)?;
    resize(&api, "b", SECOND + 8 * MIB)?;
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    has_ram(&mut guest, FIRST + SECOND + 8 * MIB)?;
    guest.power_off()?;
    // What the host does not have is told by the name of the zone.
    let end = zoned(context, "", ",host_numa_node=777")?.start()?.expect_end(1)?;
    ensure!(
        end.stderr
            .contains("the memory zone 'b' cannot be made: the host has no memory in NUMA node 777"),
        "{}",
        end.stderr
    );
    Ok(Outcome::Passed)
}

fn come_back_after_a_reset(context: &Context) -> Result<Outcome> {
    let vm = zoned(context, ",hotplug_size=128M", ",hotplug_size=128M,hotplugged_size=8M")?;
    let mut guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    for by_guest in [true, false] {
        guest.ask(&format!("vmem 1 wait {} 5000", 8 * MIB))?;
        guest.ask(&format!("vmem 1 reach {}", 8 * MIB))?;
        let [_, b] = rooms(&mut guest)?;
        fill(&mut guest, b, 8 * MIB, 5)?;
        reach(&api, [(FIRST, FIRST), (SECOND + 8 * MIB, SECOND + 8 * MIB)])?;
        match by_guest {
            true => guest.send("pm reset")?,
            false => api.put("vm.reboot", None).map(drop)?,
        }
        guest.wait_ready()?;
        // A guest may be faster than what tells of it.
        reach(&api, [(FIRST, FIRST), (SECOND + 8 * MIB, SECOND)])?;
        let all = counts(&api)?.1;
        ensure!(all == FIRST + SECOND, "{all}");
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn are_reached_by_disks_and_daemons(context: &Context) -> Result<Outcome> {
    for keys in ["", ",backend=blkd", ",backend=blkd,datapath=relay"] {
        let vm = builder(context)?;
        let disk = DiskImage::empty(vm.dir().join("disk.img"), 8 * MIB)?;
        let vm = vm.flag("--disk", format!("path={}{keys}", disk.path().display()));
        let mut guest = Guest::start(with_zones(vm, ",hotplug_size=128M", ",hotplug_size=128M").api())?;
        let api = guest.vm().api()?.clone();
        guest.ask("blk 0 read 0 8")?;
        resize(&api, "b", SECOND + 16 * MIB)?;
        guest.ask(&format!("vmem 1 wait {} 5000", 16 * MIB))?;
        guest.ask(&format!("vmem 1 reach {}", 16 * MIB))?;
        let [_, b] = rooms(&mut guest)?;
        let len = 64 * 512;
        // In the first zone, in the second, and in what came to it.
        for (seed, at) in [(1, test_ram()), (2, ram_start() + FIRST + MIB), (3, b + MIB)] {
            fill(&mut guest, at, len, seed)?;
            guest.ask(&format!("blk 0 dma out 0 64 {at:#x}"))?;
            guest
                .ask(&format!("blk 0 verify 0 64 {seed}"))
                .with_context(|| format!("{keys} at {at:#x}"))?;
            guest.ask(&format!("blk 0 write 0 64 {}", seed + 10))?;
            guest.ask(&format!("blk 0 dma in 0 64 {at:#x}"))?;
            verify(&mut guest, at, len, seed + 10).with_context(|| format!("{keys} at {at:#x}"))?;
        }
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn go_on_from_a_snapshot(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = kept.path().join("saved");
    let vm = zoned(context, ",hotplug_size=128M", ",hotplug_size=128M,shared=on")?
        .flag("--numa", "guest_numa_id=0,memory_zones=[a]")
        .flag("--numa", "guest_numa_id=1,memory_zones=[b]");
    let mut guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    let told = guest.ask("numa")?;
    resize(&api, "b", SECOND + 16 * MIB)?;
    guest.ask(&format!("vmem 1 wait {} 5000", 16 * MIB))?;
    guest.ask(&format!("vmem 1 reach {}", 16 * MIB))?;
    let [_, b] = rooms(&mut guest)?;
    let border = ram_start() + FIRST;
    fill(&mut guest, border - 2 * MIB, 4 * MIB, 7)?;
    fill(&mut guest, b, 16 * MIB, 8)?;
    // It was asked for, and the guest has not looked.
    resize(&api, "a", FIRST + 4 * MIB)?;
    api.put("vm.pause", None)?;
    snapshot::snapshot(&api, &directory)?;
    drop(guest);
    // Other zones are not what was saved.
    for change in [
        |zones: &mut Value| zones[0]["size"] = json!(FIRST + MIB),
        |zones: &mut Value| {
            zones[0]["size"] = json!(FIRST + MIB);
            zones[1]["size"] = json!(SECOND - MIB);
        },
        |zones: &mut Value| zones[1]["hotplug_size"] = json!(256 * MIB),
        |zones: &mut Value| zones[1]["id"] = json!("c"),
    ] {
        let text = std::fs::read(directory.join("config.json"))?;
        snapshot::edit(&directory, |config| {
            change(&mut config["memory"]["zones"]);
            config["numa"][1]["memory_zones"][0] = config["memory"]["zones"][1]["id"].clone();
        })?;
        let (_vm, api) = snapshot::another(context)?;
        let source = json!({ "source_url": format!("file://{}", directory.display()) }).to_string();
        let answer = api.request("PUT", "vm.restore", Some(&source))?;
        ensure!(answer.status == 400, "{} {}", answer.status, answer.body);
        std::fs::write(directory.join("config.json"), text)?;
    }
    // What backs them may be another.
    snapshot::edit(&directory, |config| {
        config["memory"]["zones"][0]["shared"] = json!(true);
    })?;
    let mut guest = snapshot::restore(context, &directory)?;
    let api = guest.vm().api()?.clone();
    verify(&mut guest, border - 2 * MIB, 4 * MIB, 7)?;
    verify(&mut guest, b, 16 * MIB, 8)?;
    ensure!(guest.ask("numa")? == told);
    let (zones, all) = counts(&api)?;
    let both = [(FIRST + 4 * MIB, FIRST), (SECOND + 16 * MIB, SECOND + 16 * MIB)];
    ensure!(zones == both && all == FIRST + SECOND + 16 * MIB, "{zones:?}");
    guest.ask(&format!("vmem 0 reach {}", 4 * MIB))?;
    reach(
        &api,
        [
            (FIRST + 4 * MIB, FIRST + 4 * MIB),
            (SECOND + 16 * MIB, SECOND + 16 * MIB),
        ],
    )?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
