//! `cargo xtask bench api`: how soon and how fast the API answers, also while a guest is built, and what the guest notices of it.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use triarch_harness::net::inheritable;

use super::client::{Client, Guest, Vmm, config, number, quantile, request};
use super::{Ended, shown};
use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::{payload, table, tools};

/// Requests a second beside which the guest is to be undisturbed.
const LOAD: u32 = 1000;
/// The guest works for so long at a time, in seconds: with the load and without, in turns.
const WORK: u64 = 1;
/// Boots during which requests are timed.
const BOOTS: u32 = 20;

/// Carries out the benchmark with so many starts, turns of the guest, and requests of each kind.
pub(super) fn run(starts: u32, turns: u32, requests: u32, profile: Profile) -> Result<()> {
    let program = build::program(Arch::native(), profile, "triarch", "triarch")?;
    let kernel = payload::build(Arch::native())?;
    let starts = tools::step(&format!("starting triarch {starts} times"), || {
        first_replies(&program, starts)
    })?;
    let calm = tools::step(&format!("asking {requests} times"), || {
        calm(&program, &kernel, requests)
    })?;
    let building = tools::step(&format!("asking during {BOOTS} boots"), || {
        while_building(&program, &kernel)
    })?;
    let guest = tools::step(&format!("letting the guest work {turns} times"), || {
        undisturbed(&program, &kernel, turns)
    })?;
    let row = |name: &str, goal: &str, value: f64| vec![name.to_owned(), goal.to_owned(), shown(value)];
    let mut lines = vec![["API", "goal", "triarch"].map(str::to_owned).to_vec()];
    lines.push(row(
        "exec to first reply, ms, min",
        "2",
        quantile(&starts, 0.0) / 1000.0,
    ));
    lines.push(row(
        "exec to first reply, ms, median",
        "",
        quantile(&starts, 0.5) / 1000.0,
    ));
    for (name, times) in calm.iter().chain([&("vm.info during a boot".to_owned(), building)]) {
        lines.push(row(&format!("{name}, us, p50"), "20", quantile(times, 0.5)));
        lines.push(row(&format!("{name}, us, p99"), "200", quantile(times, 0.99)));
    }
    lines.push(row(
        &format!("guest's work beside {LOAD} requests/s, ratio"),
        "1.00",
        guest,
    ));
    println!("{}", table::format(&lines));
    Ok(())
}

/// Microseconds from exec to the whole answer to a request that was there before.
fn first_replies(program: &Path, count: u32) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for round in 0..=count {
        let (mut command, listener, socket, _dir) = Vmm::prepare(program, &[])?;
        let mut client = Client::connect(&socket)?;
        let listener = inheritable(File::from(OwnedFd::from(listener)))?;
        command.args(["--api-socket", &format!("fd={}", listener.as_raw_fd())]);
        let start = Instant::now();
        let _process = Ended(command.spawn().context("triarch cannot be run")?);
        let status = client.call(&request("GET", "vmm.ping", ""))?;
        let took = start.elapsed();
        ensure!(status == 200, "vmm.ping answered {status}");
        // The first one warms caches.
        if round > 0 {
            times.push(took.as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// Times of questions while a guest idles.
fn calm(program: &Path, kernel: &Path, count: u32) -> Result<Vec<(String, Vec<f64>)>> {
    let vmm = Vmm::start(program, &[])?;
    let mut client = vmm.client()?;
    client.put("vm.create", &config(kernel, r#"{"mode":"Null"}"#))?;
    client.put("vm.boot", "")?;
    let mut result = Vec::new();
    for route in ["vmm.ping", "vm.info"] {
        let asked = request("GET", route, "");
        for _ in 0..100 {
            client.timed(&asked)?;
        }
        let times: Result<Vec<_>> = (0..count).map(|_| client.timed(&asked)).collect();
        result.push((route.to_owned(), times?));
    }
    Ok(result)
}

/// Times of questions while guests are built, one after the other.
fn while_building(program: &Path, kernel: &Path) -> Result<Vec<f64>> {
    let vmm = Vmm::start(program, &[])?;
    let (mut driver, mut client) = (vmm.client()?, vmm.client()?);
    driver.put("vm.create", &config(kernel, r#"{"mode":"Null"}"#))?;
    let asked = request("GET", "vm.info", "");
    let mut times = Vec::new();
    for _ in 0..BOOTS {
        let done = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let driver = scope.spawn(|| {
                let result = driver.put("vm.boot", "");
                done.store(true, Ordering::Release);
                result
            });
            while !done.load(Ordering::Acquire) {
                times.push(client.timed(&asked)?);
            }
            driver.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
        })?;
        driver.put("vm.shutdown", "")?;
    }
    Ok(times)
}

/// How much the guest does beside requests, compared with how much it does alone: the ratio of medians.
fn undisturbed(program: &Path, kernel: &Path, turns: u32) -> Result<f64> {
    let (vmm, mut client, mut guest) = Vmm::with_guest(program, |serial| config(kernel, serial))?;
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for turn in 0..=turns {
        let without = work(&mut guest)?;
        let stop = AtomicBool::new(false);
        let with = thread::scope(|scope| {
            let load = scope.spawn(|| load(&mut client, &stop));
            let with = work(&mut guest);
            stop.store(true, Ordering::Release);
            load.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
            with
        })?;
        // The first touches the memory.
        if turn > 0 {
            alone.push(without);
            beside.push(with);
        }
    }
    ensure!(
        fs::metadata(format!("/proc/{}", vmm.process.0.id())).is_ok(),
        "triarch ended"
    );
    Ok(quantile(&beside, 0.5) / quantile(&alone, 0.5))
}

/// Asks at an even rate until told to stop.
fn load(client: &mut Client, stop: &AtomicBool) -> Result<()> {
    let asked = request("GET", "vm.info", "");
    let start = Instant::now();
    let mut due = start;
    while !stop.load(Ordering::Acquire) {
        client.timed(&asked)?;
        due += Duration::from_secs(1) / LOAD;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// What the guest gets done in a second: pages that it counts up, round and round.
fn work(guest: &mut Guest) -> Result<f64> {
    let answer = guest.ask(&format!("dirty 16 0 {WORK}"))?;
    Ok(number(&answer, "pages")? / number(&answer, "us")?)
}
