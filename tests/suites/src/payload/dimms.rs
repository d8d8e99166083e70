//! Memory devices come and go while the guest runs.

use super::guest::{Guest, builder, is_arm, ram_start};
use super::payload_tests;
use crate::held::Held;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::jobs::wait;
use triarch_harness::smaps::{self, VmFlags};
use triarch_harness::suite::{Context, Outcome, Test, is_patient, patient};

payload_tests!("dimms":
    memory_comes_and_goes,
    devices_reach_memory_that_came,
    targets_replace_each_other,
    while_a_removal_is_open_others_wait,
    refusals_are_told_and_taken_back,
    what_the_guest_finds_by_itself_is_told,
    wrong_targets_change_nothing,
    what_the_host_has_not_changes_nothing,
    a_reset_keeps_it_and_a_boot_does_not,
    it_comes_during_a_pause,
    all_kinds_of_memory_come,
);

/// Those that take their time.
pub const SLOW: &[Test] = &[Test::payload("dimms::a_guest_may_be_late", a_guest_may_be_late)
    .within(Duration::from_secs(180))
    .idle()];

pub(super) const MIB: u64 = 1 << 20;
/// What the guest starts with.
const BOOT: u64 = 64 * MIB;
/// Memory comes in multiples of it.
pub(super) const BLOCK: u64 = 128 * MIB;
/// Slots for memory devices.
pub(super) const SLOTS: u64 = 32;
/// How long a job may take whose guest has done its part.
const LIMIT: Duration = Duration::from_secs(10);

/// Where memory comes: behind the hole for devices, or behind RAM.
pub(super) fn room() -> u64 {
    if is_arm() { 2 * ram_start() } else { 1 << 32 }
}

/// A guest with 64 MiB and room for 8 GiB.
pub(super) fn start(context: &Context, memory: &str) -> Result<(Guest, Api)> {
    let vm = builder(context)?.set("--memory", format!("size=64M,hotplug_size=8G{memory}"));
    let guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    Ok((guest, api))
}

/// Asks for so many blocks beyond what the guest started with.
pub(super) fn resize(api: &Api, blocks: u64) -> Result<()> {
    let body = json!({ "desired_ram": BOOT + blocks * BLOCK }).to_string();
    api.put("vm.resize", Some(&body))?;
    Ok(())
}

fn refused(api: &Api, body: &Value, status: u16, words: &[&str]) -> Result<()> {
    api.refused("vm.resize", body, status, words)
}

/// Blocks the guest should have, was given, and has taken.
fn counts(api: &Api) -> Result<[u64; 3]> {
    let info = api.get("vm.info")?;
    let blocks = |name: &str| -> Result<u64> {
        let bytes = info["memory"][name].as_u64().context("no counts")?;
        ensure!((bytes - BOOT).is_multiple_of(BLOCK), "{info}");
        Ok((bytes - BOOT) / BLOCK)
    };
    let taken = &info["memory"]["taken"];
    ensure!(
        info["config"]["memory"]["size"] == *taken && info["memory_actual_size"] == *taken,
        "{info}"
    );
    Ok([blocks("target")?, blocks("present")?, blocks("taken")?])
}

/// Waits for these numbers: what the guest does by itself, no job tells of.
fn settled(api: &Api, wanted: [u64; 3]) -> Result<()> {
    let same = || Ok((counts(api)? == wanted).then_some(()));
    wait("it does not settle", patient(LIMIT), same).with_context(|| format!("{:?}, not {wanted:?}", counts(api)))
}

pub(super) fn done(api: &Api, phase: &str) -> Result<()> {
    api.is_done("vm.resize", patient(LIMIT), phase)
}

fn failed(api: &Api, limit: Duration, words: &[&str]) -> Result<()> {
    api.has_failed("vm.resize", patient(limit), words)
}

/// The guest writes and reads `len` bytes at `at`.
pub(super) fn works(guest: &mut Guest, at: u64, len: u64) -> Result<()> {
    guest.ask(&format!("mem fill {at:#x} {len:#x} {at}"))?;
    guest.ask(&format!("mem verify {at:#x} {len:#x} {at}"))?;
    Ok(())
}

/// The memory events: what happened, and where.
fn events(api: &Api) -> Result<Vec<(String, u64, u64)>> {
    let events = api.get("vm.events?since=0&follow=false")?;
    let events = events.as_array().context("no events")?.iter();
    let memory = events.filter(|event| event["source"] == "memory");
    let one = |event: &Value| {
        let number = |name: &str| event["properties"][name].as_str().and_then(|text| text.parse().ok());
        let number = |name: &str| {
            event["properties"][name]
                .as_u64()
                .or_else(|| number(name))
                .unwrap_or_default()
        };
        (event["event"].to_string(), number("address"), number("size"))
    };
    Ok(memory.map(one).collect())
}

fn memory_comes_and_goes(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    ensure!(guest.ask("dimm count")? == SLOTS.to_string() && counts(&api)? == [0, 0, 0]);
    ensure!(guest.ask("dimm status 0")? == "0x0" && guest.ask("dimm place 0")? == "0x0+0x0");
    guest.refused("dimm take 0")?;

    resize(&api, 1)?;
    ensure!(counts(&api)? == [1, 1, 0]);
    ensure!(guest.ask("dimm serve 1 5000")? == "taken=1 ejected=0");
    done(&api, "the guest took 128 MiB")?;
    ensure!(counts(&api)? == [1, 1, 1]);
    let base = room();
    ensure!(guest.ask("dimm place 0")? == format!("{base:#x}+{BLOCK:#x}"));
    works(&mut guest, base, 4 * MIB)?;
    works(&mut guest, base + BLOCK - MIB, MIB)?;

    resize(&api, 4)?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest took 384 MiB")?;
    ensure!(guest.ask("dimm place 1")? == format!("{:#x}+{:#x}", base + BLOCK, 3 * BLOCK));
    // Across the two, which are neighbours to the guest and not to the host.
    guest.ask(&format!(
        "mem verify {:#x} {MIB:#x} {}",
        base + BLOCK - MIB,
        base + BLOCK - MIB
    ))?;
    works(&mut guest, base + 4 * BLOCK - MIB, MIB)?;
    let metrics = api.request("GET", "/metrics", None)?.body;
    for line in [
        format!("triarch_memory_bytes{{count=\"taken\"}} {}", BOOT + 4 * BLOCK),
        format!("triarch_memory_size_bytes {}", BOOT + 4 * BLOCK),
        "triarch_memory_changes_total{direction=\"add\",result=\"done\"} 2".to_owned(),
    ] {
        ensure!(metrics.contains(&line), "no {line} in\n{metrics}");
    }

    let whole = json!({ "desired_ram": BOOT + 2 * BLOCK });
    let possible = (BOOT + BLOCK).to_string();
    refused(&api, &whole, 400, &["as a whole", &possible])?;
    resize(&api, 1)?;
    ensure!(counts(&api)? == [1, 4, 4]);
    ensure!(guest.ask("dimm serve 1 5000")? == "taken=0 ejected=1");
    done(&api, "the guest gave back 384 MiB")?;
    ensure!(counts(&api)? == [1, 1, 1] && guest.ask("dimm status 1")? == "0x0");
    works(&mut guest, base + BLOCK - MIB, MIB)?;
    resize(&api, 2)?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest took 128 MiB")?;
    // What was there before is not what is there now.
    guest.ask(&format!("mem checksum {:#x} {MIB:#x}", base + BLOCK))?;
    guest.refused(&format!(
        "mem verify {:#x} {MIB:#x} {}",
        base + BLOCK + MIB,
        base + BLOCK + MIB
    ))?;

    let told = events(&api)?;
    let expected = [
        ("\"added\"", base, BLOCK),
        ("\"added\"", base + BLOCK, 3 * BLOCK),
        ("\"removed\"", base + BLOCK, 3 * BLOCK),
        ("\"added\"", base + BLOCK, BLOCK),
    ];
    let expected: Vec<_> = expected
        .into_iter()
        .map(|(what, at, size)| (what.to_owned(), at, size))
        .collect();
    ensure!(told == expected, "{told:x?}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The guest has the disk write what is in its new memory, and read into it.
pub(super) fn disk_reaches(guest: &mut Guest, at: u64) -> Result<()> {
    guest.ask(&format!("mem fill {at:#x} {MIB:#x} 7"))?;
    guest.ask(&format!("blk 0 dma out 0 2048 {at:#x}"))?;
    guest.ask("blk 0 verify 0 1024 7")?;
    guest.ask(&format!("mem fill {at:#x} {MIB:#x} 8"))?;
    guest.ask(&format!("blk 0 dma in 0 2048 {at:#x}"))?;
    guest.ask(&format!("mem verify {at:#x} {MIB:#x} 7"))?;
    Ok(())
}

fn devices_reach_memory_that_came(context: &Context) -> Result<Outcome> {
    for memory in ["", ",shared=on"] {
        let vm = builder(context)?.set("--memory", format!("size=64M,hotplug_size=8G{memory}"));
        let image = DiskImage::with(vm.dir().join("disk"), &vec![0; 4 * MIB as usize])?;
        let vm = vm.disk(image.path(), "");
        let mut guest = Guest::start(vm.api())?;
        let api = guest.vm().api()?.clone();
        // Nothing is there yet, and a disk that is led there has to be set up anew.
        guest.refused(&format!("blk 0 dma in 0 8 {:#x} ms=100", room()))?;
        guest.ask("blk 0 init")?;
        for blocks in [1, 2] {
            resize(&api, blocks)?;
            guest.ask("dimm serve 1 5000")?;
            done(&api, "the guest took 128 MiB")?;
            disk_reaches(&mut guest, room() + (blocks - 1) * BLOCK)?;
        }
        disk_reaches(&mut guest, room() + 2 * BLOCK - MIB)?;
        // Across the border of two regions.
        disk_reaches(&mut guest, room() + BLOCK - MIB / 2)?;
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn targets_replace_each_other(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    resize(&api, 0)?;
    ensure!(!api.get("vm.jobs")?.to_string().contains("vm.resize"));
    resize(&api, 2)?;
    resize(&api, 2)?;
    let jobs = || -> Result<usize> { Ok(api.get("vm.jobs")?.to_string().matches("vm.resize").count()) };
    ensure!(jobs()? == 1);
    resize(&api, 3)?;
    ensure!(jobs()? == 2 && counts(&api)? == [3, 3, 0]);
    let first = api.get("vm.job/2")?;
    let reason = format!("it was replaced by a target of {} bytes", BOOT + 3 * BLOCK);
    ensure!(first["error"] == reason, "{first}");
    // Less than what the guest never saw: that is taken away, and what is left is one device.
    resize(&api, 1)?;
    ensure!(counts(&api)? == [1, 1, 0]);
    ensure!(guest.ask("dimm serve 1 5000")? == "taken=1 ejected=0");
    ensure!(guest.ask("dimm next")? == "none");
    settled(&api, [1, 1, 1])?;
    resize(&api, 4)?;
    resize(&api, 1)?;
    ensure!(counts(&api)? == [1, 1, 1] && guest.ask("dimm next")? == "none");
    let told = events(&api)?;
    ensure!(told.len() == 1, "{told:?}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn while_a_removal_is_open_others_wait(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    for blocks in [1, 2] {
        resize(&api, blocks)?;
        guest.ask("dimm serve 1 5000")?;
    }
    settled(&api, [2, 2, 2])?;
    resize(&api, 1)?;
    resize(&api, 1)?;
    for blocks in [0, 2, 3] {
        let body = json!({ "desired_ram": BOOT + blocks * BLOCK });
        refused(&api, &body, 429, &["Too Many Requests", "128 MiB"])?;
    }
    ensure!(counts(&api)? == [1, 2, 2]);
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest gave back 128 MiB")?;
    resize(&api, 0)?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest gave back 128 MiB")?;
    ensure!(counts(&api)? == [0, 0, 0]);
    Ok(Outcome::Passed)
}

fn refusals_are_told_and_taken_back(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    resize(&api, 1)?;
    ensure!(guest.ask("hot events")? == "0x2" && guest.ask("dimm next")? == "slot=0 value=1");
    guest.ask("dimm ost 0 1 1")?;
    failed(&api, LIMIT, &["does not take 128 MiB", "failure", "0x1", "Linux needs"])?;
    ensure!(counts(&api)? == [0, 0, 0] && guest.ask("dimm status 0")? == "0x0");
    resize(&api, 1)?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest took 128 MiB")?;
    resize(&api, 0)?;
    ensure!(guest.ask("dimm next")? == "slot=0 value=3");
    guest.ask("dimm ost 0 3 0x84")?;
    ensure!(counts(&api)? == [0, 1, 1]);
    guest.ask("dimm ost 0 3 0x82")?;
    failed(&api, LIMIT, &["does not give back 128 MiB", "busy", "0x82"])?;
    ensure!(counts(&api)? == [1, 1, 1]);
    works(&mut guest, room(), MIB)?;
    // A guest may give memory back without being asked.
    guest.ask("dimm drop 0")?;
    guest.ask("dimm eject 0")?;
    settled(&api, [0, 0, 0])?;
    guest.ask("dimm eject 0")?;
    guest.ask("dimm eject 31")?;
    ensure!(counts(&api)? == [0, 0, 0]);
    let metrics = api.request("GET", "/metrics", None)?.body;
    for direction in ["add", "remove"] {
        let line = format!("triarch_memory_changes_total{{direction=\"{direction}\",result=\"refused\"}} 1");
        ensure!(metrics.contains(&line), "no {line} in\n{metrics}");
    }
    Ok(Outcome::Passed)
}

fn what_the_guest_finds_by_itself_is_told(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    resize(&api, 1)?;
    // A kernel that boots looks at all devices, and says of the notice that comes later that it has it already.
    guest.ask("dimm take 0")?;
    ensure!(guest.ask("dimm next")? == "slot=0 value=1");
    guest.ask("dimm ost 0 1 1")?;
    done(&api, "the guest took 128 MiB")?;
    ensure!(counts(&api)? == [1, 1, 1]);
    works(&mut guest, room(), MIB)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn wrong_targets_change_nothing(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    let most = (BOOT + 64 * BLOCK).to_string();
    for (bytes, words) in [
        (BOOT - MIB, vec!["between 67108864"]),
        (BOOT + 65 * BLOCK, vec![&*most]),
        (BOOT + BLOCK + MIB, vec!["multiple of 134217728"]),
        (u64::MAX - MIB + 1, vec![&*most]),
    ] {
        refused(&api, &json!({ "desired_ram": bytes }), 400, &words)?;
    }
    // All of a request or nothing.
    let both = json!({ "desired_vcpus": 3, "desired_ram": BOOT + BLOCK });
    refused(&api, &both, 400, &["desired_vcpus is 3"])?;
    ensure!(counts(&api)? == [0, 0, 0] && guest.ask("hot events")? == "0x0" && guest.ask("dimm next")? == "none");
    ensure!(!api.get("vm.jobs")?.to_string().contains("vm.resize"));
    // An emulated host has no memory for all of the slots.
    if !is_patient() {
        one_slot_too_many(&mut guest, &api)?;
    }
    drop(guest);

    // A VM without room for more.
    let guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    refused(&api, &json!({ "desired_ram": BOOT + BLOCK }), 400, &["hotplug_size"])?;
    ensure!(api.get("vm.info")?["memory"].is_null());
    Ok(Outcome::Passed)
}

fn one_slot_too_many(guest: &mut Guest, api: &Api) -> Result<()> {
    for blocks in 1..=SLOTS {
        resize(api, blocks)?;
        guest.ask("dimm serve 1 5000")?;
    }
    settled(api, [SLOTS; 3])?;
    let more = json!({ "desired_ram": BOOT + (SLOTS + 1) * BLOCK });
    refused(api, &more, 400, &["all 32 slots", "at once"])?;
    ensure!(counts(api)? == [SLOTS; 3]);
    Ok(())
}

fn what_the_host_has_not_changes_nothing(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.set("--memory", "size=64M,hotplug_size=16T");
    let Ok(mut guest) = Guest::start(vm.api()) else {
        return Ok(Outcome::Skipped(
            "this host's guests have no addresses for 16 TiB".into(),
        ));
    };
    let api = guest.vm().api()?.clone();
    // The first round makes what is kept.
    come_and_go(&mut guest, &api)?;
    let held = Held::at_rest(guest.vm())?;
    let body = json!({ "desired_ram": BOOT + (8 << 40) });
    refused(&api, &body, 400, &["8388672 MiB", "the host has"])?;
    ensure!(counts(&api)? == [0, 0, 0] && guest.ask("dimm next")? == "none");
    come_and_go(&mut guest, &api)?;
    held.is_all_of(guest.vm())?;
    Ok(Outcome::Passed)
}

fn come_and_go(guest: &mut Guest, api: &Api) -> Result<()> {
    resize(api, 1)?;
    guest.ask("dimm serve 1 5000")?;
    done(api, "the guest took 128 MiB")?;
    resize(api, 0)?;
    guest.ask("dimm serve 1 5000")?;
    done(api, "the guest gave back 128 MiB")
}

fn a_reset_keeps_it_and_a_boot_does_not(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    for blocks in [1, 3] {
        resize(&api, blocks)?;
        guest.ask("dimm serve 1 5000")?;
    }
    settled(&api, [3; 3])?;
    let map = guest.ask("mem map")?;
    guest.send("pm reset")?;
    guest.wait_ready()?;
    settled(&api, [3; 3])?;
    ensure!(guest.ask("dimm status 1")? == "0xf" && guest.ask("dimm next")? == "none");
    ensure!(guest.ask("mem map")? != map, "the map is that of a guest that starts");
    guest.ask("dimm take 0")?;
    guest.ask("dimm take 1")?;
    works(&mut guest, room() + 2 * BLOCK, MIB)?;
    resize(&api, 1)?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest gave back 256 MiB")?;
    // A resize that is open at a reset ends with it.
    resize(&api, 2)?;
    api.put("vm.reboot", None)?;
    guest.wait_ready()?;
    done(&api, "the guest was reset and has 320 MiB")?;
    ensure!(counts(&api)? == [2; 3]);
    resize(&api, 1)?;
    api.put("vm.reboot", None)?;
    guest.wait_ready()?;
    ensure!(counts(&api)? == [1; 3]);
    resize(&api, 2)?;
    api.put("vm.shutdown", None)?;
    failed(&api, LIMIT, &["the guest ended before"])?;
    let info = api.get("vm.info")?;
    ensure!(
        info["config"]["memory"]["size"] == BOOT && info["memory"].is_null(),
        "{info}"
    );
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    ensure!(counts(&api)? == [0; 3] && guest.ask("dimm status 0")? == "0x0");
    Ok(Outcome::Passed)
}

fn it_comes_during_a_pause(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    guest.vm().pause()?;
    resize(&api, 2)?;
    ensure!(counts(&api)? == [2, 2, 0]);
    guest.vm().resume()?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest took 256 MiB")?;
    guest.vm().pause()?;
    guest.vm().resume()?;
    works(&mut guest, room() + BLOCK, MIB)?;
    resize(&api, 0)?;
    guest.vm().pause()?;
    refused(
        &api,
        &json!({ "desired_ram": BOOT + BLOCK }),
        429,
        &["Too Many Requests"],
    )?;
    guest.vm().resume()?;
    guest.ask("dimm serve 1 5000")?;
    done(&api, "the guest gave back 256 MiB")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Memory that comes is of the kind that the guest started with: the kernel tells.
fn all_kinds_of_memory_come(context: &Context) -> Result<Outcome> {
    for (memory, flag, there) in [
        ("", VmFlags::HG, true),
        (",thp=off", VmFlags::NH, true),
        (",mergeable=on", VmFlags::MG, true),
        (",shared=on", VmFlags::SH, true),
        (",prefault=on", VmFlags::SH, false),
    ] {
        let (mut guest, api) = start(context, memory)?;
        resize(&api, 1)?;
        guest.ask("dimm serve 1 5000")?;
        done(&api, "the guest took 128 MiB")?;
        let mut mappings = smaps::of(guest.vm().pid())?.into_iter();
        let mapping = mappings.find(|mapping| smaps::size(mapping) == BLOCK);
        let mapping = mapping.with_context(|| format!("no mapping of {BLOCK} bytes with '{memory}'"))?;
        let flags = mapping.extension.vm_flags;
        // A kernel without the feature has no flag for it.
        ensure!(
            flags.contains(flag) == there || flag != VmFlags::SH,
            "'{memory}': {flags:?}"
        );
        ensure!(
            flags.contains(VmFlags::DD),
            "it would be in a dump of the VMM: {flags:?}"
        );
        let resident = smaps::kib(&mapping, "Rss") << 10;
        ensure!(
            memory != ",prefault=on" || resident == BLOCK,
            "only {resident} bytes of it are there"
        );
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn a_guest_may_be_late(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "")?;
    resize(&api, 1)?;
    failed(&api, Duration::from_secs(60), &["did not look at 128 MiB", "30 s"])?;
    ensure!(counts(&api)? == [1, 1, 0]);
    guest.ask("dimm serve 1 5000")?;
    settled(&api, [1; 3])?;
    works(&mut guest, room(), MIB)?;
    resize(&api, 0)?;
    ensure!(guest.ask("dimm next")? == "slot=0 value=3");
    failed(&api, Duration::from_secs(60), &["did not give back 128 MiB"])?;
    ensure!(counts(&api)? == [1; 3]);
    guest.ask("dimm eject 0")?;
    settled(&api, [0; 3])?;
    Ok(Outcome::Passed)
}
