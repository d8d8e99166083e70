//! A bare-metal guest on passt.

use super::data::pattern;
use super::guest::{Guest, builder, field};
use crate::passt::{GUEST, MASK, Passt, ROUTER, with_passt};
use crate::storage::{soon, wait_link, wait_state};
use anyhow::{Result, ensure};
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome, Test};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("passt::a_guest_has_an_address_and_sockets", serves).within(LONG),
    Test::payload("passt::it_may_die", may_die).within(LONG),
];

const LONG: Duration = Duration::from_secs(60);
/// Runs `test` with a guest on a passt.
fn with_guest(context: &Context, test: fn(&mut Guest, &mut Passt) -> Result<()>) -> Result<Outcome> {
    with_passt(context, |passt| {
        let flag = format!("vhost_user=on,socket={},id=served", passt.socket().display());
        let mut guest = Guest::start(builder(context)?.api().flag("--net", flag))?;
        test(&mut guest, passt)?;
        guest.power_off()?;
        Ok(())
    })
}

/// The guest takes its address and sends a datagram to the host, which sends it back.
fn talk(guest: &mut Guest, seed: u64) -> Result<()> {
    let lease = guest.ask("net 0 dhcp ms=5000")?;
    ensure!(field(&lease, "address")? == GUEST.to_string(), "{lease}");
    ensure!(field(&lease, "mask")? == MASK.to_string(), "{lease}");
    ensure!(field(&lease, "router")? == ROUTER.to_string(), "{lease}");
    for (len, seed) in [(1, seed), (700, seed + 1), (1472, seed + 2)] {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(soon()))?;
        let port = socket.local_addr()?.port();
        guest.send(&format!("net 0 udp {GUEST} {ROUTER} {port} {len} {seed} echo"))?;
        let mut buffer = [0; 2000];
        let came = socket.recv_from(&mut buffer);
        if let Ok((n, from)) = came {
            socket.send_to(&buffer[..n], from)?;
        }
        // It says best what went wrong.
        guest.answer()?;
        ensure!(buffer[..came?.0] == pattern(seed, 0, len), "{len} bytes came changed");
    }
    Ok(())
}

fn serves(context: &Context) -> Result<Outcome> {
    with_guest(context, |guest, _| {
        talk(guest, 1)?;
        // A driver that merges buffers, one that has less, and a guest that stood still.
        guest.ask("net 0 init offload=1")?;
        talk(guest, 10)?;
        guest.ask("net 0 init event_idx=0 indirect=0 size=64")?;
        talk(guest, 20)?;
        guest.vm().pause()?;
        guest.vm().resume()?;
        talk(guest, 30)
    })
}

fn may_die(context: &Context) -> Result<Outcome> {
    with_guest(context, |guest, passt| {
        talk(guest, 1)?;
        for round in 1..=5 {
            // It dies while frames flow that nobody answers.
            guest.send("net 0 send 400 7 100")?;
            thread::sleep(Duration::from_millis(round));
            passt.kill();
            wait_link(guest.vm(), "without a daemon", |link| link["state"] == "Disconnected")?;
            passt.start()?;
            guest.answer()?;
            let link = wait_state(guest.vm(), "Connected")?;
            ensure!(link["reconnects"].as_u64() == Some(round), "{link}");
            talk(guest, 100 * round)?;
        }
        Ok(())
    })
}
