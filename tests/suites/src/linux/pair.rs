//! A stock kernel moves between two hosts, or is refused. Each test runs on both hosts at the same time: here, where the guest begins,
//! and there. The two agree over the wire that leads from one host to the other.

use super::load::{self, LIMIT, complaints};
use super::moving::{GUEST, MOVE, Receiving, Talk, said, send, spread};
use super::net::configure;
use super::place::{By, Place};
use crate::payload::migration::tls::Authority;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;
use triarch_harness::images::Kernel;
use triarch_harness::jobs::wait;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{self, Context, Outcome, Side, Test};
use triarch_harness::vm::{Vm, VmBuilder};

pub const TESTS: &[Test] = &[
    Test::pair("pair::a_guest_stays_where_the_other_host_lacks_something", stays),
    Test::pair("pair::linux_6_1_goes_over_and_back", |c| {
        goes_over(c, Kernel::V6_1, By::Vmm)
    })
    .within(LONG)
    .soak(),
    Test::pair("pair::linux_6_12_goes_over_and_back", |c| {
        goes_over(c, Kernel::V6_12, By::Vmm)
    })
    .within(LONG)
    .soak(),
    Test::pair("pair::daemons::linux_6_1_goes_over_and_back", |c| {
        goes_over(c, Kernel::V6_1, By::Daemons)
    })
    .within(LONG)
    .soak(),
    Test::pair("pair::daemons::linux_6_12_goes_over_and_back", |c| {
        goes_over(c, Kernel::V6_12, By::Daemons)
    })
    .within(LONG)
    .soak(),
];

const LONG: Duration = Duration::from_secs(600);
/// How the address of the interface begins that leads to the other host.
const WIRE: &str = "52:54:00:00:0b:";
/// The disk that both hosts have.
const DISK: &str = "/dev/vda";
const BRIDGE: &str = "triarch-b";
const TAP: &str = "triarch0";
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Where the tests of both hosts meet.
const MEETING: u16 = 4000;
/// Over and back.
const FEW: u32 = 2;

/// The address of a host.
fn address(side: Side) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 247, if side == Side::Here { 1 } else { 2 })
}

/// The interface that leads to the other host.
fn wire() -> Result<String> {
    for interface in fs::read_dir("/sys/class/net")? {
        let interface = interface?;
        if fs::read_to_string(interface.path().join("address")).is_ok_and(|address| address.starts_with(WIRE)) {
            return Ok(interface.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("there is no interface with an address {WIRE}..");
}

/// The test on the other host.
struct Peer {
    side: Side,
    lines: BufReader<TcpStream>,
}

impl Peer {
    /// Meets it, once this host's network is made.
    fn meet(side: Side, subject: &str) -> Result<Self> {
        if !net::interfaces()?.iter().any(|name| name == BRIDGE) {
            Tap::without_address(TAP, false)?;
            net::bridge(BRIDGE, &[&wire()?, TAP])?;
            net::add_address(BRIDGE, address(side), MASK)?;
        }
        let stream = match side {
            Side::Here => TcpListener::bind((address(side), MEETING))?.accept()?.0,
            Side::There => wait("nobody is at the other host", LIMIT, || {
                Ok(TcpStream::connect((address(Side::Here), MEETING)).ok())
            })?,
        };
        stream.set_read_timeout(Some(MOVE))?;
        let lines = BufReader::new(stream);
        let mut peer = Self { side, lines };
        peer.agrees(subject)?;
        Ok(peer)
    }

    fn says(&mut self, what: &Value) -> Result<()> {
        Ok(writeln!(self.lines.get_mut(), "{what}")?)
    }

    fn hears(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the test on the other host has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Both are at the same point.
    fn agrees(&mut self, point: &str) -> Result<()> {
        self.says(&json!(point))?;
        let theirs = self.hears().with_context(|| format!("at {point}"))?;
        ensure!(theirs == point, "this host is at {point}, the other one at {theirs}");
        Ok(())
    }

    /// Certificates of an authority of this test's own, for both hosts: what a request of this one has of that.
    fn certificates(&mut self, dir: &Path) -> Result<Value> {
        const FILES: [&str; 3] = ["certificate", "key", "ca"];
        if self.side == Side::Here {
            // Its files are gone with it.
            let authority = Authority::new()?;
            let ours = authority.pair("here.test", "there.test")?;
            let (mut text, mut kept) = (ours.destination.clone(), ours.source);
            for name in FILES {
                let read = |tls: &Value| fs::read_to_string(tls[name].as_str().unwrap_or_default());
                text[name] = json!(read(&ours.destination)?);
                kept[name] = json!(write(dir, name, &read(&kept)?)?);
            }
            self.says(&text)?;
            return Ok(kept);
        }
        let mut tls = self.hears()?;
        for name in FILES {
            tls[name] = json!(write(dir, name, tls[name].as_str().context("no certificate")?)?);
        }
        Ok(tls)
    }
}

fn write(dir: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, text)?;
    Ok(path)
}

/// What a guest gets here: the disk that both hosts have, and an interface.
fn place(context: &Context, by: By) -> Result<Place> {
    // Neither host keeps a copy of what the other one writes.
    Place::new(context, by, (Path::new(DISK), true), TAP)
}

fn boot(context: &Context, kernel: Kernel, place: &Place) -> Result<LinuxVm> {
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| place.devices(vm.api()))
        .boot()?;
    configure(&guest, GUEST)?;
    for load in [&load::soak(), load::MEMORY] {
        guest.shell(load)?;
    }
    Ok(guest)
}

/// What a host has of the guest.
enum Has {
    Guest(LinuxVm),
    Nothing(Vm),
}

fn goes_over(context: &Context, kernel: Kernel, by: By) -> Result<Outcome> {
    let Some(side) = Side::of_this_host() else {
        return Ok(Outcome::Skipped("this host is not one of two".into()));
    };
    if std::env::var_os(suite::LACKS).is_some() {
        return Ok(Outcome::Skipped("the other host lacks something".into()));
    }
    let mut peer = Peer::meet(side, &format!("Linux {kernel}, devices by {by:?}"))?;
    let tls = peer.certificates(&context.dir)?;
    let mut place = place(context, by)?;
    let (mut has, talk) = match side {
        Side::Here => {
            let guest = boot(context, kernel, &place)?;
            let talk = Talk::with(&guest, address(side))?;
            works(&guest)?;
            let said = complaints(&guest)?;
            guest.agent().put("/load/complaints", 0o600, said.as_bytes())?;
            (Has::Guest(guest), Some(talk))
        }
        Side::There => (Has::Nothing(VmBuilder::new(context)?.api().start()?), None),
    };
    let mut silences = Vec::new();
    for round in 0..suite::moves(FEW) {
        let what = format!("move {round}");
        peer.agrees(&what)?;
        talk.as_ref().map(Talk::silence);
        has = moved(has, &mut peer, &place, &tls).with_context(|| format!("{what}{}", place.last_words()))?;
        // Whoever it talks with is here, wherever it is.
        if let Some(talk) = &talk {
            talk.goes_on()?;
            silences.push(talk.silence());
        }
    }
    peer.agrees("the end")?;
    let number = match has {
        Has::Guest(guest) => {
            load::ends(&guest)?;
            let number = said(&guest)?;
            load::compare(&written()?, &load::soaked(&guest)?)?;
            let first = String::from_utf8(guest.agent().get("/load/complaints")?)?;
            let last = complaints(&guest)?;
            ensure!(last == first, "before: {first}\nand after: {last}");
            guest.power_off()?;
            peer.says(&json!(number))?;
            number
        }
        Has::Nothing(_) => peer.hears()?.as_u64().context("no number")?,
    };
    if let Some(talk) = talk {
        talk.ends(number)?;
        let silent = spread(silences);
        suite::figure(&format!(
            "migration of Linux {kernel}, devices by {by:?}: who talks with it heard nothing {silent}"
        ))?;
    }
    Ok(Outcome::Passed)
}

/// What the disk holds from its start on, and not what this host remembers of it.
fn written() -> Result<Vec<u8>> {
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let mut bytes = Vec::new();
    File::open(DISK)?.take(load::BYTES as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// All of the load goes on.
fn works(guest: &LinuxVm) -> Result<()> {
    ["good", "remembered", "said"]
        .iter()
        .try_for_each(|what| load::goes_on(guest, what))
}

/// Moves the guest from the host that has it to the other one.
fn moved(has: Has, peer: &mut Peer, place: &Place, tls: &Value) -> Result<Has> {
    match has {
        Has::Guest(guest) => {
            let there = peer.hears()?;
            let told = send(guest.vm(), there.as_str().context("no address")?, tls)
                .with_context(|| format!("the source's last words:{}", guest.vm().last_words()))?;
            let [ms, rounds, bytes] = ["downtime_ms", "rounds", "wire_bytes"].map(|name| told[name].clone());
            suite::figure(&format!(
                "from {}: it stood still for {ms} ms, {rounds} rounds, {bytes} bytes",
                peer.side
            ))?;
            Ok(Has::Nothing(guest.into_vm()))
        }
        Has::Nothing(vm) => {
            let receiving = Receiving::start(vm, &format!("tcp:{}:0", address(peer.side)), place.config(), tls)?;
            peer.says(&json!(receiving.address()))?;
            let guest = receiving.guest()?;
            works(&guest)?;
            Ok(Has::Guest(guest))
        }
    }
}

/// A guest that was given all that its host offers does not go where some of it is missing, is told what that is before any of its memory
/// is copied, and works on.
fn stays(context: &Context) -> Result<Outcome> {
    let Some(side) = Side::of_this_host() else {
        return Ok(Outcome::Skipped("this host is not one of two".into()));
    };
    let Ok(lacks) = std::env::var(suite::LACKS) else {
        return Ok(Outcome::Skipped("the other host lacks nothing".into()));
    };
    let mut peer = Peer::meet(side, "a guest that stays")?;
    let tls = peer.certificates(&context.dir)?;
    let place = place(context, By::Vmm)?;
    let names = |error: &str| -> Result<()> {
        let missing: Vec<_> = lacks.split(' ').filter(|name| !error.contains(name)).collect();
        ensure!(missing.is_empty(), "{missing:?} not in: {error}");
        Ok(())
    };
    if side == Side::There {
        let vm = VmBuilder::new(context)?.api().start()?;
        let receiving = Receiving::start(vm, &format!("tcp:{}:0", address(side)), place.config(), &tls)?;
        peer.says(&json!(receiving.address()))?;
        let error = receiving.refused()?;
        peer.agrees("the end")?;
        names(&error)?;
        return Ok(Outcome::Passed);
    }
    let guest = boot(context, Kernel::V6_1, &place)?;
    load::works(&guest)?;
    let there = peer.hears()?;
    let error = match send(guest.vm(), there.as_str().context("no address")?, &tls) {
        Ok(told) => bail!("it was moved: {told}"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(error.contains("runs here"), "{error}");
    let last = guest.vm().api()?.get("vm.migration-progress")?;
    for count in ["pages", "zero_pages", "rounds"] {
        ensure!(last[count] == 0, "{last}");
    }
    load::works(&guest)?;
    load::ends(&guest)?;
    guest.power_off()?;
    peer.agrees("the end")?;
    suite::figure(&format!("refused: {error}"))?;
    names(&error)?;
    Ok(Outcome::Passed)
}
