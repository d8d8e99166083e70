//! Disks that come and go, and what they are to the guest meanwhile.

use super::{Plug, SIZE, image};
use crate::payload::data::pattern;
use crate::payload::guest::number;
use crate::payload::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::thread;
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("plug":
    a_disk_comes_and_goes,
    it_keeps_its_place_over_resets,
    they_come_and_go_during_a_pause,
    they_come_and_go_while_the_guest_boots,
    a_full_bus_is_emptied_and_filled_again,
);

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
    let tree = p.api.get("vm.info")?["device_tree"].clone();
    p.guest.send("pm reset")?;
    p.guest.wait_ready()?;
    p.guest.ask("blk 1 verify 0 100 2")?;
    ensure!(p.api.get("vm.info")?["device_tree"] == tree);
    p.api.put("vm.reboot", None)?;
    p.guest.wait_ready()?;
    ensure!(p.api.get("vm.info")?["device_tree"] == tree);
    ensure!(p.guest.ask(&format!("slots status {slot}"))? == "0xf" && p.guest.ask("slots next")? == "none");
    p.gives("second")?;
    p.api.put("vm.reboot", None)?;
    p.guest.wait_ready()?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.refused("blk 1 info")?;
    ensure!(p.is_gone("second")?);
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

fn they_come_and_go_while_the_guest_boots(context: &Context) -> Result<Outcome> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk)])?;
    for by_boot in [true, false] {
        if by_boot {
            p.api.put("vm.shutdown", None)?;
            p.api.put("vm.boot", None)?;
        } else {
            p.add_disk("first", first.path())?;
            p.api.put("vm.reboot", None)?;
        }
        // What it hears of it hears when it is up; it may have found them by itself.
        p.remove("first", false)?;
        p.add_disk("second", second.path())?;
        p.api.refused(
            "vm.remove-device",
            &json!({ "id": "first" }),
            429,
            &["Too Many Requests", "first"],
        )?;
        p.guest.wait_ready()?;
        ensure!(p.guest.ask("slots serve 2 5000")? == "came=1 went=1 lost=0");
        p.done("the guest gave back 'first'")?;
        ensure!(p.is_gone("first")? && !p.has_open(first.path())?);
        p.guest.ask("blk 0 verify 0 100 2")?;
        p.guest.refused("blk 1 info")?;
        p.gives("second")?;
    }
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_full_bus_is_emptied_and_filled_again(context: &Context) -> Result<Outcome> {
    let mut p = Plug::start(context, &[])?;
    let free = 32
        - 1
        - p.api.get("vm.info")?["device_tree"]
            .as_object()
            .context("no tree")?
            .len() as u64
            / 2;
    let images = (0..=free).map(|n| image(context, &format!("disk{n}"), n));
    let images: Vec<DiskImage> = images.collect::<Result<_>>()?;
    for round in 0..2 {
        for n in 0..free {
            p.add_disk(&format!("d{n}"), images[n as usize].path())?;
        }
        let more = json!({ "id": "more", "path": images[free as usize].path() });
        p.api.refused("vm.add-disk", &more, 400, &["more", "32 PCI slots"])?;
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
