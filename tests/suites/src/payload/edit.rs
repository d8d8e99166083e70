//! A VM that changes between two boots, and what reaches a running one.

use super::data::pattern;
use super::guest::{Guest, builder, number};
use super::payload_tests;
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, patient};

payload_tests!("edit":
    disks_come_and_go,
    processors_and_memory_are_resized,
    a_disk_grows_under_the_guest,
    what_cannot_be_changed_stays;
    x86: an_nmi_reaches_every_processor: "NMIs",
);

const SIZE: u64 = 1 << 20;

fn config(api: &Api) -> Result<Value> {
    Ok(api.get("vm.info")?["config"].clone())
}

fn disks_come_and_go(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let first = DiskImage::with(vm.dir().join("first"), &pattern(1, 0, SIZE as usize))?;
    let second = DiskImage::with(vm.dir().join("second"), &pattern(2, 0, SIZE as usize))?;
    let mut guest = Guest::start(vm.disk(first.path(), "").api())?;
    let api = guest.vm().api()?.clone();
    guest.ask("blk 0 verify 0 100 1")?;
    api.put("vm.shutdown", None)?;
    api.put("vm.add-disk", Some(&json!({ "path": second.path() }).to_string()))?;
    ensure!(config(&api)?["disks"][1]["id"] == "_disk1");
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    guest.ask("blk 0 verify 0 100 1")?;
    guest.ask("blk 1 verify 0 100 2")?;
    api.put("vm.shutdown", None)?;
    api.put("vm.remove-device", Some(r#"{"id": "_disk0"}"#))?;
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    guest.ask("blk 0 verify 0 100 2")?;
    guest.refused("blk 1 verify 0 100 2")?;
    // The first one is not ours any more: another VM can have it.
    let mut other = Guest::start(builder(context)?.disk(first.path(), ""))?;
    other.ask("blk 0 verify 0 100 1")?;
    Ok(Outcome::Passed)
}

fn processors_and_memory_are_resized(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.set("--cpus", "boot=1,max=4").api())?;
    let api = guest.vm().api()?.clone();
    ensure!(number(&guest.ask("cpus")?, "count")? == 1);
    let same = json!({ "desired_vcpus": 1, "desired_ram": 64 << 20 });
    api.put("vm.resize", Some(&same.to_string()))?;
    api.refused(
        "vm.resize",
        &json!({ "desired_ram": 1 << 30 }),
        400,
        &["memory", "running", "hotplug_size"],
    )?;
    api.put("vm.shutdown", None)?;
    api.refused("vm.resize", &json!({ "desired_vcpus": 5 }), 400, &["5", "max"])?;
    api.refused("vm.resize", &json!({ "desired_vcpus": 0 }), 400, &["0", "1"])?;
    api.refused("vm.resize", &json!({ "desired_ram": 12345 }), 400, &["12345", "MiB"])?;
    let target = json!({ "desired_vcpus": 3, "desired_ram": 128 << 20 });
    api.put("vm.resize", Some(&target.to_string()))?;
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    ensure!(number(&guest.ask("cpus")?, "count")? == 3);
    let info = api.get("vm.info")?;
    ensure!(info["memory_actual_size"] == 128 << 20, "{info}");
    Ok(Outcome::Passed)
}

fn a_disk_grows_under_the_guest(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let mut guest = Guest::start(vm.disk(disk.path(), "").api())?;
    let api = guest.vm().api()?.clone();
    let sectors = |guest: &mut Guest| number(&guest.ask("blk 0 info")?, "sectors");
    ensure!(sectors(&mut guest)? == SIZE / 512);
    let resize = |size: u64| json!({ "id": "_disk0", "desired_size": size });
    api.put("vm.resize-disk", Some(&resize(4 * SIZE).to_string()))?;
    ensure!(sectors(&mut guest)? == 4 * SIZE / 512);
    let last = 4 * SIZE / 512 - 8;
    guest.ask(&format!("blk 0 write {last} 8 3"))?;
    guest.ask("blk 0 flush")?;
    ensure!(disk.read(last * 512, 8 * 512)? == pattern(3, last, 8 * 512));
    api.put("vm.resize-disk", Some(&resize(4 * SIZE).to_string()))?;
    api.refused("vm.resize-disk", &resize(SIZE), 400, &["lose data", "grow"])?;
    api.refused("vm.resize-disk", &resize(4 * SIZE + 1), 400, &["multiple", "512"])?;
    let other = json!({ "id": "disk9", "desired_size": SIZE });
    api.refused("vm.resize-disk", &other, 404, &["disk9", "vm.info"])?;
    ensure!(sectors(&mut guest)? == 4 * SIZE / 512);
    Ok(Outcome::Passed)
}

fn an_nmi_reaches_every_processor(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.cpus(3).api())?;
    // It counts those that are up.
    guest.ask("cpus")?;
    ensure!(guest.ask("count 2")? == "0");
    guest.vm().api()?.put("vm.nmi", None)?;
    // The others take it when the host runs them.
    let deadline = Instant::now() + patient(Duration::from_secs(5));
    while guest.ask("count 2")? != "3" {
        ensure!(Instant::now() < deadline, "{} of 3", guest.ask("count 2")?);
    }
    Ok(Outcome::Passed)
}

fn what_cannot_be_changed_stays(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let guest = Guest::start(vm.disk(disk.path(), "").api())?;
    let api = guest.vm().api()?.clone();
    api.put("vm.shutdown", None)?;
    let before = config(&api)?;
    for (route, body, status, words) in [
        (
            "vm.add-disk",
            json!({ "path": disk.path() }),
            400,
            vec!["disks[1].path", "another disk"],
        ),
        (
            "vm.add-disk",
            json!({ "path": "/a", "id": "_disk0" }),
            400,
            vec!["_disk0"],
        ),
        (
            "vm.add-disk",
            json!({ "path": "/a", "num_queues": 0 }),
            400,
            vec!["num_queues"],
        ),
        (
            "vm.add-disk",
            json!({ "path": "/a", "pci_segment": 1 }),
            501,
            vec!["pci_segment"],
        ),
        (
            "vm.add-disk",
            json!({ "path": "/a", "vhost_user": true, "vhost_socket": "/s" }),
            400,
            vec!["path", "vhost_user"],
        ),
        (
            "vm.add-net",
            json!({ "num_queues": 3 }),
            400,
            vec!["num_queues", "even"],
        ),
        ("vm.add-net", json!({ "id": "_rng" }), 400, vec!["_rng"]),
        (
            "vm.add-vsock",
            json!({ "cid": 1, "socket": "/s" }),
            400,
            vec!["cid", "3"],
        ),
        ("vm.add-vsock", json!({ "cid": 3 }), 400, vec!["socket"]),
        (
            "vm.remove-device",
            json!({ "id": "_rng" }),
            404,
            vec!["_rng", "removed"],
        ),
        ("vm.remove-device", json!({}), 400, vec!["id"]),
    ] {
        api.refused(route, &body, status, &words)?;
        ensure!(config(&api)? == before, "{route} {body} changed the configuration");
    }
    Ok(Outcome::Passed)
}
