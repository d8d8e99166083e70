//! A NIC on a tap interface in a network namespace of the test's own.

use super::data::{crc32, pattern};
use super::guest::{Guest, builder, field, number};
use anyhow::{Context as _, Result, ensure};
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::Duration;
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome, Test, patient};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("net::pings", pings::<VMM>),
    Test::payload("net::pings_without_extras", pings_without_extras),
    Test::payload("net::describes_itself", describes_itself::<VMM>),
    Test::payload("net::carries_datagrams", carries_datagrams::<VMM>),
    Test::payload("net::leaves_checksums_to_the_host", leaves_checksums_to_the_host::<VMM>),
    Test::payload("net::leaves_segments_to_the_host", leaves_segments_to_the_host::<VMM>),
    Test::payload("net::uses_several_queues", uses_several_queues::<VMM>),
    Test::payload("net::obeys_control_queue", obeys_control_queue),
    Test::payload("net::bears_floods", bears_floods),
    Test::payload("net::netd::pings", pings::<NETD>),
    Test::payload("net::netd::describes_itself", describes_itself::<NETD>),
    Test::payload("net::netd::carries_datagrams", carries_datagrams::<NETD>),
    Test::payload(
        "net::netd::leaves_checksums_to_the_host",
        leaves_checksums_to_the_host::<NETD>,
    ),
    Test::payload(
        "net::netd::leaves_segments_to_the_host",
        leaves_segments_to_the_host::<NETD>,
    ),
    Test::payload("net::netd::uses_several_queues", uses_several_queues::<NETD>),
];

/// Who serves the tap: the VMM, or a `triarch-netd` that it starts.
const VMM: bool = false;
const NETD: bool = true;

const TAP: &str = "tap0";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// Runs `test` with a guest on a tap interface, where such can be made.
fn with_nic<const BY: bool>(
    context: &Context,
    options: &str,
    test: impl Fn(&mut Guest) -> Result<()>,
) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let tap = Tap::create(TAP, HOST, MASK, options.contains("num_queues"))?;
    let backend = if BY == NETD { ",backend=netd" } else { "" };
    let mut guest = Guest::start(builder(context)?.flag("--net", format!("tap={}{options}{backend}", tap.name())))?;
    test(&mut guest)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn pings<const BY: bool>(context: &Context) -> Result<Outcome> {
    with_nic::<BY>(context, "", |guest| {
        ensure!(number(&guest.ask(&format!("net 0 ping {GUEST} {HOST} 10"))?, "echoes")? == 10);
        guest.ask(&format!("net 0 ping {GUEST} {HOST} 3 len=1472"))?;
        guest.ask("net 0 init offload=1")?;
        guest.ask(&format!("net 0 ping {GUEST} {HOST} 3 len=1472"))?;
        Ok(())
    })
}

fn pings_without_extras(context: &Context) -> Result<Outcome> {
    with_nic::<VMM>(context, "", |guest| {
        guest.ask("net 0 init event_idx=0 indirect=0 size=16")?;
        guest.ask(&format!("net 0 ping {GUEST} {HOST} 40"))?;
        Ok(())
    })
}

fn describes_itself<const BY: bool>(context: &Context) -> Result<Outcome> {
    with_nic::<BY>(context, ",mac=52:54:00:ab:cd:ef,mtu=1400", |guest| {
        let info = guest.ask("net 0 info")?;
        ensure!(field(&info, "mac")? == "52:54:00:ab:cd:ef", "{info}");
        ensure!(number(&info, "mtu")? == 1400, "{info}");
        Ok(())
    })
}

/// Sends one datagram to a socket of the host, which sends it back.
fn datagram(guest: &mut Guest, len: usize, seed: u64, options: &str) -> Result<()> {
    let socket = UdpSocket::bind((HOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let port = socket.local_addr()?.port();
    let host = thread::spawn(move || -> Result<(Vec<u8>, String)> {
        let mut buffer = vec![0; 2000];
        let (len, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..len], from)?;
        buffer.truncate(len);
        Ok((buffer, from.to_string()))
    });
    let sent = guest.ask(&format!("net 0 udp {GUEST} {HOST} {port} {len} {seed} echo {options}"))?;
    let (data, from) = host.join().ok().context("the host's side panicked")??;
    ensure!(from == format!("{GUEST}:4000"), "from {from}");
    ensure!(data == pattern(seed, 0, len), "{len} bytes came changed");
    ensure!(number(&sent, "crc32")? == u64::from(crc32(&data)), "{sent}");
    Ok(())
}

fn carries_datagrams<const BY: bool>(context: &Context) -> Result<Outcome> {
    with_nic::<BY>(context, "", |guest| {
        for (len, seed) in [(1, 1), (500, 2), (1472, 3)] {
            datagram(guest, len, seed, "")?;
        }
        Ok(())
    })
}

fn leaves_checksums_to_the_host<const BY: bool>(context: &Context) -> Result<Outcome> {
    with_nic::<BY>(context, "", |guest| {
        for (len, seed) in [(64, 4), (1471, 5)] {
            datagram(guest, len, seed, "csum")?;
        }
        // With checksum offload on receive the host may send datagrams unfinished.
        guest.ask("net 0 init offload=1")?;
        datagram(guest, 700, 6, "csum")
    })
}

fn leaves_segments_to_the_host<const BY: bool>(context: &Context) -> Result<Outcome> {
    with_nic::<BY>(context, "", |guest| {
        guest.ask(&format!("net 0 ping {GUEST} {HOST}"))?;
        let (bytes, packets) = net::received(TAP)?;
        guest.ask(&format!("net 0 tso {GUEST} {HOST} 9 40000 1 1400"))?;
        let (bytes, packets) = (net::received(TAP)?.0 - bytes, net::received(TAP)?.1 - packets);
        // ARP and one packet far beyond the MTU: the host got it whole, to cut where it leaves the machine.
        ensure!(bytes >= 40_000 && packets <= 3, "{bytes} bytes in {packets} packets");
        guest.ask(&format!("net 0 ping {GUEST} {HOST}"))?;
        Ok(())
    })
}

fn uses_several_queues<const BY: bool>(context: &Context) -> Result<Outcome> {
    with_nic::<BY>(context, ",num_queues=4", |guest| {
        ensure!(number(&guest.ask("net 0 info")?, "max_pairs")? == 2);
        ensure!(number(&guest.ask("net 0 init queues=2")?, "pairs")? == 2);
        guest.ask(&format!("net 0 ping {GUEST} {HOST} 20"))?;
        guest.ask("net 0 send 900 1 5 pair=1")?;
        // And back to one.
        guest.ask("net 0 init queues=1")?;
        guest.ask(&format!("net 0 ping {GUEST} {HOST} 20"))?;
        Ok(())
    })
}

fn obeys_control_queue(context: &Context) -> Result<Outcome> {
    with_nic::<VMM>(context, "", |guest| {
        guest.ask("net 0 promisc 1")?;
        ensure!(guest.ask("net 0 mac 52:54:00:00:00:77")? == "52:54:00:00:00:77");
        let refused = guest.refused("net 0 command 99 0 1")?;
        ensure!(refused.contains("refused"), "{refused}");
        guest.ask(&format!("net 0 ping {GUEST} {HOST}"))?;
        Ok(())
    })
}

fn bears_floods(context: &Context) -> Result<Outcome> {
    with_nic::<VMM>(context, "", |guest| {
        guest.ask("net 0 init size=256 buffers=256 offload=1")?;
        let received = || Ok::<_, anyhow::Error>(net::received(TAP)?.1);
        let ms = patient(Duration::from_millis(50)).as_millis() as u64;
        for (length, options) in [(64, ""), (65160, " mss=1448")] {
            let before = received()?;
            let answer = guest.ask(&format!("net 0 flood ff:ff:ff:ff:ff:ff {length} {ms}{options}"))?;
            let (frames, came) = (number(&answer, "frames")?, received()? - before);
            // Up to 64 were on their way when it stopped counting.
            ensure!(
                frames > 0 && (frames..=frames + 64).contains(&came),
                "{came} came: {answer}"
            );
            ensure!(number(&answer, "us")? >= 1000 * ms, "{answer}");
        }
        let answer = guest.ask("net 0 sink 50")?;
        ensure!(number(&answer, "frames")? == 0, "{answer}");
        ensure!(number(&guest.ask(&format!("net 0 ping {GUEST} {HOST} 3"))?, "echoes")? == 3);
        Ok(())
    })
}
