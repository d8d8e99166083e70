//! A stock kernel that works moves between two VMMs of one host, back and forth, while somebody talks with it.

use super::load::{self, LIMIT, complaints, uptime};
use super::moving::{GUEST, MAC, Receiving, Talk, said, send, spread};
use super::net::configure;
use super::place::{By, Place};
use crate::held::Held;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::net::{self, Ear, Tap};
use triarch_harness::suite::{self, Context, Outcome, Test};
use triarch_harness::vm::{Vm, VmBuilder};

pub const TESTS: &[Test] = &[
    Test::nested("migration::linux_6_1_goes_back_and_forth", |c| {
        goes_back_and_forth(c, Kernel::V6_1, By::Vmm)
    })
    .within(LONG)
    .soak(),
    Test::nested("migration::linux_6_12_goes_back_and_forth", |c| {
        goes_back_and_forth(c, Kernel::V6_12, By::Vmm)
    })
    .within(LONG)
    .soak(),
    Test::nested("migration::daemons::linux_6_1_goes_back_and_forth", |c| {
        goes_back_and_forth(c, Kernel::V6_1, By::Daemons)
    })
    .within(LONG)
    .soak(),
    Test::nested("migration::daemons::linux_6_12_goes_back_and_forth", |c| {
        goes_back_and_forth(c, Kernel::V6_12, By::Daemons)
    })
    .within(LONG)
    .soak(),
];

const LONG: Duration = Duration::from_secs(600);

const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 247, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const BRIDGE: &str = "triarch-b";
/// Of the VMM that the guest begins in, and of the other one.
const TAPS: [&str; 2] = ["triarch0", "triarch1"];
/// There, back, and there again: each VMM has been both sides.
const FEW: u32 = 3;
/// EtherTypes of what tells a network where somebody is.
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;

fn goes_back_and_forth(context: &Context, kernel: Kernel, by: By) -> Result<Outcome> {
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
    let place = |tap| Place::new(context, by, (disk.path(), false), tap);
    let places = [place(TAPS[0])?, place(TAPS[1])?];
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| places[0].devices(vm.api().cpus(2)))
        .boot()?;
    configure(&guest, GUEST)?;
    let talk = Talk::with(&guest, HOST)?;
    for load in [&load::soak(), load::MEMORY] {
        guest.shell(load)?;
    }
    works(&guest, &talk)?;
    let first = complaints(&guest)?;
    let mut journey = Journey {
        guest,
        other: VmBuilder::new(context)?.api().start()?,
        places,
        held: [None, None],
        downtimes: Vec::new(),
        silences: Vec::new(),
    };
    for round in 0..suite::moves(FEW) {
        journey = journey
            .goes_on(round, &talk)
            .with_context(|| format!("move {round} of Linux {kernel}"))?;
    }
    let Journey {
        guest,
        downtimes,
        silences,
        places,
        ..
    } = journey;
    load::ends(&guest)?;
    talk.ends(said(&guest)?)?;
    load::compare(&disk.read(0, load::BYTES)?, &load::soaked(&guest)?)?;
    let last = complaints(&guest)?;
    ensure!(last == first, "before: {first}\nand after: {last}");
    let [stood, silent] = [downtimes, silences].map(spread);
    suite::figure(&format!(
        "migration of Linux {kernel}, devices by {by:?}: it stood still {stood}; who talks with it heard nothing {silent}"
    ))?;
    guest.power_off()?;
    drop(places);
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
    /// What its devices are in each of the two.
    places: [Place; 2],
    /// What each VMM held when the guest came there first.
    held: [Option<Held>; 2],
    /// For how many milliseconds it stood still, each time.
    downtimes: Vec<u64>,
    /// For how many milliseconds nothing was heard of it, each time.
    silences: Vec<u64>,
}

impl Journey {
    /// Moves it to the other VMM, where all goes on.
    fn goes_on(mut self, round: u32, talk: &Talk) -> Result<Self> {
        let there = (round as usize + 1) % 2;
        let (began, before) = (Instant::now(), uptime(&self.guest)?);
        let ears = [Ear::at(BRIDGE, RARP)?, Ear::at(BRIDGE, ARP)?];
        let url = format!("unix:{}", self.other.dir().join("move.sock").display());
        let receiving = Receiving::start(self.other, &url, self.places[there].config(), &Value::Null)?;
        talk.silence();
        let told = send(self.guest.vm(), receiving.address(), &Value::Null).with_context(|| {
            let daemons = self.places.each_mut().map(Place::last_words);
            format!(
                "the source's last words:{}{}",
                self.guest.vm().last_words(),
                daemons.concat()
            )
        })?;
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
        self.silences.push(talk.silence());
        announced(&ears)?;
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

/// The network was told where the guest is now: switches by the VMM or its daemon, neighbours by the guest.
fn announced([rarp, arp]: &[Ear; 2]) -> Result<()> {
    let mac: Vec<u8> = MAC
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    let is_its = |frame: &[u8]| frame[..6] == [0xff; 6] && frame[6..12] == mac;
    rarp.hear(LIMIT, is_its).context("no reverse ARP")?;
    // Who asks for his own address tells it (RFC 5227, 3).
    let address = GUEST.octets();
    let of_itself =
        |frame: &[u8]| frame.len() >= 42 && is_its(frame) && frame[28..32] == address && frame[38..42] == address;
    arp.hear(LIMIT, of_itself).context("no gratuitous ARP")
}
