//! Three vCPUs that the guest starts and gives back.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::super::client::{Client, Guest, Vmm, number};
use super::{Row, Setup, last_job, us};

const ADDED: u32 = 3;

/// What one resize took, in microseconds.
struct Sample {
    /// From the request to its answer.
    answer: f64,
    /// From the request until the guest did what it was asked and said so, without what it did.
    way: f64,
    /// What the guest did: from the first interrupt on.
    guest: f64,
    /// From the request until the job was done.
    job: f64,
}

fn resize(client: &mut Client, guest: &mut Guest, target: u32) -> Result<Sample> {
    // The guest listens already.
    guest.send(&format!("hot timed {ADDED} 10000"))?;
    let body = format!(r#"{{"desired_vcpus":{target}}}"#);
    let start = Instant::now();
    client.put("vm.resize", &body)?;
    let answer = us(start.elapsed());
    let said = guest.answer()?;
    let whole = us(start.elapsed());
    last_job(client, "vm.resize")?;
    let job = us(start.elapsed());
    let counts = [number(&said, "started")?, number(&said, "ejected")?];
    let all = f64::from(ADDED);
    let wanted = if target == 1 { [0.0, all] } else { [all, 0.0] };
    ensure!(counts == wanted, "{said}");
    let guest = number(&said, "us")?;
    Ok(Sample {
        answer,
        way: whole - guest,
        guest,
        job,
    })
}

fn start(setup: &Setup) -> Result<(Vmm, Client, Guest)> {
    let cpus = format!(r#""cpus":{{"boot_vcpus":1,"max_vcpus":{}}},"#, 1 + ADDED);
    Vmm::with_guest(&setup.program, |serial| setup.config(&cpus, serial))
}

/// Measures them.
pub(super) fn measure(setup: &Setup) -> Result<Vec<Row>> {
    let mut first = Vec::new();
    for _ in 0..setup.guests {
        let (_vmm, mut client, mut guest) = start(setup)?;
        first.push(resize(&mut client, &mut guest, 1 + ADDED)?);
    }
    let (_vmm, mut client, mut guest) = start(setup)?;
    let (mut adds, mut removes) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    for _ in 0..setup.rounds {
        adds.push(resize(&mut client, &mut guest, 1 + ADDED)?);
        removes.push(resize(&mut client, &mut guest, 1)?);
    }
    let rate = f64::from(setup.rounds) / begin.elapsed().as_secs_f64();
    let mut rows = Vec::new();
    for (name, samples) in [("first time", &first), ("added again", &adds), ("removed", &removes)] {
        let row = |what: &str, goal, of: fn(&Sample) -> f64| {
            let name = format!("{ADDED} vCPUs {name}: {what}, ms");
            Row::times(name, goal, samples.iter().map(of).collect())
        };
        rows.push(row("answer", "5", |s| s.answer));
        rows.push(row("request to guest's answer but for its work", "50", |s| s.way));
        rows.push(row("the guest's work", "", |s| s.guest));
        rows.push(row("job done", "", |s| s.job));
    }
    rows.push(Row::one(format!("{ADDED} vCPUs come and go, rounds/s"), "", rate));
    Ok(rows)
}
