//! Processors come and go while the guest runs.

use super::guest::{Guest, builder, is_arm, number};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, patient};

payload_tests!("hotplug":
    processors_come_and_go,
    a_newer_target_replaces_what_the_guest_does_not_know_of,
    what_the_guest_never_saw_is_taken_back_at_once,
    while_a_removal_is_open_others_wait,
    refusals_are_told,
    wrong_targets_change_nothing,
    a_reset_and_a_boot_keep_them,
    a_reset_ends_an_open_resize,
    they_come_during_a_pause,
);

/// Those that take their time.
pub const SLOW: &[Test] = &[Test::payload("hotplug::a_guest_may_be_late", a_guest_may_be_late)
    .within(Duration::from_secs(180))
    .idle()];

/// How long a job may take whose guest has done its part.
const LIMIT: Duration = Duration::from_secs(10);

pub fn start(context: &Context, cpus: &str) -> Result<(Guest, Api)> {
    let guest = Guest::start(builder(context)?.set("--cpus", cpus).api())?;
    let api = guest.vm().api()?.clone();
    Ok((guest, api))
}

pub fn resize(api: &Api, vcpus: u32) -> Result<()> {
    api.put("vm.resize", Some(&json!({ "desired_vcpus": vcpus }).to_string()))?;
    Ok(())
}

fn refused(api: &Api, vcpus: u32, status: u16, words: &[&str]) -> Result<()> {
    api.refused("vm.resize", &json!({ "desired_vcpus": vcpus }), status, words)
}

/// Target, present and started vCPUs.
pub fn counts(api: &Api) -> Result<[u64; 3]> {
    let info = api.get("vm.info")?;
    let count = |name: &str| info["vcpus"][name].as_u64().context("no counts");
    let counts = [count("target")?, count("present")?, count("started")?];
    ensure!(info["config"]["cpus"]["boot_vcpus"] == counts[2], "{info}");
    Ok(counts)
}

/// Waits for these numbers: what the guest does by itself, no job tells of.
pub fn settled(api: &Api, wanted: [u64; 3]) -> Result<()> {
    let what = format!("they do not become {wanted:?}");
    let same = || Ok((counts(api)? == wanted).then_some(()));
    wait(&what, patient(LIMIT), same).with_context(|| format!("{:?}", counts(api)))
}

pub fn done(api: &Api, phase: &str) -> Result<()> {
    api.is_done("vm.resize", patient(LIMIT), phase)
}

fn failed(api: &Api, limit: Duration, words: &[&str]) -> Result<()> {
    api.has_failed("vm.resize", patient(limit), words)
}

/// Names of the threads.
fn threads(guest: &Guest) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", guest.vm().pid()))? {
        names.push(fs::read_to_string(task?.path().join("comm"))?.trim().to_owned());
    }
    Ok(names)
}

fn processors_come_and_go(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    ensure!(guest.ask("hot count")? == "4" && counts(&api)? == [1, 1, 1]);
    let absent = if is_arm() { "0xd" } else { "0x0" };
    ensure!(guest.ask("hot status 1")? == absent);
    guest.refused("hot start 1")?;

    resize(&api, 3)?;
    ensure!(counts(&api)? == [3, 3, 1]);
    ensure!(guest.ask("hot serve 2 5000")? == "started=2 ejected=0");
    done(&api, "the guest started vCPUs 1, 2")?;
    ensure!(counts(&api)? == [3, 3, 3]);
    for index in [1, 2] {
        guest.ask(&format!("hot ping {index}"))?;
        ensure!(guest.ask(&format!("hot status {index}"))? == "0xf");
        ensure!(threads(&guest)?.contains(&format!("vcpu{index}")));
    }
    let metrics = api.request("GET", "/metrics", None)?.body;
    for line in [
        "triarch_vcpus{count=\"started\"} 3",
        "triarch_vcpu_changes_total{direction=\"add\",result=\"done\"} 2",
        "triarch_vcpu_exits_total{vcpu=\"2\",reason=\"mmio_read\"}",
    ] {
        ensure!(metrics.contains(line), "no {line} in\n{metrics}");
    }

    resize(&api, 1)?;
    ensure!(guest.ask("hot serve 2 5000")? == "started=0 ejected=2");
    done(&api, "the guest gave back vCPUs 1, 2")?;
    ensure!(counts(&api)? == [1, 1, 1] && guest.ask("hot status 2")? == absent);
    resize(&api, 2)?;
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest started vCPU 1")?;
    guest.ask("hot ping 1")?;

    let events = api.get("vm.events?since=0&follow=false")?;
    let named = |event: &Value| (event["event"].as_str() != Some("started")).then(|| event["event"].clone());
    let vcpus = events.as_array().context("no events")?.iter();
    let vcpus = vcpus.filter(|event| event["source"] == "vcpu");
    let (ejected, started): (Vec<_>, Vec<_>) = vcpus.partition(|event| named(event).is_some());
    ensure!((ejected.len(), started.len()) == (2, 3), "{events}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_newer_target_replaces_what_the_guest_does_not_know_of(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    resize(&api, 1)?;
    ensure!(!api.get("vm.jobs")?.to_string().contains("vm.resize"));
    resize(&api, 4)?;
    resize(&api, 4)?;
    let jobs = || -> Result<usize> { Ok(api.get("vm.jobs")?.to_string().matches("vm.resize").count()) };
    ensure!(jobs()? == 1);
    resize(&api, 2)?;
    ensure!(jobs()? == 2 && counts(&api)? == [2, 2, 1]);
    let first = api.get("vm.job/2")?;
    ensure!(first["error"] == "it was replaced by a target of 2 vCPUs", "{first}");
    // What was withdrawn was never announced: only the one that is left is.
    let second = api.get("vm.job/3")?;
    ensure!(
        second["state"] == "running" && second["progress"]["done"] == 2,
        "{second}"
    );
    ensure!(guest.ask("hot serve 1 5000")? == "started=1 ejected=0");
    ensure!(guest.ask("hot next")? == "none");
    done(
        &api,
        "vCPUs 2, 3 were taken back before the guest saw them; the guest started vCPU 1",
    )?;
    ensure!(counts(&api)? == [2, 2, 2]);
    let metrics = api.request("GET", "/metrics", None)?.body;
    for (direction, result, count) in [("add", "replaced", 3), ("add", "done", 1), ("remove", "done", 2)] {
        let line = format!("triarch_vcpu_changes_total{{direction=\"{direction}\",result=\"{result}\"}} {count}");
        ensure!(metrics.contains(&line), "no {line} in\n{metrics}");
    }
    Ok(Outcome::Passed)
}

fn what_the_guest_never_saw_is_taken_back_at_once(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    resize(&api, 3)?;
    resize(&api, 1)?;
    done(&api, "vCPUs 1, 2 were taken back before the guest saw them")?;
    ensure!(counts(&api)? == [1, 1, 1] && guest.ask("hot next")? == "none");
    let events = api.get("vm.events?since=0&follow=false")?;
    let told = events.as_array().context("no events")?.iter();
    let told = told.filter(|event| event["source"] == "vm" && event["event"] == "resized");
    ensure!(told.count() == 1, "{events}");
    let vcpus = events.as_array().context("no events")?.iter();
    let vcpus = vcpus.filter(|event| event["source"] == "vcpu");
    ensure!(
        vcpus
            .map(|event| event["event"].clone())
            .eq(["withdrawn"; 2].map(|text| json!(text))),
        "{events}"
    );
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn while_a_removal_is_open_others_wait(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    resize(&api, 3)?;
    guest.ask("hot serve 2 5000")?;
    done(&api, "the guest started vCPUs 1, 2")?;
    resize(&api, 2)?;
    resize(&api, 2)?;
    for other in [1, 3, 4] {
        refused(&api, other, 429, &["Too Many Requests", "vCPU 2"])?;
    }
    refused(&api, 5, 400, &["5", "4"])?;
    ensure!(counts(&api)? == [2, 3, 3]);
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest gave back vCPU 2")?;
    resize(&api, 1)?;
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest gave back vCPU 1")?;
    Ok(Outcome::Passed)
}

fn refusals_are_told(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=3")?;
    resize(&api, 2)?;
    ensure!(guest.ask("hot events")? == "0x1" && guest.ask("hot next")? == "index=1 value=1");
    guest.ask("hot ost 1 1 0x81")?;
    failed(&api, LIMIT, &["does not take vCPU 1", "0x81", "Linux needs"])?;
    ensure!(counts(&api)? == [2, 2, 1]);
    // The guest has it all the same, and is told once more by whoever asks again.
    resize(&api, 2)?;
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest started vCPU 1")?;
    resize(&api, 1)?;
    ensure!(guest.ask("hot next")? == "index=1 value=3");
    guest.ask("hot ost 1 3 0x84")?;
    ensure!(counts(&api)? == [1, 2, 2]);
    guest.ask("hot ost 1 3 0x82")?;
    failed(&api, LIMIT, &["does not give back vCPU 1", "busy", "0x82"])?;
    ensure!(counts(&api)? == [2, 2, 2]);
    guest.ask("hot ping 1")?;
    // A guest may give one back without being asked.
    guest.ask("hot eject 1")?;
    settled(&api, [1, 1, 1])?;
    guest.ask("hot eject 0")?;
    ensure!(counts(&api)? == [1, 1, 1]);
    let metrics = api.request("GET", "/metrics", None)?.body;
    for direction in ["add", "remove"] {
        let line = format!("triarch_vcpu_changes_total{{direction=\"{direction}\",result=\"refused\"}} 1");
        ensure!(metrics.contains(&line), "no {line} in\n{metrics}");
    }
    Ok(Outcome::Passed)
}

fn wrong_targets_change_nothing(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=2,max=4")?;
    guest.ask("cpus")?;
    refused(&api, 0, 400, &["desired_vcpus is 0", "between"])?;
    refused(&api, 5, 400, &["desired_vcpus is 5", "4"])?;
    refused(&api, u32::MAX, 400, &["4294967295"])?;
    if is_arm() {
        refused(&api, 1, 400, &["booted with", "2"])?;
    }
    let both = json!({ "desired_vcpus": 3, "desired_ram": 1 << 30 }).to_string();
    let answer = api.request("PUT", "vm.resize", Some(&both))?;
    ensure!(answer.status == 400, "{} {}", answer.status, answer.body);
    ensure!(counts(&api)? == [2, 2, 2] && guest.ask("hot events")? == "0x0");
    ensure!(!api.get("vm.jobs")?.to_string().contains("vm.resize"));
    Ok(Outcome::Passed)
}

fn a_reset_and_a_boot_keep_them(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    resize(&api, 3)?;
    guest.ask("hot serve 2 5000")?;
    done(&api, "the guest started vCPUs 1, 2")?;
    guest.send("pm reset")?;
    guest.wait_ready()?;
    settled(&api, [3, 3, 3])?;
    ensure!(guest.ask("hot status 2")? == "0xf");
    if !is_arm() {
        ensure!(number(&guest.ask("cpus")?, "count")? == 3);
    }
    resize(&api, 2)?;
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest gave back vCPU 2")?;
    api.put("vm.reboot", None)?;
    guest.wait_ready()?;
    ensure!(counts(&api)? == [2, 2, 2]);
    let shut_down = |wanted: u32| -> Result<()> {
        api.put("vm.shutdown", None)?;
        let info = api.get("vm.info")?;
        let boot = &info["config"]["cpus"]["boot_vcpus"];
        ensure!(*boot == wanted && info["vcpus"].is_null(), "{info}");
        Ok(())
    };
    shut_down(2)?;
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    ensure!(counts(&api)? == [2, 2, 2]);
    // It has to keep what it was configured to boot with, and no more.
    resize(&api, 1)?;
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest gave back vCPU 1")?;
    // What a guest should have is what the next one gets, unless somebody wants another number.
    resize(&api, 3)?;
    shut_down(3)?;
    resize(&api, 4)?;
    let info = api.get("vm.info")?;
    ensure!(info["config"]["cpus"]["boot_vcpus"] == 4, "{info}");
    resize(&api, 1)?;
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    ensure!(counts(&api)? == [1, 1, 1]);
    Ok(Outcome::Passed)
}

fn a_reset_ends_an_open_resize(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    resize(&api, 3)?;
    guest.send("pm reset")?;
    guest.wait_ready()?;
    done(&api, "the guest was reset and has 3 vCPUs")?;
    ensure!(counts(&api)? == [3, 3, 3] && guest.ask("hot events")? == "0x0");
    resize(&api, 1)?;
    api.put("vm.reboot", None)?;
    guest.wait_ready()?;
    done(&api, "the guest was reset and has 1 vCPU")?;
    ensure!(number(&guest.ask("cpus")?, "count")? == 1);
    resize(&api, 2)?;
    api.put("vm.shutdown", None)?;
    failed(&api, LIMIT, &["the guest ended before"])?;
    Ok(Outcome::Passed)
}

fn they_come_during_a_pause(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    guest.vm().pause()?;
    resize(&api, 3)?;
    ensure!(counts(&api)? == [3, 3, 1]);
    guest.vm().resume()?;
    guest.vm().pause()?;
    guest.vm().resume()?;
    guest.ask("hot serve 2 5000")?;
    done(&api, "the guest started vCPUs 1, 2")?;
    guest.vm().pause()?;
    guest.vm().resume()?;
    guest.ask("hot ping 2")?;
    resize(&api, 2)?;
    guest.vm().pause()?;
    refused(&api, 3, 429, &["Too Many Requests"])?;
    guest.vm().resume()?;
    guest.ask("hot serve 1 5000")?;
    done(&api, "the guest gave back vCPU 2")?;
    // One that is parked stays so.
    for _ in 0..20 {
        guest.vm().pause()?;
        guest.vm().resume()?;
    }
    guest.ask("hot ping 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_guest_may_be_late(context: &Context) -> Result<Outcome> {
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    resize(&api, 2)?;
    failed(&api, Duration::from_secs(60), &["did not look at vCPU 1", "30 s"])?;
    ensure!(counts(&api)? == [2, 2, 1]);
    guest.ask("hot serve 1 5000")?;
    guest.ask("hot ping 1")?;
    settled(&api, [2, 2, 2])?;
    resize(&api, 1)?;
    ensure!(guest.ask("hot next")? == "index=1 value=3");
    failed(&api, Duration::from_secs(60), &["did not give back vCPU 1"])?;
    ensure!(counts(&api)? == [2, 2, 2]);
    guest.ask("hot eject 1")?;
    settled(&api, [1, 1, 1])?;
    Ok(Outcome::Passed)
}
