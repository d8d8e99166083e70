//! A balloon takes memory from the guest and gives it back, and the host has it meanwhile.

use super::guest::{Guest, builder, number, test_ram};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::jobs;
use triarch_harness::suite::{Context, Outcome, patient};

payload_tests!("balloon":
    gives_memory_to_the_host_and_back,
    targets_are_jobs,
    what_cannot_be_is_refused,
    statistics_are_metrics,
    free_pages_are_the_hosts,
);

const MIB: u64 = 1 << 20;
/// Bytes of RAM the guest has.
const RAM: u64 = 64 * MIB;
const PAGE: u64 = 4096;
/// How long a step of the guest or a job may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Waits until `done` gives something.
pub(super) fn wait<T>(what: &str, done: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    jobs::wait(what, patient(LIMIT), done)
}

/// How the last resize ended.
pub(super) fn last_job(api: &Api) -> Result<Value> {
    api.ended("vm.resize", patient(LIMIT))
}

/// A guest with a balloon, and its API.
fn start(context: &Context, memory: &str, balloon: &str) -> Result<(Guest, Api)> {
    let vm = builder(context)?.set("--memory", format!("size=64M{memory}"));
    let guest = Guest::start(vm.flag("--balloon", balloon).api())?;
    let api = guest.vm().api()?.clone();
    Ok((guest, api))
}

fn resize(api: &Api, bytes: u64) -> Result<()> {
    let target = json!({ "desired_balloon": bytes });
    api.put("vm.resize", Some(&target.to_string())).map(drop)
}

fn gives_memory_to_the_host_and_back(context: &Context) -> Result<Outcome> {
    for memory in ["", ",shared=on", ",thp=off"] {
        let (mut guest, api) = start(context, memory, "size=0")?;
        let start = test_ram();
        guest.ask(&format!("mem fill {start:#x} {:#x} 1", 32 * MIB))?;
        let resident = || {
            api.metric("triarch_memory_resident_bytes")?
                .context("no resident memory")
        };
        let full = resident()?;
        resize(&api, 16 * MIB)?;
        let pages = 16 * MIB / PAGE;
        guest.ask(&format!("balloon wait {pages} 5000"))?;
        guest.ask(&format!("balloon inflate {start:#x} {pages}"))?;
        let job = last_job(&api)?;
        ensure!(job["state"] == "done" && job["kind"] == "vm.resize", "{job}");
        let info = api.get("vm.info")?;
        ensure!(info["memory_actual_size"] == RAM - 16 * MIB, "{info}");
        ensure!(info["config"]["balloon"]["size"] == 16 * MIB, "{info}");
        let less = full - resident()?;
        // Beside the guest's memory, the process has some that comes and goes; and where the guest has not been before, one byte may be a huge
        // page.
        let new = if memory.is_empty() { 6 } else { 1 } * MIB;
        ensure!(
            (16 * MIB - new..17 * MIB).contains(&less),
            "{less} bytes went back with '{memory}'"
        );
        // The balloon's pages are zeroes, the others as they were.
        guest.refused(&format!("mem verify {start:#x} 0x1000 1"))?;
        let (rest, len) = (start + 16 * MIB, 16 * MIB);
        resize(&api, 0)?;
        guest.ask("balloon wait 0 5000")?;
        guest.ask(&format!("balloon deflate {start:#x} {pages}"))?;
        ensure!(last_job(&api)?["state"] == "done");
        ensure!(api.get("vm.info")?["memory_actual_size"] == RAM);
        guest.ask(&format!("mem fill {start:#x} {:#x} 2", 16 * MIB))?;
        guest.ask(&format!("mem verify {start:#x} {:#x} 2", 16 * MIB))?;
        let checksum = |guest: &mut Guest| number(&guest.ask(&format!("mem checksum {rest:#x} {len:#x}"))?, "crc32");
        let before = checksum(&mut guest)?;
        guest.ask(&format!("mem fill {start:#x} {:#x} 1", 32 * MIB))?;
        ensure!(
            checksum(&mut guest)? == before,
            "the balloon changed what was not in it"
        );
    }
    Ok(Outcome::Passed)
}

fn targets_are_jobs(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "", "size=4M")?;
    // It is in the configuration from the start.
    guest.ask("balloon wait 1024 5000")?;
    let start = test_ram();
    guest.ask(&format!("balloon inflate {start:#x} 1024"))?;
    let jobs = || Ok::<_, anyhow::Error>(api.get("vm.jobs")?.as_array().map_or(0, Vec::len));
    wait("the guest's step is not seen", || {
        let there = api.get("vm.info")?["memory_actual_size"] == RAM - 4 * MIB;
        Ok(there.then_some(()))
    })?;
    let before = jobs()?;
    resize(&api, 4 * MIB)?;
    ensure!(jobs()? == before, "a target that is reached needs no job");
    resize(&api, 8 * MIB)?;
    resize(&api, 8 * MIB)?;
    ensure!(jobs()? == before + 1, "the same target is one job");
    guest.ask(&format!("balloon inflate {:#x} 512", start + 4 * MIB))?;
    let id = wait("progress", || {
        let jobs = api.get("vm.jobs")?;
        let job = jobs.as_array().and_then(|jobs| jobs.last()).context("no job")?;
        ensure!(job["state"] == "running" && job["phase"] == "balloon", "{job}");
        let there = job["progress"]["done"] == 6 * MIB && job["progress"]["total"] == 8 * MIB;
        Ok(there.then(|| job["id"].clone()))
    })?;
    resize(&api, 6 * MIB)?;
    let replaced = api.get(&format!("vm.job/{id}"))?;
    let error = replaced["error"].as_str().unwrap_or_default();
    ensure!(
        replaced["state"] == "failed" && error.contains("replaced"),
        "{replaced}"
    );
    ensure!(jobs()? == before + 1, "the new target is reached already");
    resize(&api, 16 * MIB)?;
    api.put("vm.reboot", None)?;
    let jobs = api.get("vm.jobs")?;
    let lost = jobs.as_array().into_iter().flatten().find(|job| {
        let error = job["error"].as_str().unwrap_or_default();
        error.contains("guest ended")
    });
    ensure!(lost.is_some(), "{jobs}");
    guest.wait_ready()?;
    guest.ask(&format!("balloon wait {} 5000", 16 * MIB / PAGE))?;
    Ok(Outcome::Passed)
}

fn what_cannot_be_is_refused(context: &Context) -> Result<Outcome> {
    let (guest, api) = start(context, "", "size=4M,id=b")?;
    let before = api.get("vm.info")?["config"].clone();
    for (bytes, words) in [
        (RAM + PAGE, "at most"),
        (100, "multiple of 4096"),
        (u64::MAX, "at most"),
    ] {
        let target = json!({ "desired_balloon": bytes }).to_string();
        let answer = api.request("PUT", "vm.resize", Some(&target))?;
        ensure!(answer.status == 400 && answer.body.contains(words), "{}", answer.body);
    }
    ensure!(api.get("vm.info")?["config"] == before, "a refusal changed something");
    ensure!(guest.vm().stderr().text().is_empty(), "{}", guest.vm().stderr().text());
    let guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?;
    let answer = api.request("PUT", "vm.resize", Some(r#"{"desired_balloon":4096}"#))?;
    ensure!(
        answer.status == 400 && answer.body.contains("no balloon"),
        "{}",
        answer.body
    );
    resize(api, 0)?;
    Ok(Outcome::Passed)
}

fn statistics_are_metrics(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "", "size=0,id=b")?;
    let free = || api.metric(r#"triarch_guest_memory_bytes{kind="free"}"#);
    ensure!(free()?.is_none());
    guest.ask("balloon free 12345")?;
    wait("the first statistics", || Ok(free()?.filter(|free| *free == 12345)))?;
    guest.ask("balloon wanted")?;
    guest.ask("balloon free 23456")?;
    wait("the second", || Ok(free()?.filter(|free| *free == 23456)))?;
    let counters = api.get("vm.counters")?;
    ensure!(counters["b"]["actual_bytes"] == 0, "{counters}");
    Ok(Outcome::Passed)
}

fn free_pages_are_the_hosts(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, ",shared=on", "size=0,free_page_reporting=on,id=b")?;
    let start = test_ram();
    guest.ask(&format!("mem fill {start:#x} {:#x} 1", 16 * MIB))?;
    let resident = || {
        api.metric("triarch_memory_resident_bytes")?
            .context("no resident memory")
    };
    let full = resident()?;
    guest.ask(&format!("balloon report {start:#x} {:#x}", 8 * MIB))?;
    let less = full - resident()?;
    // The kernel's figure is exact to a few pages of each thread.
    ensure!((7 * MIB..9 * MIB).contains(&less), "{less} bytes went back");
    guest.ask(&format!("mem fill {start:#x} {:#x} 2", 8 * MIB))?;
    guest.ask(&format!("mem verify {start:#x} {:#x} 2", 8 * MIB))?;
    let reported = api.metric(r#"triarch_balloon_bytes_total{balloon="b",operation="report"}"#)?;
    ensure!(reported == Some(8 * MIB), "{reported:?}");
    Ok(Outcome::Passed)
}
