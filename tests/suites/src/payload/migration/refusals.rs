//! What cannot be is refused, and the guest goes on.

use super::super::guest::{Guest, builder};
use super::super::payload_tests;
use super::{MIB, SECTORS, Waiting, begin, copying, joined, send, to, with_disk};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use triarch_harness::dice::Dice;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("migration::refusals":
    what_would_get_in_its_way_is_refused,
    a_destination_without_the_disk_refuses,
    what_does_not_fit_is_refused,
    garbage_is_no_guest,
);

fn what_would_get_in_its_way_is_refused(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, disk) = with_disk(context, kept.path())?;
    let mut guest = Guest::start(vm)?;
    guest.ask(&format!("mem fill {} {} 5", super::test_ram(), 40 * MIB))?;
    let api = guest.vm().api()?.clone();
    let none = api.request("GET", "vm.migration-progress", None)?;
    ensure!(none.status == 404, "{}", none.body);
    api.refused("vm.cancel-migration", &json!({}), 409, &["no migration"])?;
    api.refused("vm.set-migration", &json!({ "bandwidth": 1 }), 409, &["no migration"])?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let sending = begin(&guest, &waiting.address, &json!({ "bandwidth": MIB }))?;
    copying(&api)?;
    let there = waiting.api()?.clone();
    let snapshot = json!({ "destination_url": format!("file://{}", kept.path().join("s").display()) });
    let late = json!({ "path": disk });
    for (route, body) in [
        ("vm.pause", json!({})),
        ("vm.resume", json!({})),
        ("vm.shutdown", json!({})),
        ("vm.reboot", json!({})),
        ("vm.delete", json!({})),
        ("vm.resize", json!({ "desired_vcpus": 1 })),
        ("vm.resize-disk", json!({ "id": "_disk0", "desired_size": 32 * MIB })),
        ("vm.add-disk", late.clone()),
        ("vm.remove-device", json!({ "id": "_disk0" })),
        ("vm.snapshot", snapshot.clone()),
        ("vm.send-migration", to(&waiting.address, &json!({}))),
    ] {
        api.refused(route, &body, 409, &["migration is under way", "vm.cancel-migration"])?;
    }
    for (route, body) in [
        ("vm.boot", json!({})),
        ("vm.create", json!({ "payload": { "kernel": "/none" } })),
        ("vm.delete", json!({})),
        ("vm.receive-migration", json!({ "receiver_url": "unix:/none" })),
    ] {
        there.refused(route, &body, 409, &["migration is under way"])?;
    }
    guest.ask("hello")?;
    api.put("vm.cancel-migration", None)?;
    let failed = joined(sending);
    let error = format!("{:#}", failed.err().context("it was moved")?);
    ensure!(
        error.contains("cancelled") && error.contains("runs here") && error.contains("409"),
        "{error}"
    );
    waiting.failed()?;
    // All of that is possible again.
    guest.vm().pause()?;
    api.put("vm.snapshot", Some(&snapshot.to_string()))?;
    guest.vm().resume()?;
    guest.ask("blk 0 write 0 8 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// What a source is told that moves its guest to a destination with other disks.
fn refused(context: &Context, guest: &Guest, receive: &Value) -> Result<(String, String)> {
    let waiting = Waiting::start(context, "unix", receive)?;
    let failed = joined(begin(guest, &waiting.address, &json!({}))?);
    let told = format!("{:#}", failed.err().context("it was moved")?);
    ensure!(told.contains("runs here"), "{told}");
    let (_, there) = waiting.failed()?;
    Ok((told, there))
}

fn a_destination_without_the_disk_refuses(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, disk) = with_disk(context, kept.path())?;
    let mut guest = Guest::start(vm)?;
    guest.ask("blk 0 write 0 8 1")?;
    let elsewhere = |path: &std::path::Path| json!({ "config": { "disks": [{ "id": "_disk0", "path": path }] } });
    let missing = kept.path().join("missing");
    let (told, there) = refused(context, &guest, &elsewhere(&missing))?;
    ensure!(told.contains("missing") && there.contains("missing"), "{told}; {there}");
    for sectors in [SECTORS / 2, SECTORS * 2] {
        let other = DiskImage::empty(kept.path().join(format!("of-{sectors}")), sectors * 512)?;
        let (told, _) = refused(context, &guest, &elsewhere(other.path()))?;
        ensure!(
            told.contains("'_disk0'") && told.contains(&(sectors * 512).to_string()),
            "{told}"
        );
    }
    // Somebody has the disk when it is to be handed over: the source takes the guest up again.
    let copy = kept.path().join("copy");
    fs::copy(&disk, &copy)?;
    let other = Guest::start(builder(context)?.disk(&copy, ""))?;
    let (told, there) = refused(context, &guest, &elsewhere(&copy))?;
    ensure!(
        told.contains("holds a lock") && there.contains("holds a lock"),
        "{told}; {there}"
    );
    other.power_off()?;
    guest.ask("blk 0 write 8 8 2")?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    send(&guest, &waiting, &json!({}))?;
    let mut guest = waiting.guest(guest)?;
    guest.ask("blk 0 verify 0 8 1")?;
    guest.ask("blk 0 verify 8 8 2")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_does_not_fit_is_refused(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    for (config, words) in [
        (json!({ "memory": { "size": 128 * MIB } }), "memory"),
        (json!({ "disks": [{ "id": "none", "path": "/none" }] }), "disks"),
        (json!({ "net": [{ "id": "none", "tap": "none" }] }), "net"),
        (json!({ "serial": { "mode": "Nothing" } }), "serial"),
    ] {
        let (told, _) = refused(context, &guest, &json!({ "config": config }))?;
        ensure!(told.contains(words), "{told}");
    }
    let api = guest.vm().api()?.clone();
    for (body, status, words) in [
        (json!({ "destination_url": "file:///tmp" }), 400, "destination_url"),
        (json!({ "destination_url": "tcp:127.0.0.1:1" }), 400, "needs TLS"),
        (json!({ "destination_url": "unix:/none" }), 400, "/none"),
        (
            json!({ "destination_url": "unix:/none", "connections": 17 }),
            400,
            "connections",
        ),
        (
            json!({ "destination_url": "unix:/none", "downtime_ms": 0 }),
            400,
            "downtime_ms",
        ),
        (
            json!({ "destination_url": "unix:/none", "local": true }),
            400,
            "shared=on",
        ),
    ] {
        api.refused("vm.send-migration", &body, status, &[words])?;
        let state = api.get("vm.info")?["state"].clone();
        ensure!(state == "Running", "{state}");
    }
    // There is a VM here, and one comes into a VMM without one only.
    api.refused(
        "vm.receive-migration",
        &json!({ "receiver_url": "unix:/none" }),
        409,
        &["there is a VM"],
    )?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn garbage_is_no_guest(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let path = waiting
        .address
        .strip_prefix("unix:")
        .context("a unix socket")?
        .to_owned();
    let mut dice = Dice::new(3);
    for round in 0..20 {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        let len = 1 + dice.below(1 << (round % 16));
        let bytes: Vec<u8> = (0..len).map(|_| dice.number() as u8).collect();
        // It may be dropped before all of that was sent.
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 512]);
    }
    ensure!(
        !waiting.received.is_finished(),
        "the destination does not wait any more"
    );
    send(&guest, &waiting, &json!({}))?;
    guest = waiting.guest(guest)?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
