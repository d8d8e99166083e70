//! A memory device gives a running guest memory block by block and takes it back, and the host has what the guest gave back.

use super::balloon::{last_job, wait};
use super::guest::{Guest, builder, number, ram_start};
use super::payload_tests;
use crate::soak::Soak;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::smaps::{self, MemoryMap};
use triarch_harness::suite::{Context, Outcome, Test, figure, is_patient, patient, rounds};
use triarch_harness::vm::VmBuilder;

payload_tests!("virtio_mem":
    grows_and_shrinks,
    what_is_not_plugged_is_no_memory,
    wrong_requests_change_nothing,
    a_guest_that_spreads_out_gets_no_more,
    targets_are_jobs,
    what_cannot_be_is_refused,
    resets_return_it,
    pauses_keep_it,
    disks_reach_it,
    it_may_go_under_a_disk,
    room_costs_nothing,
);

/// Those that take their time.
pub const SLOW: &[Test] = &[
    Test::payload("virtio_mem::a_guest_may_stand_still", a_guest_may_stand_still)
        .within(Duration::from_secs(120))
        .idle(),
    Test::payload("virtio_mem::many_rounds_leave_nothing_behind", many_rounds)
        .within(Duration::from_secs(120))
        .soak(),
];

const MIB: u64 = 1 << 20;
/// Bytes of RAM the guest starts with.
const RAM: u64 = 64 * MIB;
const BLOCK: u64 = 2 * MIB;
/// What comes and goes at once.
const PART: u64 = 128 * MIB;

/// A guest whose memory may become `room` MiB more, its API, and where that is.
fn start(context: &Context, room: u64, memory: &str) -> Result<(Guest, Api, u64)> {
    start_with(builder(context)?, room, memory)
}

fn start_with(vm: VmBuilder, room: u64, memory: &str) -> Result<(Guest, Api, u64)> {
    let memory = format!("size=64M,hotplug_method=virtio-mem,hotplug_size={room}M{memory}");
    let mut guest = Guest::start(vm.set("--memory", memory).api())?;
    let api = guest.vm().api()?.clone();
    let addr = number(&guest.ask("vmem 0 info")?, "addr")?;
    Ok((guest, api, addr))
}

fn resize(api: &Api, plugged: u64) -> Result<()> {
    let target = json!({ "desired_ram": RAM + plugged });
    api.put("vm.resize", Some(&target.to_string())).map(drop)
}

/// Sets a target and lets the guest get there.
fn reach(guest: &mut Guest, api: &Api, plugged: u64) -> Result<()> {
    resize(api, plugged)?;
    guest.ask(&format!("vmem 0 wait {plugged} 5000"))?;
    guest.ask(&format!("vmem 0 reach {plugged}"))?;
    let job = last_job(api)?;
    let phase = format!("the guest has {} MiB plugged", plugged / MIB);
    ensure!(
        job["state"] == "done" && job["kind"] == "vm.resize" && job["phase"] == phase,
        "{job}"
    );
    let info = api.get("vm.info")?;
    ensure!(info["memory_actual_size"] == RAM + plugged, "{info}");
    let there = info["config"]["memory"]["hotplugged_size"].as_u64().unwrap_or(0);
    ensure!(there == plugged && info["config"]["memory"]["size"] == RAM, "{info}");
    Ok(())
}

/// A disk of 8 MiB.
fn image(vm: &VmBuilder) -> Result<DiskImage> {
    DiskImage::empty(vm.dir().join("disk.img"), 8 * MIB)
}

fn resident(api: &Api) -> Result<u64> {
    api.metric("triarch_memory_resident_bytes")?
        .context("no resident memory")
}

fn device(api: &Api, of: &str) -> Result<u64> {
    let name = format!(r#"triarch_memory_device_bytes{{device="_virtio-mem-mem0",of="{of}"}}"#);
    api.metric(&name)?.with_context(|| format!("no metric {name}"))
}

fn fill(guest: &mut Guest, at: u64, len: u64, seed: u64) -> Result<()> {
    guest.ask(&format!("mem fill {at:#x} {len:#x} {seed}")).map(drop)
}

fn verify(guest: &mut Guest, at: u64, len: u64, seed: u64) -> Result<()> {
    guest.ask(&format!("mem verify {at:#x} {len:#x} {seed}")).map(drop)
}

fn grows_and_shrinks(context: &Context) -> Result<Outcome> {
    for memory in ["", ",shared=on", ",prefault=on", ",thp=off"] {
        let (mut guest, api, addr) = start(context, 512, memory)?;
        let before = resident(&api)?;
        reach(&mut guest, &api, 144 * MIB)?;
        fill(&mut guest, addr, 8 * MIB, 1)?;
        fill(&mut guest, addr + 112 * MIB, 32 * MIB, 1)?;
        let full = resident(&api)?;
        let more = full.saturating_sub(before);
        let touched = if memory.contains("prefault") { 144 } else { 40 } * MIB;
        // Each of the two places may begin within one huge page of the host's and end within another.
        let near = |bytes: u64, wanted: u64| (wanted - 2 * MIB..wanted + 6 * MIB).contains(&bytes);
        ensure!(near(more, touched), "{more} bytes came with '{memory}'");
        // All of a part, and some of the other.
        reach(&mut guest, &api, 4 * MIB)?;
        let less = full.saturating_sub(resident(&api)?);
        ensure!(near(less, touched - 4 * MIB), "{less} bytes went with '{memory}'");
        verify(&mut guest, addr, 4 * MIB, 1)?;
        reach(&mut guest, &api, 8 * MIB)?;
        // What comes back is not what went.
        guest.refused(&format!("mem verify {:#x} 0x1000 1", addr + 4 * MIB))?;
        fill(&mut guest, addr + 4 * MIB, 4 * MIB, 2)?;
        verify(&mut guest, addr, 4 * MIB, 1)?;
        reach(&mut guest, &api, 0)?;
        let left = resident(&api)?.saturating_sub(before);
        ensure!(left < 6 * MIB, "{left} bytes stayed with '{memory}'");
        ensure!(device(&api, "reachable")? == 0 && device(&api, "plugged")? == 0);
    }
    Ok(Outcome::Passed)
}

fn what_is_not_plugged_is_no_memory(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = image(&vm)?;
    let vm = vm.flag("--disk", format!("path={},readonly=on", disk.path().display()));
    // A byte is a page of 4 KiB, not a huge one.
    let (mut guest, api, addr) = start_with(vm, 512, ",thp=off")?;
    let word = |guest: &mut Guest, at: u64| guest.ask(&format!("vmem 0 peek {at:#x}"));
    let before = resident(&api)?;
    let nowhere = |guest: &mut Guest, at: u64| -> Result<()> {
        guest.ask(&format!("vmem 0 poke {at:#x} 0x1234"))?;
        ensure!(word(guest, at)? == "0xffffffffffffffff", "{at:#x} is memory");
        // A disk's DMA reaches it no more than a vCPU; its driver has to begin anew.
        guest.refused(&format!("blk 0 dma in 0 8 {at:#x} ms=100"))?;
        guest.ask("blk 0 init")?;
        Ok(())
    };
    nowhere(&mut guest, addr)?;
    nowhere(&mut guest, addr + 511 * MIB)?;
    reach(&mut guest, &api, PART + BLOCK)?;
    guest.ask(&format!("vmem 0 poke {addr:#x} 0x1234"))?;
    ensure!(word(&mut guest, addr)? == "0x1234");
    nowhere(&mut guest, addr + 2 * PART)?;
    reach(&mut guest, &api, PART)?;
    nowhere(&mut guest, addr + PART)?;
    ensure!(word(&mut guest, addr)? == "0x1234");
    reach(&mut guest, &api, 0)?;
    nowhere(&mut guest, addr)?;
    let more = resident(&api)?.saturating_sub(before);
    ensure!(more < 2 * MIB, "{more} bytes for what is not plugged");
    Ok(Outcome::Passed)
}

fn wrong_requests_change_nothing(context: &Context) -> Result<Outcome> {
    let (mut guest, api, addr) = start(context, 256, "")?;
    let info = guest.ask("vmem 0 info")?;
    ensure!(
        number(&info, "block")? == BLOCK && number(&info, "region")? == 256 * MIB,
        "{info}"
    );
    ensure!(
        number(&info, "plugged")? == 0 && number(&info, "requested")? == 0,
        "{info}"
    );
    let ask =
        |guest: &mut Guest, what: &str, at: u64, blocks: u64| guest.ask(&format!("vmem 0 {what} {at:#x} {blocks}"));
    ensure!(ask(&mut guest, "plug", addr, 1)? == "nack", "nobody wants it");
    reach(&mut guest, &api, 8 * MIB)?;
    fill(&mut guest, addr, 8 * MIB, 1)?;
    for (what, at, blocks) in [
        ("plug", addr + 3 * BLOCK, 1),
        ("plug", addr + 3 * BLOCK, 2),
        ("plug", addr + 4 * BLOCK, 0),
        ("plug", addr + 4 * BLOCK + 4096, 1),
        ("plug", addr - BLOCK, 1),
        ("plug", addr + 256 * MIB, 1),
        ("plug", addr + 255 * MIB, 1),
        ("plug", ram_start(), 1),
        ("plug", u64::MAX - BLOCK + 1, 65535),
        ("unplug", addr + 4 * BLOCK, 1),
        ("unplug", addr + 3 * BLOCK, 2),
        ("unplug", addr, 0),
        ("unplug", addr + 1, 1),
        ("unplug", ram_start(), 1),
        ("state", addr, 0),
        ("state", addr, 129),
        ("ask 4", addr, 1),
        ("ask 65535", addr, 1),
    ] {
        let answer = ask(&mut guest, what, at, blocks)?;
        ensure!(answer == "error", "{what} {at:#x} {blocks}: {answer}");
    }
    ensure!(ask(&mut guest, "plug", addr + 4 * BLOCK, 124)? == "nack");
    ensure!(ask(&mut guest, "state", addr, 4)? == "ack plugged");
    ensure!(ask(&mut guest, "state", addr + 4 * BLOCK, 124)? == "ack unplugged");
    ensure!(ask(&mut guest, "state", addr, 128)? == "ack mixed");
    verify(&mut guest, addr, 8 * MIB, 1)?;
    let refused = r#"triarch_memory_device_refused_total{device="_virtio-mem-mem0",answer="error"}"#;
    ensure!(api.metric(refused)? == Some(18));
    let outcome = guest.ask("fuzz-ring vmem0 loop")?;
    ensure!(number(&outcome, "needs_reset")? == 1, "{outcome}");
    // A reset of the device leaves its memory where it is.
    verify(&mut guest, addr, 8 * MIB, 1)?;
    ensure!(guest.ask("vmem 0 unplug-all")? == "ack");
    ensure!(device(&api, "plugged")? == 0);
    Ok(Outcome::Passed)
}

fn a_guest_that_spreads_out_gets_no_more(context: &Context) -> Result<Outcome> {
    let (mut guest, api, addr) = start(context, 1024, "")?;
    resize(&api, 16 * MIB)?;
    guest.ask(&format!("vmem 0 wait {} 5000", 16 * MIB))?;
    let plug = |guest: &mut Guest, part: u64| guest.ask(&format!("vmem 0 plug {:#x} 1", addr + part * PART));
    ensure!(plug(&mut guest, 0)? == "ack" && plug(&mut guest, 7)? == "ack");
    for part in 1..7 {
        ensure!(plug(&mut guest, part)? == "busy", "{part}");
    }
    ensure!(device(&api, "reachable")? == 2 * PART && device(&api, "plugged")? == 2 * BLOCK);
    // There is room for the rest where it is.
    ensure!(guest.ask(&format!("vmem 0 plug {:#x} 6", addr + BLOCK))? == "ack");
    ensure!(last_job(&api)?["state"] == "done");
    Ok(Outcome::Passed)
}

fn jobs(api: &Api) -> Result<Vec<Value>> {
    Ok(api.get("vm.jobs")?.as_array().cloned().unwrap_or_default())
}

fn targets_are_jobs(context: &Context) -> Result<Outcome> {
    let (mut guest, api, addr) = start(context, 256, ",hotplugged_size=4M")?;
    // It is in the configuration from the start.
    guest.ask(&format!("vmem 0 wait {} 5000", 4 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 4 * MIB))?;
    wait("the guest's step is not seen", || {
        Ok((api.get("vm.info")?["memory_actual_size"] == RAM + 4 * MIB).then_some(()))
    })?;
    let before = jobs(&api)?.len();
    resize(&api, 4 * MIB)?;
    ensure!(jobs(&api)?.len() == before, "a target that is reached needs no job");
    resize(&api, 8 * MIB)?;
    resize(&api, 8 * MIB)?;
    ensure!(jobs(&api)?.len() == before + 1, "the same target is one job");
    guest.ask(&format!("vmem 0 plug {:#x} 1", addr + 4 * MIB))?;
    let id = wait("progress", || {
        let jobs = jobs(&api)?;
        let job = jobs.last().context("no job")?;
        ensure!(
            job["state"] == "running" && job["phase"] == "the guest has to plug memory",
            "{job}"
        );
        let there = job["progress"]["done"] == 6 * MIB && job["progress"]["total"] == 8 * MIB;
        Ok(there.then(|| job["id"].clone()))
    })?;
    resize(&api, 6 * MIB)?;
    let replaced = api.get(&format!("vm.job/{id}"))?;
    let error = replaced["error"].as_str().unwrap_or_default();
    ensure!(
        replaced["state"] == "failed" && error.contains("replaced by a target of 6291456 bytes"),
        "{replaced}"
    );
    ensure!(jobs(&api)?.len() == before + 1, "the new target is reached already");
    resize(&api, 2 * MIB)?;
    let last = jobs(&api)?;
    ensure!(
        last.last()
            .is_some_and(|job| job["phase"] == "the guest has to unplug memory"),
        "{last:?}"
    );
    guest.ask(&format!("vmem 0 reach {}", 2 * MIB))?;
    ensure!(last_job(&api)?["state"] == "done");
    resize(&api, 64 * MIB)?;
    api.put("vm.shutdown", None)?;
    let all = jobs(&api)?;
    let lost = all
        .iter()
        .find(|job| job["error"].as_str().unwrap_or_default().contains("guest ended"));
    ensure!(lost.is_some(), "{all:?}");
    Ok(Outcome::Passed)
}

fn what_cannot_be_is_refused(context: &Context) -> Result<Outcome> {
    let (mut guest, api, addr) = start(context, 256, "")?;
    reach(&mut guest, &api, 4 * MIB)?;
    fill(&mut guest, addr, 4 * MIB, 1)?;
    let before = api.get("vm.info")?["config"].clone();
    for (bytes, words) in [
        (RAM - MIB, "started with"),
        (RAM + MIB, "steps of 2097152"),
        (RAM + 258 * MIB, "up to 268435456 more"),
        (u64::MAX - MIB + 1, "up to 268435456 more"),
        (0, "started with"),
    ] {
        let target = json!({ "desired_ram": bytes }).to_string();
        let answer = api.request("PUT", "vm.resize", Some(&target))?;
        ensure!(
            answer.status == 400 && answer.body.contains(words),
            "{bytes}: {}",
            answer.body
        );
    }
    // All of it or nothing.
    let target = json!({ "desired_ram": RAM + 8 * MIB, "desired_vcpus": 100 }).to_string();
    let answer = api.request("PUT", "vm.resize", Some(&target))?;
    ensure!(answer.status == 400, "{}", answer.body);
    ensure!(api.get("vm.info")?["config"] == before, "a refusal changed something");
    ensure!(number(&guest.ask("vmem 0 info")?, "requested")? == 4 * MIB);
    verify(&mut guest, addr, 4 * MIB, 1)?;
    Ok(Outcome::Passed)
}

fn resets_return_it(context: &Context) -> Result<Outcome> {
    let (mut guest, api, addr) = start(context, 256, "")?;
    let before = resident(&api)?;
    reach(&mut guest, &api, 64 * MIB)?;
    fill(&mut guest, addr, 64 * MIB, 1)?;
    for by_guest in [true, false] {
        match by_guest {
            true => guest.send("pm reset")?,
            false => api.put("vm.reboot", None).map(drop)?,
        }
        guest.wait_ready()?;
        let info = guest.ask("vmem 0 info")?;
        ensure!(
            number(&info, "plugged")? == 0 && number(&info, "requested")? == 64 * MIB,
            "{info}"
        );
        ensure!(api.get("vm.info")?["memory_actual_size"] == RAM);
        let left = resident(&api)?.saturating_sub(before);
        ensure!(left < 6 * MIB, "{left} bytes stayed");
        guest.ask(&format!("vmem 0 reach {}", 64 * MIB))?;
        fill(&mut guest, addr, 64 * MIB, 2)?;
        verify(&mut guest, addr, 64 * MIB, 2)?;
    }
    // A job goes on where the guest begins again.
    resize(&api, 66 * MIB)?;
    guest.send("pm reset")?;
    guest.wait_ready()?;
    guest.ask("vmem 0 info")?;
    guest.ask(&format!("vmem 0 reach {}", 66 * MIB))?;
    ensure!(last_job(&api)?["state"] == "done");
    api.put("vm.shutdown", None)?;
    api.put("vm.boot", None)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn pauses_keep_it(context: &Context) -> Result<Outcome> {
    let (mut guest, api, addr) = start(context, 256, ",shared=on")?;
    reach(&mut guest, &api, 16 * MIB)?;
    fill(&mut guest, addr, 16 * MIB, 1)?;
    api.put("vm.pause", None)?;
    resize(&api, 32 * MIB)?;
    ensure!(device(&api, "requested")? == 32 * MIB && device(&api, "plugged")? == 16 * MIB);
    api.put("vm.resume", None)?;
    guest.ask(&format!("vmem 0 wait {} 5000", 32 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 32 * MIB))?;
    ensure!(last_job(&api)?["state"] == "done");
    verify(&mut guest, addr, 16 * MIB, 1)?;
    // Pauses at any moment of many requests.
    for round in 1..6 {
        let target = [32 * MIB, 256 * MIB][round % 2];
        resize(&api, target)?;
        guest.send(&format!("vmem 0 reach {target}"))?;
        for _ in 0..5 {
            api.put("vm.pause", None)?;
            api.put("vm.resume", None)?;
        }
        guest.answer()?;
        ensure!(last_job(&api)?["state"] == "done");
    }
    verify(&mut guest, addr, 16 * MIB, 1)?;
    Ok(Outcome::Passed)
}

fn disks_reach_it(context: &Context) -> Result<Outcome> {
    for keys in ["", ",backend=blkd", ",backend=blkd,datapath=relay"] {
        let vm = builder(context)?;
        let disk = image(&vm)?;
        let vm = vm.flag("--disk", format!("path={}{keys}", disk.path().display()));
        let (mut guest, api, addr) = start_with(vm, 512, ",shared=on")?;
        for round in 1..3 {
            // The driver of the disk knew nothing of this memory when it began, in no round.
            ensure!(guest.ask("blk 0 read 0 8")? != "");
            reach(&mut guest, &api, 2 * PART)?;
            // Over the border of two parts.
            let at = addr + PART - 64 * 512;
            fill(&mut guest, at, 128 * 512, round)?;
            guest.ask(&format!("blk 0 dma out 0 128 {at:#x}"))?;
            guest.ask(&format!("blk 0 verify 0 128 {round}"))?;
            guest.ask(&format!("blk 0 write 0 128 {}", round + 10))?;
            guest.ask(&format!("blk 0 dma in 0 128 {at:#x}"))?;
            verify(&mut guest, at, 128 * 512, round + 10).context(keys)?;
            reach(&mut guest, &api, 0)?;
        }
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn it_may_go_under_a_disk(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = image(&vm)?;
    let vm = vm.flag("--disk", format!("path={}", disk.path().display()));
    let (mut guest, api, addr) = start_with(vm, 512, "")?;
    reach(&mut guest, &api, PART)?;
    guest.ask(&format!("blk 0 dma in 0 8 {addr:#x}"))?;
    // A driver that goes on with memory that is gone has its device broken, and nobody else notices.
    for _ in 0..5 {
        guest.ask(&format!("blk 0 dma in 0 2048 {addr:#x}"))?;
        guest.ask("vmem 0 unplug-all")?;
        guest.refused(&format!("blk 0 dma in 0 8 {addr:#x} ms=100"))?;
        guest.ask("blk 0 init")?;
        guest.ask("blk 0 read 0 8")?;
        guest.ask(&format!("vmem 0 reach {PART}"))?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn room_costs_nothing(context: &Context) -> Result<Outcome> {
    // More than any host has.
    for memory in ["", ",shared=on"] {
        let (guest, api, _) = start(context, 64 << 10, memory)?;
        let with = private_kib(&guest)?;
        drop(guest);
        let plain = Guest::start(builder(context)?.set("--memory", format!("size=64M{memory}")).api())?;
        let without = private_kib(&plain)?;
        // The guest touches a page or two more, for its driver.
        ensure!(with < without + 512, "{with} KiB with room, {without} KiB without");
        drop(api);
    }
    Ok(Outcome::Passed)
}

/// What of memory only this process has, beside its program: how much of that is its own depends on who else runs it.
fn private_kib(guest: &Guest) -> Result<u64> {
    let program = |mapping: &MemoryMap| smaps::file(mapping).is_some_and(|file| !file.starts_with("/memfd:"));
    let mut mappings = smaps::of(guest.vm().pid())?;
    mappings.retain(|mapping| !program(mapping));
    let own = |mapping| smaps::kib(mapping, "Private_Dirty") + smaps::kib(mapping, "Private_Clean");
    let sum = mappings.iter().map(own).sum();
    ensure!(sum > 0, "no private memory");
    Ok(sum)
}

fn a_guest_may_stand_still(context: &Context) -> Result<Outcome> {
    let (mut guest, api, _) = start(context, 256, "")?;
    resize(&api, 8 * MIB)?;
    guest.ask(&format!("vmem 0 reach {}", 4 * MIB))?;
    let words = "the guest is at 4194304 bytes of 8388608 and has not moved for 30 s: its driver adds no more";
    api.has_failed("vm.resize", patient(Duration::from_secs(60)), &[words])?;
    // What it was asked for stays, and asking again is a job again.
    guest.ask(&format!("vmem 0 reach {}", 8 * MIB))?;
    wait("the guest's step is not seen", || {
        Ok((api.get("vm.info")?["memory_actual_size"] == RAM + 8 * MIB).then_some(()))
    })?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn many_rounds(context: &Context) -> Result<Outcome> {
    let soak = Soak {
        rounds: rounds(if is_patient() { 4 } else { 20 }),
        settles: 1,
    };
    let (mut guest, api, addr) = start(context, 512, ",shared=on")?;
    let slots = || api.metric("triarch_memory_slots")?.context("no memory slots");
    let all = slots()?;
    let mut first = None;
    let soaked = soak.run(&mut guest, Guest::vm, |guest, round| {
        reach(guest, &api, 160 * MIB)?;
        ensure!(slots()? == all + 2, "two parts are two slots");
        fill(guest, addr + 120 * MIB, 16 * MIB, round.into())?;
        verify(guest, addr + 120 * MIB, 16 * MIB, round.into())?;
        reach(guest, &api, 0)?;
        ensure!(slots()? == all);
        let now = resident(&api)?;
        let first = *first.get_or_insert(now);
        ensure!(now <= first + MIB, "{now} bytes, first {first}");
        Ok(())
    })?;
    figure(&format!("160 MiB of virtio-mem: {soaked}"))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
