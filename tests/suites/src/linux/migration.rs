//! A stock kernel that works moves between two VMMs of one host, back and forth, while somebody talks with it.

use super::load::{self, complaints, uptime};
use super::moving::{GUEST, MAC, NET, Receiving, Talk, said, send};
use super::net::configure;
use crate::held::Held;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{self, Context, Outcome, Test};
use triarch_harness::vm::{Vm, VmBuilder};

pub const TESTS: &[Test] = &[
    Test::nested("migration::linux_6_1_goes_back_and_forth", |c| {
        goes_back_and_forth(c, Kernel::V6_1)
    })
    .within(Duration::from_secs(600))
    .soak(),
    Test::nested("migration::linux_6_12_goes_back_and_forth", |c| {
        goes_back_and_forth(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(600))
    .soak(),
];

const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 247, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const BRIDGE: &str = "triarch-b";
/// Of the VMM that the guest begins in, and of the other one.
const TAPS: [&str; 2] = ["triarch0", "triarch1"];
/// There, back, and there again: each VMM has been both sides.
const FEW: u32 = 3;

fn goes_back_and_forth(context: &Context, kernel: Kernel) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    for tap in TAPS {
        Tap::without_address(tap, false)?;
    }
    net::bridge(BRIDGE, &TAPS)?;
    net::add_address(BRIDGE, HOST, MASK)?;
    let disk = DiskImage::empty(context.dir.join("disk"), 16 << 20)?;
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| {
            vm.api()
                .cpus(2)
                .disk(disk.path(), "")
                .flag("--net", format!("tap={},mac={MAC},id={NET}", TAPS[0]))
        })
        .boot()?;
    configure(&guest, GUEST)?;
    let talk = Talk::with(&guest, HOST)?;
    for load in [load::DISK, load::MEMORY] {
        guest.shell(load)?;
    }
    works(&guest, &talk)?;
    let first = complaints(&guest)?;
    let mut journey = Journey {
        guest,
        other: VmBuilder::new(context)?.api().start()?,
        held: [None, None],
        downtimes: Vec::new(),
    };
    for round in 0..suite::moves(FEW) {
        journey = journey
            .goes_on(round, &talk)
            .with_context(|| format!("move {round} of Linux {kernel}"))?;
    }
    let Journey { guest, downtimes, .. } = journey;
    load::ends(&guest)?;
    talk.ends(said(&guest)?)?;
    let last = complaints(&guest)?;
    ensure!(last == first, "before: {first}\nand after: {last}");
    suite::figure(&format!("migration of Linux {kernel}: {}", spread(downtimes)))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// All of the load goes on.
fn works(guest: &LinuxVm, talk: &Talk) -> Result<()> {
    load::works(guest)?;
    load::goes_on(guest, "remembered")?;
    load::goes_on(guest, "said")?;
    talk.goes_on()
}

/// A guest that has somewhere to go.
struct Journey {
    guest: LinuxVm,
    /// The VMM where it is not.
    other: Vm,
    /// What each VMM held when the guest came there first.
    held: [Option<Held>; 2],
    /// For how many milliseconds it stood still, each time.
    downtimes: Vec<u64>,
}

impl Journey {
    /// Moves it to the other VMM, where all goes on.
    fn goes_on(mut self, round: u32, talk: &Talk) -> Result<Self> {
        let there = (round as usize + 1) % 2;
        let (began, before) = (Instant::now(), uptime(&self.guest)?);
        let url = format!("unix:{}", self.other.dir().join("move.sock").display());
        let receiving = Receiving::start(self.other, &url, Some(TAPS[there]), &Value::Null)?;
        let told = send(self.guest.vm(), receiving.address(), &Value::Null)?;
        self.downtimes
            .push(told["downtime_ms"].as_u64().context("no downtime")?);
        let source = self.guest.into_vm();
        let guest = receiving
            .guest()
            .with_context(|| format!("the source's last words:{}", source.last_words()))?;
        let passed = uptime(&guest)? - before;
        let took = began.elapsed().as_secs_f64();
        ensure!(
            (0.0..took + 1.0).contains(&passed),
            "{passed} s passed for the guest, {took} s for the host"
        );
        works(&guest, talk)?;
        match &self.held[there] {
            Some(held) => held.is_all_of_beside_memory(guest.vm())?,
            None => self.held[there] = Some(Held::of(guest.vm())?),
        }
        Ok(Self {
            guest,
            other: source,
            ..self
        })
    }
}

/// The median and the longest of these times.
fn spread(mut millis: Vec<u64>) -> String {
    millis.sort_unstable();
    let (count, middle) = (millis.len(), millis.get(millis.len() / 2));
    let [middle, most] = [middle, millis.last()].map(|ms| ms.copied().unwrap_or_default());
    format!("{count} times, it stood still for {middle} ms in the middle, {most} ms at most")
}
