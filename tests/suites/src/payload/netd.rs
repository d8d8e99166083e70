//! Two guests on a switch of our own, triarch-netd.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use triarch_harness::api::Api;
use triarch_harness::net::{self, Tap};
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome, Test};

use super::guest::{Guest, builder, number};
use crate::storage::soon;
use crate::switches::netd::{self, start as run};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("netd::guests_ping_each_other", guests_ping),
    Test::payload("netd::frames_arrive_as_they_were_sent", frames_arrive),
    Test::payload("netd::segments_go_whole_to_who_takes_them", segments),
    Test::payload("netd::nobody_speaks_for_another", spoofing),
    Test::payload("netd::vlans_are_apart", vlans),
    Test::payload("netd::limits_hold_and_lose_nothing", limits),
    Test::payload("netd::a_tap_leads_to_the_host", tap),
    Test::payload("netd::a_card_leads_to_the_wire", card).within(Duration::from_secs(60)),
    Test::payload("netd::a_wire_carries_tags_and_segments", trunk).within(Duration::from_secs(60)),
    Test::payload("netd::packets_go_on_after_kills", kills).within(Duration::from_secs(60)),
    Test::payload("netd::ends_well_with_a_tap", ends_well).without_kvm(),
];

const A: &str = "10.7.7.1";
const B: &str = "10.7.7.2";
const HOST: &str = "10.7.7.3";
const MASK: &str = "255.255.255.0";
const MAC_A: &str = "52:54:00:00:77:01";
const MAC_B: &str = "52:54:00:00:77:02";

/// A switch with ports `a` and `b`, and a guest at each.
struct Net {
    program: PathBuf,
    ports: Vec<String>,
    control: PathBuf,
    process: Option<Process>,
    a: Guest,
    b: Guest,
    _dir: tempfile::TempDir,
}

impl Net {
    /// `more` is what the descriptions of the ports have beside their sockets.
    fn start(context: &Context, more: [&str; 2]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let program = netd::program(context);
        let socket = |name: &str| dir.path().join(format!("{name}.sock"));
        let port = |name: &str, more: &str| format!("name={name},socket={}{more}", socket(name).display());
        let ports = vec![port("a", more[0]), port("b", more[1])];
        let control = dir.path().join("control.sock");
        let process = Some(run(&program, &ports, &control)?);
        let guest = |name: &str, mac: &str| -> Result<Guest> {
            let socket = socket(name);
            let net = format!("vhost_user=on,vhost_socket={},mac={mac}", socket.display());
            Guest::start(builder(context)?.flag("--net", net))
        };
        let (mut a, mut b) = (guest("a", MAC_A)?, guest("b", MAC_B)?);
        // Drivers start with their first use, and what is sent before is lost.
        a.ask("net 0 info")?;
        b.ask("net 0 info")?;
        let net = Self {
            program,
            ports,
            control,
            process,
            a,
            b,
            _dir: dir,
        };
        net.wait()?;
        Ok(net)
    }

    /// Kills the switch and starts another one.
    fn restart(&mut self) -> Result<()> {
        self.process = None;
        let _ = std::fs::remove_file(&self.control);
        self.process = Some(run(&self.program, &self.ports, &self.control)?);
        Ok(())
    }

    /// The same, with more ports from now on.
    fn restart_with(&mut self, more: &[String]) -> Result<()> {
        self.ports.extend_from_slice(more);
        self.restart()?;
        self.wait()
    }

    /// Waits until both guests are there again.
    fn wait(&self) -> Result<()> {
        wait_for(&self.control, &["a", "b"])
    }

    /// Whether `a` cannot reach `b`.
    fn ping_fails(&mut self) -> Result<bool> {
        self.b.send(&format!("net 0 serve {B} 2500"))?;
        let asked = self.a.ask(&format!("net 0 ping {A} {B} 1"));
        self.b.answer()?;
        Ok(asked.is_err())
    }

    fn set(&self, change: &str) -> Result<()> {
        Api::new(&self.control).put("ports.set", Some(change)).map(|_| ())
    }

    /// What the switch says of a port.
    fn port(&self, name: &str) -> Result<Value> {
        describe(&self.control, name)
    }

    fn counter(&self, name: &str, which: &str) -> Result<u64> {
        counter(&self.control, name, which)
    }

    fn drops(&self, name: &str, reason: &str) -> Result<u64> {
        Ok(self.port(name)?["drops"][reason].as_u64().unwrap_or(0))
    }

    /// Lets `a` ping `b`, which answers meanwhile.
    fn ping(&mut self, options: &str) -> Result<u64> {
        self.b.send(&format!("net 0 serve {B} 1500"))?;
        let asked = self.a.ask(&format!("net 0 ping {A} {B} {options}"));
        self.b.answer()?;
        number(&asked?, "echoes")
    }

    fn end(self) -> Result<Outcome> {
        self.a.power_off()?;
        self.b.power_off()?;
        Ok(Outcome::Passed)
    }
}

/// What the switch behind `control` says of a port.
fn describe(control: &Path, name: &str) -> Result<Value> {
    let answer = Api::new(control).request("GET", "ports", None)?;
    let ports: Value = serde_json::from_str(&answer.body)?;
    let ports = ports["ports"].as_array().context("no list of ports")?;
    let found = ports.iter().find(|port| port["name"] == name);
    found.cloned().with_context(|| format!("no port {name}"))
}

fn counter(control: &Path, name: &str, which: &str) -> Result<u64> {
    Ok(describe(control, name)?[which].as_u64().unwrap_or(0))
}

/// Waits until these guests are at the switch behind `control`.
fn wait_for(control: &Path, names: &[&str]) -> Result<()> {
    let deadline = Instant::now() + soon();
    let there = |name: &&str| -> Result<bool> {
        let guest = &describe(control, name)?["guest"];
        Ok(guest["rx_queues"].as_u64() >= Some(1) && guest["tx_queues"].as_u64() >= Some(1))
    };
    for name in names {
        while !there(name)? {
            ensure!(Instant::now() < deadline, "{name} is not back");
            thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

fn guests_ping(context: &Context) -> Result<Outcome> {
    let mut net = Net::start(context, ["", ",num_queues=2"])?;
    ensure!(net.ping("20 len=1400")? == 20);
    for guest in [&mut net.a, &mut net.b] {
        guest.ask("net 0 init offload=1")?;
    }
    ensure!(net.ping("20")? == 20);
    // Rings of other lengths, without the extras.
    net.a.ask("net 0 init event_idx=0 indirect=0 size=16")?;
    ensure!(net.ping("20")? == 20);
    ensure!(net.counter("a", "rx_packets")? >= 63 && net.counter("a", "tx_packets")? >= 63);
    net.end()
}

fn frames_arrive(context: &Context) -> Result<Outcome> {
    let mut net = Net::start(context, ["", ""])?;
    let before = net.counter("b", "rx_packets")?;
    // Never more at once than the guest has buffers: it may be held up, and a switch waits for nobody.
    for (len, seed, count) in [(46, 1, 30), (1400, 100, 30), (1000, 200, 30)] {
        net.b.send(&format!("net 0 expect {len} {seed} {count} 5000"))?;
        net.a.ask(&format!("net 0 send {len} {seed} {count}"))?;
        net.b.answer()?;
    }
    ensure!(net.counter("b", "rx_packets")? - before == 90, "{}", net.port("b")?);
    ensure!(net.port("b")?["drops"] == serde_json::json!({}), "{}", net.port("b")?);
    net.end()
}

fn segments(context: &Context) -> Result<Outcome> {
    let mut net = Net::start(context, ["", ""])?;
    for (setup, pieces) in [("net 0 init offload=1", 1), ("net 0 init", 29)] {
        net.b.ask(setup)?;
        let (packets, bytes) = (net.counter("b", "rx_packets")?, net.counter("b", "rx_bytes")?);
        net.b.send(&format!("net 0 serve {B} 1500"))?;
        net.a.ask(&format!("net 0 tso {A} {B} 9 40000 1 1400"))?;
        net.b.answer()?;
        // Two frames of ARP to and from it, and the segment, which counts as what it is on a wire either way.
        let (packets, bytes) = (
            net.counter("b", "rx_packets")? - packets,
            net.counter("b", "rx_bytes")? - bytes,
        );
        ensure!(packets == 30, "{packets} packets");
        ensure!(bytes == 60 + 40_000 + pieces * 54, "{bytes} bytes in {pieces} pieces");
        ensure!(net.port("b")?["drops"] == serde_json::json!({}), "{}", net.port("b")?);
    }
    net.end()
}

fn spoofing(context: &Context) -> Result<Outcome> {
    let guarded = format!(",mac={MAC_A},ip={A},anti_spoof=on");
    let mut net = Net::start(context, [&guarded, ""])?;
    ensure!(net.ping("3")? == 3);
    // Another address: not even the question for the peer's goes through.
    net.b.send(&format!("net 0 serve {B} 3000"))?;
    net.a.refused(&format!("net 0 ping 10.7.7.9 {B} 1"))?;
    net.b.answer()?;
    ensure!(net.drops("a", "spoofed_arp")? >= 1, "{}", net.port("a")?);
    net.a.ask("net 0 send 100 1 5")?;
    ensure!(net.drops("a", "spoofed_protocol")? == 5, "{}", net.port("a")?);
    net.a.ask(&format!("net 0 mac {MAC_B}"))?;
    net.a.ask("net 0 send 100 1 5")?;
    ensure!(net.drops("a", "spoofed_mac")? == 5, "{}", net.port("a")?);
    net.end()
}

fn vlans(context: &Context) -> Result<Outcome> {
    let mut net = Net::start(context, [",vlan=5", ",vlan=6"])?;
    net.b.send("net 0 expect 200 7 1 500")?;
    net.a.ask("net 0 send 200 7 10")?;
    ensure!(net.b.answer().is_err(), "it arrived in another VLAN");
    net.set(r#"{"name":"b","vlan":5}"#)?;
    ensure!(net.ping("5")? == 5);
    net.end()
}

fn limits(context: &Context) -> Result<Outcome> {
    let mut net = Net::start(context, [",pps=200,pps_burst=1", ""])?;
    let before = net.counter("b", "rx_packets")?;
    net.b.send("net 0 expect 500 1 40 5000")?;
    let start = Instant::now();
    net.a.ask("net 0 send 500 1 40")?;
    net.b.answer()?;
    // The first one is free.
    ensure!(start.elapsed() >= Duration::from_millis(190), "{:?}", start.elapsed());
    ensure!(net.counter("b", "rx_packets")? - before == 40);
    net.set(r#"{"name":"a","pps":0}"#)?;
    net.set(r#"{"name":"b","rx_pps":1,"rx_pps_burst":3}"#)?;
    net.a.ask("net 0 send 500 1 30")?;
    ensure!(net.drops("b", "rate")? >= 20, "{}", net.port("b")?);
    net.end()
}

/// Guest `a` and the host, by way of a tap; `b` is there as well.
fn tap(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let tap = Tap::create("tap0", HOST.parse()?, MASK.parse()?, false)?;
    reaches_the_host(context, &format!("tap={}", tap.name()))
}

/// The same, but the host is at the other end of a wire.
fn card(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    net::wire(["card0", "host0"])?;
    net::add_address("host0", HOST.parse()?, MASK.parse()?)?;
    reaches_the_host(context, "interface=card0")
}

/// `port` leads to where `HOST` is.
fn reaches_the_host(context: &Context, port: &str) -> Result<Outcome> {
    let mut net = Net::start(context, ["", ""])?;
    net.restart_with(&[format!("name=host,{port}")])?;
    let deadline = Instant::now() + soon();
    ensure!(number(&net.a.ask(&format!("net 0 ping {A} {HOST} 20 len=1400"))?, "echoes")? == 20);
    net.a.ask("net 0 init offload=1")?;
    net.a.ask(&format!("net 0 ping {A} {HOST} 20 len=1400"))?;
    // The host answers what is for no socket of its, so the checksum was right.
    let before = net.counter("host", "tx_packets")?;
    net.a.ask(&format!("net 0 tso {A} {HOST} 9 40000 1 1400"))?;
    while net.counter("host", "rx_bytes")? < 40_000 || net.counter("host", "tx_packets")? == before {
        ensure!(Instant::now() < deadline, "{}", net.port("host")?);
        thread::sleep(Duration::from_millis(5));
    }
    // Through a tag as well.
    net.set(r#"{"name":"a","vlan":9}"#)?;
    net.a.refused(&format!("net 0 ping {A} {HOST} 1"))?;
    net.set(r#"{"name":"host","trunk":"8","native":9}"#)?;
    net.a.ask(&format!("net 0 ping {A} {HOST} 5"))?;
    ensure!(net.ping_fails()?, "b is in another VLAN");
    net.end()
}

/// Guests at a switch each, and a wire between the two, where frames have tags.
fn trunk(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    net::wire(["card0", "card1"])?;
    let mut net = Net::start(context, [",vlan=9", ",vlan=9"])?;
    let b = net.ports.pop().context("no port b")?;
    net.ports.push("name=wire,interface=card0,trunk=8+9".to_owned());
    net.restart()?;
    let control = context.dir.join("other.sock");
    let other = run(
        &net.program,
        &[b, "name=wire,interface=card1,trunk=9".to_owned()],
        &control,
    )?;
    wait_for(&net.control, &["a"])?;
    wait_for(&control, &["b"])?;
    for guest in [&mut net.a, &mut net.b] {
        guest.ask("net 0 init offload=1")?;
    }
    // What came while there was no driver is lost; nothing else is.
    let drops = describe(&control, "b")?["drops"].clone();
    ensure!(net.ping("20 len=1400")? == 20);
    // A segment goes whole through both switches and the wire.
    let before = (net::received("card1")?, counter(&control, "b", "rx_bytes")?);
    net.b.send(&format!("net 0 serve {B} 1500"))?;
    net.a.ask(&format!("net 0 tso {A} {B} 9 40000 1 1400"))?;
    net.b.answer()?;
    let after = (net::received("card1")?, counter(&control, "b", "rx_bytes")?);
    let (bytes, packets) = (after.0.0 - before.0.0, after.0.1 - before.0.1);
    ensure!(
        bytes >= 40_000 && packets < 10,
        "{bytes} bytes came in {packets} packets"
    );
    // Two frames of ARP, and what the segment had at first.
    ensure!(after.1 - before.1 == 60 + 40_054, "{}", describe(&control, "b")?);
    ensure!(
        describe(&control, "b")?["drops"] == drops,
        "{}",
        describe(&control, "b")?
    );
    // In another VLAN the frames are on the wire, but nobody there takes them.
    let before = (
        net.counter("wire", "rx_packets")?,
        counter(&control, "b", "rx_packets")?,
    );
    net.set(r#"{"name":"a","vlan":8}"#)?;
    ensure!(net.ping_fails()?, "b is in another VLAN");
    let after = (
        net.counter("wire", "rx_packets")?,
        counter(&control, "b", "rx_packets")?,
    );
    ensure!(after.0 > before.0 && after.1 == before.1, "{before:?}, {after:?}");
    drop(other);
    net.end()
}

fn kills(context: &Context) -> Result<Outcome> {
    let mut net = Net::start(context, ["", ""])?;
    for round in 0..10 {
        // Frames flow while it is killed; those that are lost are lost, but none comes changed or out of order.
        net.b.send("net 0 sink 400")?;
        net.a.send(&format!("net 0 flood {MAC_B} 1000 300"))?;
        thread::sleep(Duration::from_millis(37 * (round % 5) + 20));
        net.restart()?;
        net.a.answer()?;
        net.b.answer()?;
        net.wait()?;
        ensure!(net.ping("5 len=900")? == 5, "round {round}");
        net.b.send(&format!("net 0 expect 700 {round} 20 3000"))?;
        net.a.ask(&format!("net 0 send 700 {round} 20"))?;
        net.b.answer()?;
    }
    net.end()
}

/// With a tap that was there before and is changed; there is no guest.
fn ends_well(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let tap = Tap::create("tap0", HOST.parse()?, MASK.parse()?, false)?;
    let (program, control) = (netd::program(context), context.dir.join("control.sock"));
    let port = format!("name=host,tap={},mtu=1400", tap.name());
    for by_name in [false, true] {
        let mut process = run(&program, std::slice::from_ref(&port), &control)?;
        if by_name {
            Api::new(&control).put("ports.remove", Some(r#"{"name":"host"}"#))?;
        }
        let ended = Command::new("kill").arg(process.pid().to_string()).status()?;
        ensure!(ended.success(), "the switch is gone{}", process.last_words());
        let status = process.wait(soon())?;
        process.expect(status, 0)?;
    }
    Ok(Outcome::Passed)
}
