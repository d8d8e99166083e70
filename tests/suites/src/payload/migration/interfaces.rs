//! Guests whose network interfaces daemons serve.

use super::super::guest::{Guest, builder};
use super::super::vhost_net::Rig;
use super::{Waiting, events, send};
use crate::switches::{Program, Switch, netd, skipped};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use triarch_harness::net::{self, Ear, Tap};
use triarch_harness::suite::{Context, Outcome, Test, patient};

/// This module's tests.
pub(super) const TESTS: &[Test] = &[
    Test::payload("migration::vhost_net::netd", |c| interfaces(c, Program::Netd, 1, "")).within(LONG),
    Test::payload("migration::vhost_net::netd_behind_the_relay", |c| {
        interfaces(c, Program::Netd, 1, ",datapath=relay")
    })
    .within(LONG),
    Test::payload("migration::vhost_net::netd_with_two_queue_pairs", |c| {
        interfaces(c, Program::Netd, 2, "")
    })
    .within(LONG),
    Test::payload("migration::vhost_net::testpmd", |c| {
        interfaces(c, Program::Testpmd, 1, "")
    })
    .within(LONG),
    Test::payload("migration::announced::by_the_vmm", |c| announced(c, false)).within(LONG),
    Test::payload("migration::announced::by_netd", |c| announced(c, true)).within(LONG),
];

const LONG: Duration = Duration::from_secs(180);

/// The guest sends frames from one interface to the other, and is moved to another switch in the midst of that. Nobody promises that those
/// on their way arrive, only that all others do, before and afterwards.
fn interfaces(context: &Context, kind: Program, pairs: u16, options: &str) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, kind, pairs, options)? else {
        return skipped();
    };
    for nic in 0..2 {
        rig.guest.ask(&format!("net {nic} init"))?;
    }
    rig.settle()?;
    rig.cross(0, 1000, "")?;
    let first = rig.guest.ask("net 1 info")?;
    for round in 0..10 {
        let Some(mut switch) = Switch::find(kind, context, pairs)? else {
            return skipped();
        };
        switch.start()?;
        let sockets = json!([
            { "id": "served", "vhost_socket": switch.socket(0) },
            { "id": "other", "vhost_socket": switch.socket(1) },
        ]);
        let waiting = Waiting::start(context, "unix", &json!({ "config": { "net": sockets } }))?;
        rig.guest.send("net 0 send 400 7 200")?;
        send(&rig.guest, &waiting, &json!({}))
            .with_context(|| format!("the VMM's last words:{}", rig.guest.vm().last_words()))?;
        let guest = waiting.guest(rig.guest)?;
        rig = Rig { guest, switch };
        rig.guest.answer()?;
        let announced = events(rig.guest.vm().api()?, "announced")?;
        let interfaces = announced.first().map(|event| &event["properties"]["interfaces"]);
        ensure!(interfaces.is_some_and(|count| *count == json!(2)), "{announced:?}");
        rig.settle()
            .with_context(|| format!("the VMM's last words:{}", rig.guest.vm().last_words()))?;
        rig.cross(0, 2000 * (round + 1), "")?;
        rig.cross(1, 2000 * (round + 1) + 500, "")?;
        let info = rig.guest.ask("net 1 info")?;
        ensure!(mac(&info) == mac(&first), "{first}, and then {info}");
    }
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

const TAPS: [&str; 2] = ["triarch0", "triarch1"];
const MAC: &str = "52:54:00:00:0a:01";
/// Its bytes.
const BYTES: [u8; 6] = [0x52, 0x54, 0, 0, 0x0a, 1];
/// The EtherType of reverse ARP.
const RARP: u16 = 0x8035;

/// The network at the guest's new place hears of it at once, from the VMM, or from the daemon that serves the interface and is told to.
fn announced(context: &Context, is_served: bool) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (mut switches, mut devices) = (Vec::new(), Vec::new());
    for tap in TAPS {
        Tap::without_address(tap, false)?;
        if !is_served {
            devices.push((format!("tap={tap}"), json!({ "id": "net0", "tap": tap })));
            continue;
        }
        let path = |what: &str| kept.path().join(format!("{tap}.{what}"));
        let socket = path("sock");
        switches.push(netd::between(context, &socket, tap, &path("control"))?);
        let flag = format!("vhost_user=on,socket={}", socket.display());
        devices.push((flag, json!({ "id": "net0", "vhost_socket": socket })));
    }
    let flag = format!("{},mac={MAC},id=net0", devices[0].0);
    let mut guest = Guest::start(builder(context)?.api().flag("--net", flag))?;
    guest.ask("net 0 init")?;
    for round in 0..4 {
        let there = (round + 1) % 2;
        let ears = [Ear::at(TAPS[there], RARP)?, Ear::at(TAPS[1 - there], RARP)?];
        let config = json!({ "config": { "net": [&devices[there].1] } });
        let waiting = Waiting::start(context, "unix", &config)?;
        send(&guest, &waiting, &json!({}))?;
        // It has the guest's address twice: as who sends it, and as whom it is about.
        let is_its = |frame: &[u8]| frame[6..12] == BYTES && frame[32..38] == BYTES;
        ears[0]
            .hear(patient(Duration::from_secs(1)), is_its)
            .context("nothing was told")?;
        guest = waiting.guest(guest)?;
        // Nobody said so where it was.
        ensure!(ears[1].hear(Duration::from_millis(50), |_| true).is_err());
    }
    guest.power_off()?;
    drop(switches);
    Ok(Outcome::Passed)
}

fn mac(info: &str) -> Option<&str> {
    info.split(' ').find(|field| field.starts_with("mac="))
}
