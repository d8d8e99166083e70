//! What a migration keeps to, and what is told of it.

use super::super::guest::{Guest, builder, number, test_ram};
use super::super::payload_tests;
use super::{MIB, Waiting, begin, copying, events, joined, progress};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("migration::limits":
    the_bandwidth_is_kept_and_can_be_changed,
    a_guest_that_writes_too_fast_stays,
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
    let of_vm = |api: &triarch_harness::api::Api| -> Result<Vec<String>> {
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
