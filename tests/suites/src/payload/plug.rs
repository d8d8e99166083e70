//! PCI devices come and go while the guest runs.

use super::data::pattern;
use super::edit::refused;
use super::guest::{Guest, builder, number};
use super::payload_tests;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, patient};

payload_tests!("plug":
    a_disk_comes_and_goes,
    it_keeps_its_place_over_resets,
    what_is_wrong_changes_nothing,
    a_removal_is_open_until_the_guest_answers,
    refusals_are_told,
    force_takes_it_from_a_guest_that_uses_it,
    a_reset_completes_a_removal,
    they_come_and_go_during_a_pause,
    a_guest_may_give_back_what_nobody_wants,
    what_the_guest_never_saw_is_taken_at_once,
    a_full_bus_is_emptied_and_filled_again,
);

/// Those that take their time.
pub const SLOW: &[Test] =
    &[Test::payload("plug::a_guest_may_be_late", a_guest_may_be_late).within(Duration::from_secs(120))];

pub(super) const SIZE: u64 = 1 << 20;
/// How long a job may take whose guest has done its part.
const LIMIT: Duration = Duration::from_secs(10);

/// A guest that is to get devices.
pub(super) struct Plug {
    pub(super) guest: Guest,
    pub(super) api: Api,
}

impl Plug {
    pub(super) fn start(context: &Context, more: &[(&str, &str)]) -> Result<Self> {
        let vm = more
            .iter()
            .fold(builder(context)?.api(), |vm, (flag, value)| vm.set(flag, value));
        let guest = Guest::start(vm)?;
        let api = guest.vm().api()?.clone();
        Ok(Self { guest, api })
    }

    pub(super) fn get(&self, route: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.api.request("GET", route, None)?.body)?)
    }

    /// Adds a device; returns its slot.
    pub(super) fn add(&self, route: &str, body: &Value) -> Result<u64> {
        let answer = self.api.request("PUT", route, Some(&body.to_string()))?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        let added: Value = serde_json::from_str(&answer.body)?;
        ensure!(body["id"].is_null() || added["id"] == body["id"], "{added}");
        let bdf = added["bdf"].as_str().context("no bdf")?;
        let slot = bdf.strip_prefix("0000:00:").and_then(|rest| rest.strip_suffix(".0"));
        let slot = u64::from_str_radix(slot.with_context(|| bdf.to_owned())?, 16)?;
        let function = format!("_virtio-pci-{}", added["id"].as_str().context("no id")?);
        ensure!(self.get("vm.info")?["device_tree"][&function]["pci_bdf"] == bdf);
        Ok(slot)
    }

    pub(super) fn add_disk(&self, id: &str, path: &Path) -> Result<u64> {
        self.add("vm.add-disk", &json!({ "id": id, "path": path }))
    }

    pub(super) fn remove(&self, id: &str, force: bool) -> Result<()> {
        let body = json!({ "id": id, "force": force }).to_string();
        let answer = self.api.put("vm.remove-device", Some(&body))?;
        ensure!(answer.is_empty(), "{answer}");
        Ok(())
    }

    /// The last job that is a removal, once it has ended.
    pub(super) fn last_removal(&self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + patient(limit);
        loop {
            let jobs = self.get("vm.jobs")?;
            let mut removals = jobs.as_array().context("no jobs")?.iter();
            let last = removals.rfind(|job| job["kind"] == "vm.remove-device");
            let last = last.context("no removal")?;
            if last["state"] != "running" {
                return Ok(last.clone());
            }
            if Instant::now() > deadline {
                bail!("the job does not end: {last}");
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub(super) fn done(&self, phase: &str) -> Result<()> {
        let job = self.last_removal(LIMIT)?;
        ensure!(job["state"] == "done" && job["phase"] == phase, "{job}");
        Ok(())
    }

    pub(super) fn failed(&self, limit: Duration, words: &[&str]) -> Result<()> {
        let job = self.last_removal(limit)?;
        let error = job["error"].as_str().unwrap_or_default();
        let has = words.iter().all(|word| error.contains(word));
        ensure!(job["state"] == "failed" && has, "{job}");
        Ok(())
    }

    /// The guest is told of so many devices, and takes them.
    pub(super) fn takes(&mut self, count: u64) -> Result<()> {
        let told = self.guest.ask(&format!("slots serve {count} 5000"))?;
        ensure!(told == format!("came={count} went=0 lost=0"), "{told}");
        Ok(())
    }

    /// Removes a device from a guest that gives it.
    pub(super) fn gives(&mut self, id: &str) -> Result<()> {
        self.guest.send("slots serve 1 5000")?;
        self.remove(id, false)?;
        ensure!(self.guest.answer()? == "came=0 went=1 lost=0");
        self.done(&format!("the guest gave back '{id}'"))
    }

    /// Waits until `vm.info` does not show the device any more.
    pub(super) fn gone(&self, id: &str) -> Result<()> {
        let deadline = Instant::now() + patient(LIMIT);
        while !self.is_gone(id)? {
            ensure!(Instant::now() < deadline, "{id} is still there");
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub(super) fn is_gone(&self, id: &str) -> Result<bool> {
        let info = self.get("vm.info")?;
        let quoted = format!("\"{id}\"");
        Ok(!info["config"].to_string().contains(&quoted) && info["device_tree"][id].is_null())
    }

    /// Events of devices that came and went: `added d`.
    pub(super) fn events(&self) -> Result<Vec<String>> {
        let events = self.get("vm.events?since=0&follow=false")?;
        let all = events.as_array().context("no events")?.iter();
        let text = |event: &Value| {
            Some(format!(
                "{} {}",
                event["event"].as_str()?,
                event["properties"]["id"].as_str()?
            ))
        };
        Ok(all
            .filter(|event| event["source"] == "device")
            .filter_map(text)
            .collect())
    }

    /// Whether the VMM has `path` open.
    pub(super) fn has_open(&self, path: &Path) -> Result<bool> {
        let path = fs::canonicalize(path)?;
        for entry in fs::read_dir(format!("/proc/{}/fd", self.guest.vm().pid()))? {
            // One may be closed meanwhile.
            if fs::read_link(entry?.path()).is_ok_and(|target| target == path) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn image(context: &Context, name: &str, seed: u64) -> Result<DiskImage> {
    DiskImage::with(context.dir.join(name), &pattern(seed, 0, SIZE as usize))
}

fn a_disk_comes_and_goes(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    for round in 0..3u64 {
        let slot = p.add_disk("second", second.path())?;
        p.takes(1)?;
        ensure!(p.guest.ask(&format!("slots status {slot}"))? == "0xf");
        p.guest.ask(&format!("blk 1 verify 0 100 {}", 2 + round))?;
        p.guest.ask(&format!("blk 1 write 0 2048 {}", 3 + round))?;
        p.guest.ask("blk 0 verify 0 100 1")?;
        ensure!(p.has_open(second.path())?);
        let metrics = p.api.request("GET", "/metrics", None)?.body;
        ensure!(
            metrics.contains("disk=\"second\"") && metrics.contains("triarch_devices 3"),
            "{metrics}"
        );

        p.gives("second")?;
        ensure!(p.is_gone("second")? && !p.has_open(second.path())?);
        ensure!(
            second.read(0, SIZE as usize)? == pattern(3 + round, 0, SIZE as usize),
            "lost"
        );
        ensure!(p.guest.ask(&format!("slots status {slot}"))? == "0x0");
        p.guest.refused("blk 1 info")?;
        p.guest.ask("blk 0 verify 0 100 1")?;
    }
    let metrics = p.api.request("GET", "/metrics", None)?.body;
    for line in [
        "triarch_devices 2",
        "triarch_device_changes_total{direction=\"add\",result=\"done\"} 3",
        "triarch_device_changes_total{direction=\"remove\",result=\"done\"} 3",
    ] {
        ensure!(metrics.contains(line), "no {line} in\n{metrics}");
    }
    ensure!(!metrics.contains("disk=\"second\""));
    ensure!(p.events()? == ["added second", "removed second"].repeat(3));
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn it_keeps_its_place_over_resets(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    let slot = p.add_disk("second", second.path())?;
    p.takes(1)?;
    p.guest.ask("blk 1 verify 0 100 2")?;
    let tree = p.get("vm.info")?["device_tree"].clone();
    p.guest.send("pm reset")?;
    p.guest.wait_ready()?;
    p.guest.ask("blk 1 verify 0 100 2")?;
    ensure!(p.get("vm.info")?["device_tree"] == tree);
    p.api.put("vm.reboot", None)?;
    p.guest.wait_ready()?;
    ensure!(p.get("vm.info")?["device_tree"] == tree);
    ensure!(p.guest.ask(&format!("slots status {slot}"))? == "0xf" && p.guest.ask("slots next")? == "none");
    p.gives("second")?;
    p.api.put("vm.reboot", None)?;
    p.guest.wait_ready()?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.refused("blk 1 info")?;
    ensure!(p.is_gone("second")?);
    Ok(Outcome::Passed)
}

fn what_is_wrong_changes_nothing(context: &Context) -> Result<Outcome> {
    let first = image(context, "first", 1)?;
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk), ("--balloon", "size=0,id=lend")])?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    let before = p.get("vm.info")?;
    let missing = context.dir.join("missing");
    for (route, body, status, words) in [
        (
            "vm.add-disk",
            json!({ "path": first.path() }),
            400,
            vec!["another disk"],
        ),
        ("vm.add-disk", json!({ "path": missing }), 400, vec!["does not exist"]),
        (
            "vm.add-disk",
            json!({ "path": "/a", "id": "first" }),
            400,
            vec!["'first'"],
        ),
        ("vm.add-disk", json!({ "path": "/a", "id": "_rng" }), 400, vec!["_rng"]),
        (
            "vm.add-fs",
            json!({ "tag": "t", "socket": "/s", "id": "shared" }),
            400,
            vec!["shared", "memory.shared"],
        ),
        (
            "vm.add-vsock",
            json!({ "cid": 3, "socket": "/nonexistent/s" }),
            400,
            vec!["No such file"],
        ),
        (
            "vm.add-net",
            json!({ "vhost_user": true, "vhost_socket": "/s" }),
            400,
            vec!["memory.shared"],
        ),
        (
            "vm.remove-device",
            json!({ "id": "second" }),
            404,
            vec!["second", "vm.info"],
        ),
        ("vm.remove-device", json!({ "id": "_rng" }), 400, vec!["_rng", "stays"]),
        (
            "vm.remove-device",
            json!({ "id": "_rng", "force": true }),
            400,
            vec!["_rng", "stays"],
        ),
        ("vm.remove-device", json!({ "id": "lend" }), 400, vec!["lend", "stays"]),
        ("vm.remove-device", json!({}), 400, vec!["id"]),
    ] {
        refused(&p.api, route, &body, status, &words)?;
        ensure!(p.get("vm.info")? == before, "{route} {body} changed something");
    }
    ensure!(p.guest.ask("slots events")? == "0x0" && p.guest.ask("slots next")? == "none");
    ensure!(!p.get("vm.jobs")?.to_string().contains("vm.remove-device") && p.events()?.is_empty());
    // What stays cannot be given back either.
    for slot in 0..32 {
        if slot != 1 {
            p.guest.ask(&format!("slots eject {slot}"))?;
        }
    }
    p.guest.ask("blk 0 verify 0 100 1")?;
    ensure!(p.get("vm.info")? == before);
    Ok(Outcome::Passed)
}

fn a_removal_is_open_until_the_guest_answers(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    p.add_disk("second", second.path())?;
    p.takes(1)?;
    p.remove("first", false)?;
    p.remove("second", false)?;
    for id in ["first", "second"] {
        refused(
            &p.api,
            "vm.remove-device",
            &json!({ "id": id }),
            429,
            &["Too Many Requests", id, "force"],
        )?;
        // It is there and works.
        refused(&p.api, "vm.add-disk", &json!({ "id": id, "path": "/a" }), 400, &[id])?;
    }
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.ask("blk 1 verify 0 100 2")?;
    let jobs = p.get("vm.jobs")?;
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
    let jobs = p.get("vm.jobs")?.to_string();
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

fn they_come_and_go_during_a_pause(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let mut p = Plug::start(context, &[])?;
    p.guest.vm().pause()?;
    p.add_disk("first", first.path())?;
    p.guest.vm().resume()?;
    p.takes(1)?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.vm().pause()?;
    p.remove("first", false)?;
    p.add_disk("second", second.path())?;
    thread::sleep(Duration::from_millis(300));
    ensure!(p.has_open(first.path())? && !p.is_gone("first")?);
    p.guest.vm().resume()?;
    let told = p.guest.ask("slots serve 2 5000")?;
    ensure!(told == "came=1 went=1 lost=0", "{told}");
    p.done("the guest gave back 'first'")?;
    p.guest.ask("blk 0 verify 0 100 2")?;
    p.guest.vm().pause()?;
    p.remove("second", true)?;
    p.done("'second' was taken by force")?;
    ensure!(!p.has_open(second.path())?);
    p.guest.vm().resume()?;
    ensure!(p.guest.ask("slots serve 1 5000")? == "came=0 went=0 lost=1");
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
    ensure!(!p.get("vm.jobs")?.to_string().contains("vm.remove-device"));
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
    p.gives("first")?;
    Ok(Outcome::Passed)
}

fn a_full_bus_is_emptied_and_filled_again(context: &Context) -> Result<Outcome> {
    let mut p = Plug::start(context, &[])?;
    let free = 32 - 1 - p.get("vm.info")?["device_tree"].as_object().context("no tree")?.len() as u64 / 2;
    let images = (0..=free).map(|n| image(context, &format!("disk{n}"), n));
    let images: Vec<DiskImage> = images.collect::<Result<_>>()?;
    for round in 0..2 {
        for n in 0..free {
            p.add_disk(&format!("d{n}"), images[n as usize].path())?;
        }
        let more = json!({ "id": "more", "path": images[free as usize].path() });
        refused(&p.api, "vm.add-disk", &more, 400, &["more", "32 PCI slots"])?;
        ensure!(!p.has_open(images[free as usize].path())? && p.is_gone("more")?);
        p.takes(free)?;
        for n in [0, free / 2, free - 1] {
            ensure!(number(&p.guest.ask(&format!("blk {n} info"))?, "sectors")? == SIZE / 512);
            p.guest.ask(&format!("blk {n} verify 0 100 {n}"))?;
        }
        for n in 0..free {
            p.remove(&format!("d{n}"), false)?;
        }
        let told = p.guest.ask(&format!("slots serve {free} 5000"))?;
        ensure!(told == format!("came=0 went={free} lost=0"), "{told}");
        for n in 0..free {
            p.gone(&format!("d{n}"))?;
        }
        ensure!(p.guest.ask("slots next")? == "none", "round {round}");
    }
    p.guest.power_off()?;
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
    let jobs = p.get("vm.jobs")?.to_string();
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
