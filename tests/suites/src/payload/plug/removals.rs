//! How removals end: given back, refused, forced, overtaken by a reset, or not at all.

use super::{LIMIT, Plug, SIZE, image};
use crate::payload::data::pattern;
use crate::payload::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::thread;
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome, Test};

payload_tests!("plug":
    a_removal_is_open_until_the_guest_answers,
    refusals_are_told,
    force_takes_it_from_a_guest_that_uses_it,
    a_reset_completes_a_removal,
    a_guest_may_give_back_what_nobody_wants,
    what_the_guest_never_saw_is_taken_at_once,
);

/// Those that take their time.
pub const SLOW: &[Test] = &[Test::payload("plug::a_guest_may_be_late", a_guest_may_be_late)
    .within(Duration::from_secs(120))
    .idle()];

fn a_removal_is_open_until_the_guest_answers(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    p.add_disk("second", second.path())?;
    p.takes(1)?;
    p.remove("first", false)?;
    p.remove("second", false)?;
    for id in ["first", "second"] {
        p.api.refused(
            "vm.remove-device",
            &json!({ "id": id }),
            429,
            &["Too Many Requests", id, "force"],
        )?;
        // It is there and works.
        p.api
            .refused("vm.add-disk", &json!({ "id": id, "path": "/a" }), 400, &[id])?;
    }
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.ask("blk 1 verify 0 100 2")?;
    let jobs = p.api.get("vm.jobs")?;
    let open = jobs
        .as_array()
        .context("no jobs")?
        .iter()
        .filter(|job| job["state"] == "running");
    ensure!(
        open.map(|job| job["phase"].clone())
            .eq(["first", "second"].map(|id| json!(format!("the guest has to give back '{id}'")))),
        "{jobs}"
    );
    // An interrupt that is lost is told again.
    ensure!(p.guest.ask("slots events")? == "0x4");
    thread::sleep(Duration::from_millis(400));
    let told = p.guest.ask("slots serve 2 5000")?;
    ensure!(told == "came=0 went=2 lost=0", "{told}");
    p.gone("first")?;
    p.gone("second")?;
    p.add_disk("first", second.path())?;
    p.takes(1)?;
    p.guest.ask("blk 0 verify 0 100 2")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn refusals_are_told(context: &Context) -> Result<Outcome> {
    let first = image(context, "first", 1)?;
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    p.remove("first", false)?;
    ensure!(p.guest.ask("slots next")? == "slot=1 value=3");
    p.guest.ask("slots ost 1 3 0x84")?;
    p.guest.ask("slots ost 1 3 0x82")?;
    p.failed(LIMIT, &["does not give back 'first'", "busy", "0x82", "force"])?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    let second = image(context, "second", 2)?;
    let slot = p.add_disk("second", second.path())?;
    for _ in 0..3 {
        p.guest.ask(&format!("slots ost {slot} 1 1"))?;
    }
    p.takes(1)?;
    ensure!(
        p.events()? == ["refused first", "added second", "refused second"],
        "{:?}",
        p.events()?
    );
    let metrics = p.api.request("GET", "/metrics", None)?.body;
    for direction in ["add", "remove"] {
        let line = format!("triarch_device_changes_total{{direction=\"{direction}\",result=\"refused\"}} 1");
        ensure!(metrics.contains(&line), "no {line} in\n{metrics}");
    }
    p.gives("first")?;
    Ok(Outcome::Passed)
}

fn force_takes_it_from_a_guest_that_uses_it(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let mut p = Plug::start(context, &[])?;
    let slot = p.add_disk("first", first.path())?;
    p.takes(1)?;
    p.guest.ask("blk 0 write 0 2048 7")?;
    p.remove("first", true)?;
    p.done("'first' was taken by force")?;
    ensure!(p.is_gone("first")? && !p.has_open(first.path())?);
    ensure!(first.read(0, SIZE as usize)? == pattern(7, 0, SIZE as usize), "lost");
    // Its slot is used again when there is no other, and the guest hears that it lost the device.
    let other = p.add_disk("second", second.path())?;
    ensure!(other != slot);
    ensure!(p.guest.ask("slots serve 2 5000")? == "came=1 went=0 lost=1");
    p.guest.ask("blk 0 verify 0 100 2")?;

    // The same after the guest was asked and did nothing.
    p.remove("second", false)?;
    ensure!(p.guest.ask("slots next")? == format!("slot={other} value=3"));
    p.remove("second", true)?;
    p.done("'second' was taken by force")?;
    ensure!(p.guest.ask("slots serve 1 5000")? == "came=0 went=0 lost=1");
    ensure!(
        p.guest
            .ask(&format!("slots look {other}"))?
            .starts_with("id=0xffffffff")
    );
    let jobs = p.api.get("vm.jobs")?.to_string();
    ensure!(jobs.matches("vm.remove-device").count() == 2, "{jobs}");
    let metrics = p.api.request("GET", "/metrics", None)?.body;
    ensure!(metrics.contains("triarch_device_changes_total{direction=\"remove\",result=\"forced\"} 2"));

    // In the middle of its work: what it took is finished, and nothing else happens to the guest.
    p.add_disk("first", first.path())?;
    p.takes(1)?;
    p.guest.ask("blk 0 init")?;
    p.guest.send("blk 0 soak 100000 16 1 1000")?;
    thread::sleep(Duration::from_millis(100));
    p.remove("first", true)?;
    p.done("'first' was taken by force")?;
    ensure!(p.guest.read_line()?.starts_with("err"));
    ensure!(p.guest.ask("slots serve 1 5000")? == "came=0 went=0 lost=1");
    p.add_disk("first", first.path())?;
    p.takes(1)?;
    p.guest.ask("blk 0 write 0 2048 9")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_reset_completes_a_removal(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    p.remove("first", false)?;
    p.guest.send("pm reset")?;
    p.guest.wait_ready()?;
    p.done("the guest ended, and 'first' was taken")?;
    ensure!(p.is_gone("first")? && !p.has_open(first.path())?);
    p.guest.refused("blk 0 info")?;
    p.add_disk("second", second.path())?;
    p.takes(1)?;
    p.remove("second", false)?;
    p.api.put("vm.reboot", None)?;
    p.guest.wait_ready()?;
    p.done("the guest ended, and 'second' was taken")?;
    p.guest.refused("blk 0 info")?;
    // One that it has not heard of yet is there after a reset all the same.
    p.add_disk("first", first.path())?;
    p.api.put("vm.reboot", None)?;
    p.guest.wait_ready()?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.remove("first", false)?;
    p.api.put("vm.shutdown", None)?;
    p.done("the guest ended, and 'first' was taken")?;
    p.api.put("vm.boot", None)?;
    p.guest.wait_ready()?;
    p.guest.refused("blk 0 info")?;
    ensure!(p.is_gone("first")?);
    Ok(Outcome::Passed)
}

fn a_guest_may_give_back_what_nobody_wants(context: &Context) -> Result<Outcome> {
    let first = image(context, "first", 1)?;
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.ask("slots give 1")?;
    p.gone("first")?;
    ensure!(!p.has_open(first.path())? && p.events()? == ["removed first"]);
    ensure!(!p.api.get("vm.jobs")?.to_string().contains("vm.remove-device"));
    // With its driver still at work.
    p.add_disk("first", first.path())?;
    p.takes(1)?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.ask("slots eject 1")?;
    p.gone("first")?;
    ensure!(!p.has_open(first.path())?);
    p.guest.ask("slots look 1")?;
    p.add_disk("first", first.path())?;
    p.takes(1)?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    Ok(Outcome::Passed)
}

fn what_the_guest_never_saw_is_taken_at_once(context: &Context) -> Result<Outcome> {
    let first = image(context, "first", 1)?;
    let mut p = Plug::start(context, &[])?;
    p.add_disk("first", first.path())?;
    p.remove("first", false)?;
    p.done("the guest had not looked at 'first'")?;
    ensure!(p.is_gone("first")? && p.guest.ask("slots next")? == "none");
    // One that it found by itself it is asked for.
    let slot = p.add_disk("first", first.path())?;
    p.guest.ask(&format!("slots look {slot}"))?;
    // It serves notices only now, since that of the coming device is there until that of the removal takes its place.
    p.remove("first", false)?;
    ensure!(p.guest.ask("slots serve 1 5000")? == "came=0 went=1 lost=0");
    p.done("the guest gave back 'first'")?;
    Ok(Outcome::Passed)
}

fn a_guest_may_be_late(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    let slot = p.add_disk("second", second.path())?;
    ensure!(p.guest.ask("slots next")? == format!("slot={slot} value=1"));
    p.remove("second", false)?;
    ensure!(p.guest.ask("slots next")? == format!("slot={slot} value=3"));
    p.remove("first", false)?;
    p.failed(Duration::from_secs(60), &["did not hear", "'first'", "30 s", "force"])?;
    let jobs = p.api.get("vm.jobs")?.to_string();
    ensure!(
        jobs.contains("the guest did not give back 'second' within 30 s"),
        "{jobs}"
    );
    ensure!(p.guest.ask("slots next")? == "none");
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.ask(&format!("slots look {slot}"))?;
    p.guest.ask("blk 1 verify 0 100 2")?;
    // It may still give it, and may be asked again.
    p.guest.ask(&format!("slots give {slot}"))?;
    p.gone("second")?;
    p.gives("first")?;
    Ok(Outcome::Passed)
}
