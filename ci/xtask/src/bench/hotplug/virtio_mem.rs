//! Room of 64 GiB for memory by virtio-mem, and memory that comes and goes in it.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use super::super::client::{Client, Guest, Vmm, quantile};
use super::{More, RAM, Row, Setup, last_job, us};

const MIB: u64 = 1 << 20;
const ROOM_GIB: u64 = 64;
/// What comes and goes.
const PLUGGED: u64 = 256 * MIB;

/// With room for memory, or without.
fn start(setup: &Setup, room: bool) -> Result<(Vmm, Client, Guest)> {
    let mut more = More::default();
    if room {
        more.memory = format!(r#""hotplug_method":"VirtioMem","hotplug_size":{},"#, ROOM_GIB << 30);
    }
    setup.start(&more)
}

/// Nanoseconds since whenever, as a job tells them.
fn clock(time: &Value) -> Result<f64> {
    let part = |name: &str| time[name].as_f64().context("no time");
    Ok(part("secs")? * 1e9 + part("nanos")?)
}

/// Microseconds of the boot, and KiB of memory that only the VMM has.
fn cost(setup: &Setup, room: bool) -> Result<(f64, f64)> {
    let (vmm, mut client, _guest) = start(setup, room)?;
    let boot = last_job(&mut client, "vm.boot")?;
    let took = (clock(&boot["ended"])? - clock(&boot["started"])?) / 1000.0;
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", vmm.process.0.id()))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib: f64 = line
        .and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok())
        .context("no Private_Dirty")?;
    Ok((took, kib))
}

/// Microseconds from the request to its answer, and to the end of the job.
fn resize(client: &mut Client, guest: &mut Guest, plugged: u64) -> Result<(f64, f64)> {
    let body = format!(r#"{{"desired_ram":{}}}"#, RAM + plugged);
    let start = Instant::now();
    client.put("vm.resize", &body)?;
    let answer = us(start.elapsed());
    guest.ask(&format!("vmem 0 wait {plugged} 10000"))?;
    guest.ask(&format!("vmem 0 reach {plugged}"))?;
    last_job(client, "vm.resize")?;
    Ok((answer, us(start.elapsed())))
}

/// Measures them.
pub(super) fn measure(setup: &Setup) -> Result<Vec<Row>> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..setup.guests {
        with.push(cost(setup, true)?);
        without.push(cost(setup, false)?);
    }
    let (_vmm, mut client, mut guest) = start(setup, true)?;
    let (mut adds, mut removes) = (Vec::new(), Vec::new());
    for _ in 0..setup.rounds {
        adds.push(resize(&mut client, &mut guest, PLUGGED)?);
        removes.push(resize(&mut client, &mut guest, 0)?);
    }
    let times = |name: String, goal, samples: &[(f64, f64)], second: bool| {
        let of = |sample: &(f64, f64)| if second { sample.1 } else { sample.0 };
        Row::times(name, goal, samples.iter().map(of).collect())
    };
    let more = |of: fn(&(f64, f64)) -> f64| {
        let median = |samples: &[(f64, f64)]| quantile(&samples.iter().map(of).collect::<Vec<_>>(), 0.5);
        median(&with) - median(&without)
    };
    let mib = PLUGGED / MIB;
    Ok(vec![
        times("boot without room, ms".into(), "", &without, false),
        times(
            format!("boot with {ROOM_GIB} GiB of room for virtio-mem, ms"),
            "",
            &with,
            false,
        ),
        Row::one(
            format!("what a boot takes longer with {ROOM_GIB} GiB of room, ms"),
            "20",
            more(|sample| sample.0) / 1000.0,
        ),
        Row::one(
            format!("what the VMM has more of memory for {ROOM_GIB} GiB of room, KiB"),
            "",
            more(|sample| sample.1),
        ),
        times(format!("{mib} MiB added: answer, ms"), "5", &adds, false),
        times(format!("{mib} MiB added: job done, ms"), "", &adds, true),
        times(format!("{mib} MiB removed: answer, ms"), "5", &removes, false),
        times(format!("{mib} MiB removed: job done, ms"), "", &removes, true),
    ])
}
