//! What is in the way is told, all of it, and nothing is moved.

use super::super::guest::{Guest, builder};
use super::super::payload_tests;
use super::{MIB, SECTORS, Waiting, send, with_disk};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::Vm;

payload_tests!("migration::check":
    a_guest_that_would_go_is_not_moved,
    all_that_is_in_the_way_is_told,
    a_lock_of_somebody_else_is_in_the_way,
    who_cannot_be_asked_is_told,
);

/// What is in the way: to what it belongs, its name, and why with what would remove it.
fn check(api: &Api, address: &str) -> Result<Vec<(String, String, String)>> {
    let body = json!({ "destination_url": address }).to_string();
    let answer: Value = serde_json::from_str(&api.put("vm.check-migration", Some(&body))?)?;
    let blockers = answer["blockers"].as_array().context("no list")?;
    let text = |blocker: &Value, field: &str| blocker[field].as_str().unwrap_or_default().to_owned();
    let one = |blocker: &Value| {
        let why = format!("{}; {}", text(blocker, "reason"), text(blocker, "remedy"));
        (text(blocker, "what"), text(blocker, "name"), why)
    };
    Ok(blockers.iter().map(one).collect())
}

/// Whether one of `found` is this.
fn has(found: &[(String, String, String)], what: &str, name: &str, words: &str) -> bool {
    let is = |one: &&(String, String, String)| one.0 == what && one.1 == name && one.2.contains(words);
    found.iter().any(|one| is(&one))
}

fn a_guest_that_would_go_is_not_moved(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, _) = with_disk(context, kept.path())?;
    let mut guest = Guest::start(vm.cpus(2))?;
    let api = guest.vm().api()?.clone();
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    guest.send("blk 0 soak 2000 16 9 2000")?;
    for _ in 0..20 {
        let found = check(&api, &waiting.address)?;
        ensure!(found.is_empty(), "{found:?}");
    }
    guest.answer()?;
    ensure!(
        !waiting.received.is_finished(),
        "the destination does not wait any more"
    );
    let info = waiting.api()?.request("GET", "vm.info", None)?;
    ensure!(info.status == 404, "there is a VM: {}", info.body);
    // Nothing of it is left at the source either: it may be paused, and then be moved.
    guest.vm().pause()?;
    ensure!(check(&api, &waiting.address)?.is_empty());
    guest.vm().resume()?;
    send(&guest, &waiting, &json!({}))?;
    let mut guest = waiting.guest(guest)?;
    guest.ask("blk 0 soak 10 16 9 2000")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn all_that_is_in_the_way_is_told(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, _) = with_disk(context, kept.path())?;
    let second = DiskImage::empty(kept.path().join("second"), SECTORS * 512)?;
    let small = DiskImage::empty(kept.path().join("small"), SECTORS * 256)?;
    let socket = kept.path().join("vsock");
    let mut guest = Guest::start(
        vm.disk(second.path(), "num_queues=1")
            .flag("--vsock", format!("cid=42,socket={}", socket.display())),
    )?;
    let api = guest.vm().api()?.clone();
    let config = json!({
        "disks": [{ "id": "_disk0", "path": kept.path().join("missing") }, { "id": "_disk1", "path": small.path() }],
        "memory": { "size": 256 * MIB },
    });
    let waiting = Waiting::start(context, "unix", &json!({ "config": config }))?;
    let found = check(&api, &waiting.address)?;
    for (what, name, words) in [
        ("disk", "_disk0", "missing"),
        ("disk", "_disk1", &*(SECTORS * 256).to_string()),
        ("device", "_vsock2", &*socket.display().to_string()),
        ("memory", "", "memory"),
    ] {
        ensure!(has(&found, what, name, words), "{what} {name} {words}: {found:?}");
    }
    ensure!(found.len() == 4, "{found:?}");
    // The client shows it, and fails.
    let trictl = trictl(context, guest.vm(), &waiting.address)?;
    ensure!(!trictl.0 && trictl.1.contains("disk _disk0: "), "{}", trictl.1);
    waiting.api()?.put("vm.cancel-migration", None)?;
    let (vm, _) = waiting.failed()?;
    let waiting = Waiting::on(
        vm,
        "unix",
        &json!({ "config": { "disks": [{ "id": "none", "path": "/none" }] } }),
    )?;
    let found = check(&api, &waiting.address)?;
    ensure!(
        has(&found, "configuration", "", "'none'") && found.len() == 1,
        "{found:?}"
    );
    guest.ask("blk 0 write 0 8 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Whether the client found nothing in the way, and what it printed.
fn trictl(context: &Context, vm: &Vm, address: &str) -> Result<(bool, String)> {
    let socket = vm.api()?.socket().to_owned();
    let output = std::process::Command::new(context.triarch.with_file_name("trictl"))
        .arg("--api-socket")
        .arg(socket)
        .args(["check-migration", address])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((output.status.success(), text))
}

fn a_lock_of_somebody_else_is_in_the_way(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (vm, disk) = with_disk(context, kept.path())?;
    let guest = Guest::start(vm)?;
    let api = guest.vm().api()?.clone();
    let copy = kept.path().join("copy");
    fs::copy(&disk, &copy)?;
    let other = Guest::start(builder(context)?.disk(&copy, ""))?;
    let config = json!({ "config": { "disks": [{ "id": "_disk0", "path": copy }] } });
    let waiting = Waiting::start(context, "unix", &config)?;
    let found = check(&api, &waiting.address)?;
    ensure!(
        has(&found, "disk", "_disk0", "holds a lock") && found.len() == 1,
        "{found:?}"
    );
    other.power_off()?;
    let found = check(&api, &waiting.address)?;
    ensure!(found.is_empty(), "{found:?}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn who_cannot_be_asked_is_told(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    for (url, words) in [
        ("file:///tmp", "destination_url"),
        ("tcp:127.0.0.1:1", "needs TLS"),
        ("unix:/none", "/none"),
    ] {
        api.refused("vm.check-migration", &json!({ "destination_url": url }), 400, &[words])?;
    }
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let there = waiting.api()?.clone();
    there.refused(
        "vm.check-migration",
        &json!({ "destination_url": "unix:/none" }),
        409,
        &["migration is under way"],
    )?;
    waiting.api()?.put("vm.cancel-migration", None)?;
    let address = waiting.address.clone();
    let (_vm, _) = waiting.failed()?;
    // Nobody waits there any more.
    api.refused(
        "vm.check-migration",
        &json!({ "destination_url": address }),
        400,
        &["move.sock"],
    )?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
