//! A disk that the guest takes and gives back.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::super::client::{Client, Guest, Vmm, number};
use super::{Row, Setup, last_job, us};

/// What one change took, in microseconds.
struct Sample {
    /// From the request to its answer.
    answer: f64,
    /// From the request until the guest did what it was asked and said so, without what it did.
    way: f64,
    /// What the guest did: from the first interrupt on.
    guest: f64,
    /// From the request until the host has everything back.
    job: f64,
}

/// The guest listens already.
fn change(client: &mut Client, guest: &mut Guest, route: &str, body: &str) -> Result<Sample> {
    let adds = route.starts_with("vm.add");
    guest.send("slots timed 1 10000")?;
    let start = Instant::now();
    client.put(route, body)?;
    let answer = us(start.elapsed());
    let said = guest.answer()?;
    let whole = us(start.elapsed());
    if !adds {
        last_job(client, "vm.remove-device")?;
    }
    let job = us(start.elapsed());
    let counts = [number(&said, "came")?, number(&said, "went")?];
    ensure!(counts == if adds { [1.0, 0.0] } else { [0.0, 1.0] }, "{said}");
    let guest = number(&said, "us")?;
    Ok(Sample {
        answer,
        way: whole - guest,
        guest,
        job,
    })
}

fn add(client: &mut Client, guest: &mut Guest, disk: &Path) -> Result<Sample> {
    let body = serde_json::json!({ "id": "data", "path": disk }).to_string();
    let sample = change(client, guest, "vm.add-disk", &body)?;
    // It is a disk that works.
    guest.ask("blk 0 read 0 8")?;
    Ok(sample)
}

fn start(setup: &Setup) -> Result<(Vmm, Client, Guest)> {
    Vmm::with_guest(&setup.program, |serial| setup.config("", serial))
}

/// Measures them.
pub(super) fn measure(setup: &Setup) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    File::create(&disk)?.set_len(1 << 20).context("the disk's image")?;
    let mut first = Vec::new();
    for _ in 0..setup.guests {
        let (_vmm, mut client, mut guest) = start(setup)?;
        first.push(add(&mut client, &mut guest, &disk)?);
    }
    let (_vmm, mut client, mut guest) = start(setup)?;
    let (mut adds, mut removes) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    for _ in 0..setup.rounds {
        adds.push(add(&mut client, &mut guest, &disk)?);
        removes.push(change(&mut client, &mut guest, "vm.remove-device", r#"{"id":"data"}"#)?);
    }
    let rate = f64::from(setup.rounds) / begin.elapsed().as_secs_f64();
    let mut rows = Vec::new();
    for (name, samples) in [("first time", &first), ("added again", &adds), ("removed", &removes)] {
        let mut row = |what: &str, goal, of: fn(&Sample) -> f64| {
            let name = format!("disk {name}: {what}, ms");
            rows.push(Row::times(name, goal, samples.iter().map(of).collect()));
        };
        row("answer", "5", |s| s.answer);
        row("request to guest's answer but for its work", "50", |s| s.way);
        row("the guest's work", "", |s| s.guest);
        if name == "removed" {
            row("job done", "", |s| s.job);
        }
    }
    rows.push(Row::one("disk comes, is read and goes, rounds/s", "", rate));
    Ok(rows)
}
