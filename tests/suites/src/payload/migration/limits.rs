//! What a migration keeps to, and what is told of it.

use super::super::guest::{Guest, builder, number, test_ram};
use super::super::payload_tests;
use super::{MIB, Waiting, begin, copying, events, joined, progress};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, patient};

payload_tests!("migration::limits":
    the_bandwidth_is_kept_and_can_be_changed,
    a_guest_that_writes_too_fast_stays,
    a_guest_that_writes_too_fast_is_slowed_down,
    a_guest_that_stays_is_as_fast_as_before,
    what_happens_is_told,
);

fn the_bandwidth_is_kept_and_can_be_changed(context: &Context) -> Result<Outcome> {
    const CAP: u64 = 4 * MIB;
    let mut guest = Guest::start(builder(context)?.api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 40 * MIB))?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let sending = begin(&guest, &waiting.address, &json!({ "bandwidth": CAP, "connections": 3 }))?;
    let api = guest.vm().api()?.clone();
    copying(&api)?;
    // By what was sent in which time: a machine that is slower sends less.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        let now = progress(&api)?;
        let figure = |name: &str| now[name].as_u64().context("no figure");
        let (sent, ms) = (figure("wire_bytes")?, figure("elapsed_ms")?);
        // What is sent at once at the beginning comes on top.
        let allowed = CAP * (ms + 250) / 1000 + 2 * MIB;
        ensure!(sent <= allowed, "{sent} bytes were sent, and {allowed} may: {now}");
        ensure!(now["bandwidth"] == CAP && now["phase"] == "copying", "{now}");
    }
    guest.ask("hello")?;
    api.put("vm.set-migration", Some(&json!({ "bandwidth": null }).to_string()))?;
    joined(sending)?;
    let mut guest = waiting.guest(guest)?;
    guest.ask(&format!("mem verify {ram} {} 5", 40 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_guest_that_writes_too_fast_stays(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.send("dirty 8192 0 0")?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let api = guest.vm().api()?.clone();
    // 32 MiB are written again and again, of which no more than a twentieth goes in the time that the guest may stand still.
    let slowly = json!({ "bandwidth": 16 * MIB, "downtime_ms": 100, "timeout_s": 3 });
    let failed = joined(begin(&guest, &waiting.address, &slowly)?);
    let error = format!("{:#}", failed.err().context("it was moved")?);
    ensure!(
        error.contains("faster than it can be sent") && error.contains("runs here"),
        "{error}"
    );
    let last = progress(&api)?;
    ensure!(last["phase"] == "failed" && last["rounds"].as_u64() > Some(1), "{last}");
    let (vm, why) = waiting.failed()?;
    ensure!(why.contains("faster than it can be sent"), "{why}");
    // The operator may want it all the same.
    let waiting = Waiting::on(vm, "unix", &json!({}))?;
    let anyway = json!({ "bandwidth": 64 * MIB, "downtime_ms": 1, "timeout_s": 1, "timeout_strategy": "Ignore" });
    joined(begin(&guest, &waiting.address, &anyway)?)?;
    let mut guest = waiting.guest(guest)?;
    guest.send("")?;
    let answer = guest.answer()?;
    ensure!(number(&answer, "pages")? > 8192, "{answer}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Writes 4 MiB round and round, 80 MiB in a second that it has for itself: many times more than can be sent.
const BUSY: &str = "dirty 1024 0 0 spin=50";
/// How it is sent.
fn slowly(bandwidth: u64, throttle: u64) -> Value {
    json!({ "bandwidth": bandwidth, "downtime_ms": 100, "throttle": throttle })
}

/// Whether a thread of the VMM slows vCPUs down.
fn is_slowed_down(guest: &Guest) -> Result<bool> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.vm().pid()))?;
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    Ok(names.into_iter().any(|name| name.trim() == "throttle"))
}

/// By how many percent it was slowed down, one after the other.
fn throttled(api: &Api) -> Result<Vec<u64>> {
    let percent = |event: &Value| event["properties"]["percent"].as_u64().context("no figure");
    events(api, "throttled")?.iter().map(percent).collect()
}

fn a_guest_that_writes_too_fast_is_slowed_down(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.cpus(2).api())?;
    // Where the guest hardly gets a processor it does not write too fast.
    for _ in 0..5 {
        guest.send(BUSY)?;
        let waiting = Waiting::start(context, "unix", &json!({}))?;
        let api = guest.vm().api()?.clone();
        joined(begin(&guest, &waiting.address, &slowly(3 * MIB, 99))?)?;
        let seen = throttled(&api)?;
        guest = waiting.guest(guest)?;
        guest.send("")?;
        guest.answer()?;
        ensure!(!is_slowed_down(&guest)?, "it is slowed down at the destination");
        if seen.is_empty() {
            continue;
        }
        ensure!(seen[0] == 20 && seen.is_sorted(), "{seen:?}");
        ensure!(seen.iter().all(|percent| *percent <= 99), "{seen:?}");
        guest.power_off()?;
        return Ok(Outcome::Passed);
    }
    bail!("it never wrote too fast")
}

fn a_guest_that_stays_is_as_fast_as_before(context: &Context) -> Result<Outcome> {
    const MOST: u64 = 25;
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.send(BUSY)?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let api = guest.vm().api()?.clone();
    let sending = begin(&guest, &waiting.address, &slowly(2 * MIB, MOST))?;
    wait("it is not slowed down", patient(Duration::from_secs(60)), || {
        Ok((progress_of(&api)?["throttle"] == MOST).then_some(()))
    })?;
    ensure!(is_slowed_down(&guest)?);
    // It is never more.
    ensure!(throttled(&api)? == [20, MOST], "{:?}", throttled(&api)?);
    api.put("vm.cancel-migration", None)?;
    ensure!(joined(sending).is_err(), "it was moved");
    ensure!(throttled(&api)? == [20, MOST, 0], "{:?}", throttled(&api)?);
    ensure!(!is_slowed_down(&guest)?, "it is slowed down still");
    let last = progress(&api)?;
    ensure!(last["throttle"] == 0 && last["phase"] == "failed", "{last}");
    guest.send("")?;
    guest.answer()?;
    // Nobody may be slowed down without being told so.
    let (vm, _) = waiting.failed()?;
    let waiting = Waiting::on(vm, "unix", &json!({}))?;
    guest.send(BUSY)?;
    let never = json!({ "bandwidth": 2 * MIB, "downtime_ms": 100, "timeout_s": 3 });
    ensure!(
        joined(begin(&guest, &waiting.address, &never)?).is_err(),
        "it was moved"
    );
    ensure!(throttled(&api)?.len() == 3, "{:?}", throttled(&api)?);
    guest.send("")?;
    guest.answer()?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// How far the migration is; nothing where it has not begun.
fn progress_of(api: &Api) -> Result<Value> {
    let answer = api.request("GET", "vm.migration-progress", None)?;
    match answer.is_success() {
        true => Ok(serde_json::from_str(&answer.body)?),
        false => Ok(Value::Null),
    }
}

fn what_happens_is_told(context: &Context) -> Result<Outcome> {
    let guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    joined(begin(&guest, &waiting.address, &json!({}))?)?;
    let there = waiting.api()?.clone();
    for event in ["started", "switching", "committed"] {
        ensure!(events(&api, event)?.len() == 1, "{event}: {:?}", events(&api, event)?);
    }
    for event in ["listening", "prepared"] {
        ensure!(
            events(&there, event)?.len() == 1,
            "{event}: {:?}",
            events(&there, event)?
        );
    }
    let of_vm = |api: &Api| -> Result<Vec<String>> {
        let all = api.get("vm.events?since=0&follow=false")?;
        let all = all.as_array().context("no events")?.iter();
        let names = all
            .filter(|event| event["source"] == "vm")
            .filter_map(|event| event["event"].as_str());
        Ok(names.map(ToOwned::to_owned).collect())
    };
    let gone = of_vm(&api)?;
    ensure!(
        gone.ends_with(&["migrated".to_owned(), "deleted".to_owned()]),
        "{gone:?}"
    );
    ensure!(!gone.contains(&"shutdown".to_owned()), "{gone:?}");
    waiting.came()?;
    let came = of_vm(&there)?;
    ensure!(came == ["created", "received", "resumed"], "{came:?}");
    // The source is fit for another guest.
    let again = api.request("PUT", "vm.create", Some("{\"payload\":{\"kernel\":\"/none\"}}"))?;
    ensure!(again.is_success(), "{}", again.body);
    let guest = waiting.guest(guest)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// All tests; a guest that is slowed down step by step takes its time.
pub const ALL: [Test; 5] = [
    TESTS[0],
    TESTS[1],
    TESTS[2].within(Duration::from_secs(300)),
    TESTS[3].within(Duration::from_secs(200)),
    TESTS[4],
];
