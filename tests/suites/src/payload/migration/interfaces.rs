//! Guests whose network interfaces daemons serve.

use super::super::vhost_net::Rig;
use super::{Waiting, events, send};
use crate::switches::{Program, Switch, skipped};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome, Test};

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

fn mac(info: &str) -> Option<&str> {
    info.split(' ').find(|field| field.starts_with("mac="))
}
