//! A disk and an interface come and go for a long time, while another disk works.

use super::{LIMIT, Plug, SIZE, image};
use crate::payload::data::pattern;
use crate::payload::guest::number;
use crate::soak::{Soak, Times};
use anyhow::{Result, ensure};
use serde_json::json;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::jobs::wait;
use triarch_harness::net;
use triarch_harness::suite::{Context, Outcome, Test, figure, is_patient, patient, rounds};

/// This module's tests.
pub const TESTS: &[Test] = &[Test::payload("plug::many_rounds_leave_nothing_behind", many_rounds)
    .within(Duration::from_secs(60))
    .soak()];

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Requests in flight on the disk that stays, and blocks of 4 KiB that they are about.
const DEPTH: u32 = 16;
const BLOCKS: u64 = SIZE / 4096;

/// A guest with the disk `stays`, which gets others.
struct Subject {
    p: Plug,
    adds: Times,
    removes: Times,
    /// Requests that the disk `stays` has served.
    requests: u64,
}

impl Subject {
    /// The guest does what `count` notices ask for, while the disk that stays works; `answer` is what it says of them.
    fn meanwhile(
        &mut self,
        count: u64,
        seed: u64,
        answer: &str,
        ask: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let limit = patient(LIMIT).as_millis();
        self.p
            .guest
            .send(&format!("slots busy {count} {limit} {DEPTH} {seed} {BLOCKS}"))?;
        ask(self)?;
        let said = self.p.guest.answer()?;
        ensure!(said.starts_with(answer), "{said}, not {answer}");
        self.requests += number(&said, "requests")?;
        Ok(())
    }

    fn round(&mut self, disk: &DiskImage, round: u64) -> Result<()> {
        self.meanwhile(2, 2 * round, "came=2 went=0 lost=0", |subject| {
            let begin = Instant::now();
            subject.p.add_disk("comes", disk.path())?;
            subject.adds.since(begin);
            let body = json!({ "id": "nic", "tap": "tap0", "ip": HOST, "mask": MASK });
            let begin = Instant::now();
            subject.p.add("vm.add-net", &body)?;
            subject.adds.since(begin);
            Ok(())
        })?;
        let guest = &mut self.p.guest;
        guest.ask(&format!("blk 1 verify 0 2048 {round}"))?;
        guest.ask(&format!("blk 1 write 0 2048 {}", round + 1))?;
        let echoes = guest.ask(&format!("net 0 ping {GUEST} {HOST} 2"))?;
        ensure!(number(&echoes, "echoes")? == 2, "{echoes}");
        // Every fifth time the guest is not asked.
        let by_force = round % 5 == 4;
        let answer = if by_force {
            "came=0 went=0 lost=2"
        } else {
            "came=0 went=2 lost=0"
        };
        self.meanwhile(2, 2 * round + 1, answer, |subject| {
            for id in ["comes", "nic"] {
                let begin = Instant::now();
                subject.p.remove(id, by_force)?;
                subject.removes.since(begin);
            }
            Ok(())
        })?;
        for id in ["comes", "nic"] {
            self.p.gone(id)?;
        }
        wait("a removal does not end", patient(LIMIT), || {
            let jobs = self.p.api.get("vm.jobs")?.to_string();
            Ok((!jobs.contains("\"running\"")).then_some(()))
        })?;
        ensure!(
            disk.read(0, SIZE as usize)? == pattern(round + 1, 0, SIZE as usize),
            "a write is lost"
        );
        ensure!(net::interfaces()? == ["lo"], "a tap stays");
        Ok(())
    }
}

fn many_rounds(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let (stays, comes) = (image(context, "stays", 0)?, image(context, "comes", 0)?);
    let disk = format!("path={},id=stays", stays.path().display());
    let mut subject = Subject {
        p: Plug::start(context, &[("--disk", &disk)])?,
        adds: Times::default(),
        removes: Times::default(),
        requests: 0,
    };
    let soak = Soak {
        rounds: rounds(if is_patient() { 6 } else { 20 }),
        // One of each way makes what is kept.
        settles: 5,
    };
    let soaked = soak.run(
        &mut subject,
        |subject| subject.p.guest.vm(),
        |subject, round| subject.round(&comes, round.into()),
    )?;
    let Subject {
        p,
        adds,
        removes,
        requests,
    } = subject;
    figure(&format!(
        "a disk and an interface: add answered {adds}; remove answered {removes}; {requests} requests of another disk; {soaked}"
    ))?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}
