//! Network interfaces whose packets a daemon moves: one guest with two of them, and a switch between the two.

use super::guest::{Guest, builder, field, number};
use crate::storage::{soon, wait_link, wait_state};
use crate::switches::{Program, Switch, skipped};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, Outcome, Test};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("vhost_net::testpmd_moves_frames", |c| moves_frames(c, Program::Testpmd)).within(LONG),
    Test::payload("vhost_net::netd_moves_frames", |c| moves_frames(c, Program::Netd)).within(LONG),
    Test::payload("vhost_net::testpmd_serves_several_pairs", |c| {
        several_pairs(c, Program::Testpmd)
    })
    .within(LONG),
    Test::payload("vhost_net::testpmd_may_die", |c| may_die(c, Program::Testpmd, DIRECT)).within(LONG),
    Test::payload("vhost_net::netd_may_die", |c| may_die(c, Program::Netd, DIRECT)).within(LONG),
    Test::payload("vhost_net::netd_may_die_behind_the_relay", |c| {
        may_die(c, Program::Netd, RELAY)
    })
    .within(LONG),
    Test::payload("vhost_net::ovs::moves_frames", |c| {
        moves_frames(c, Program::OpenVswitch)
    })
    .within(LONG),
    Test::payload("vhost_net::ovs::serves_several_pairs", |c| {
        several_pairs(c, Program::OpenVswitch)
    })
    .within(LONG),
    Test::payload("vhost_net::ovs::may_die", |c| may_die(c, Program::OpenVswitch, DIRECT)).within(LONG),
    Test::payload("vhost_net::the_link_goes_down_when_told_so", |c| {
        link_down(c, Program::Testpmd)
    })
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(90);
/// Options that choose who works on the guest's rings, and who does.
const DIRECT: (&str, &str) = ("", "direct");
const RELAY: (&str, &str) = (",datapath=relay", "relay");
const MAC: &str = "52:54:00:00:0a:01";

/// A guest with two interfaces that a switch connects.
pub(super) struct Rig {
    pub(super) guest: Guest,
    pub(super) switch: Switch,
}

impl Rig {
    /// `None` where the switch is missing. `options` are further ones of both interfaces, beginning with a comma.
    pub(super) fn start(context: &Context, kind: Program, pairs: u16, options: &str) -> Result<Option<Self>> {
        let Some(mut switch) = Switch::find(kind, context, pairs)? else {
            return Ok(None);
        };
        switch.start()?;
        let mut vm = builder(context)?.api();
        for (n, id) in ["served", "other"].into_iter().enumerate() {
            let (socket, queues) = (switch.socket(n).display(), 2 * pairs);
            let mac = if n == 0 { format!(",mac={MAC}") } else { String::new() };
            let mode = if kind.connects() { ",vhost_mode=server" } else { "" };
            let flag = format!("vhost_user=on,socket={socket},num_queues={queues},id={id}{mac}{mode}{options}");
            vm = vm.flag("--net", flag);
        }
        Ok(Some(Self {
            guest: Guest::start(vm)?,
            switch,
        }))
    }

    /// Frames from interface `from` must reach the other one.
    pub(super) fn cross(&mut self, from: usize, seed: u64, options: &str) -> Result<()> {
        let to = 1 - from;
        self.guest.ask(&format!("net {from} send 400 {seed} 20{options}"))?;
        self.guest.ask(&format!("net {to} expect 400 {seed} 20 5000"))?;
        Ok(())
    }

    /// Frames go through as soon as the switch has both of its ports.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.settle_from(0, "")
    }

    /// The same from interface `from`, by a queue that it does not use before its first frame: switches take notice of each by itself.
    fn settle_from(&mut self, from: usize, options: &str) -> Result<()> {
        let to = 1 - from;
        wait_state(self.guest.vm(), "Connected")?;
        let deadline = Instant::now() + 2 * soon();
        for seed in 0.. {
            // What came before belongs to nobody.
            let nothing = |answer: &str| answer.contains("did not come");
            while !nothing(&format!(
                "{:?}",
                self.guest.ask(&format!("net {to} expect 64 999999 1 50"))
            )) {
                ensure!(Instant::now() < deadline, "frames come and come");
            }
            self.guest.ask(&format!("net {from} send 64 {seed} 1{options}"))?;
            let came = self.guest.ask(&format!("net {to} expect 64 {seed} 1 300"));
            if came.is_ok() {
                break;
            }
            ensure!(Instant::now() < deadline, "{came:?}");
        }
        Ok(())
    }
}

/// Runs a test that has a switch, or tells that there is none. `options` are as for [`Rig::start`].
fn with_switch(
    context: &Context,
    kind: Program,
    (pairs, options): (u16, &str),
    test: impl FnOnce(&mut Rig) -> Result<()>,
) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, kind, pairs, options)? else {
        return skipped();
    };
    test(&mut rig).with_context(|| {
        let (vmm, switch) = (rig.guest.vm().last_words(), rig.switch.last_words());
        format!("the VMM's last words:{vmm}; the switch's:{switch}")
    })?;
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn moves_frames(context: &Context, kind: Program) -> Result<Outcome> {
    with_switch(context, kind, (1, ",mtu=1400"), |rig| {
        for nic in 0..2 {
            rig.guest.ask(&format!("net {nic} init"))?;
        }
        let info = rig.guest.ask("net 0 info")?;
        ensure!(field(&info, "mac")? == MAC && number(&info, "mtu")? == 1400, "{info}");
        ensure!(number(&info, "link")? & 1 == 1, "{info}");
        // The control queue is the VMM's.
        rig.guest.ask("net 0 promisc 1")?;
        ensure!(rig.guest.ask("net 0 mac 52:54:00:00:0a:07")?.contains("0a:07"));
        rig.settle()?;
        for seed in [1000, 2000, 3000] {
            rig.cross(0, seed, "")?;
            rig.cross(1, seed + 500, "")?;
        }
        // A driver that comes again.
        for nic in 0..2 {
            rig.guest
                .ask(&format!("net {nic} init event_idx=0 indirect=0 size=64"))?;
        }
        rig.settle()?;
        rig.cross(1, 4000, "")?;
        // A guest that stands still in between.
        rig.guest.vm().api()?.put("vm.pause", None)?;
        rig.guest.vm().api()?.put("vm.resume", None)?;
        rig.settle()?;
        rig.cross(0, 5000, "")?;
        Ok(())
    })
}

fn several_pairs(context: &Context, kind: Program) -> Result<Outcome> {
    with_switch(context, kind, (2, ""), |rig| {
        for nic in 0..2 {
            let answer = rig.guest.ask(&format!("net {nic} init queues=2"))?;
            ensure!(number(&answer, "pairs")? == 2, "{answer}");
        }
        for (from, seed, pair) in [(0, 1000, ""), (0, 2000, " pair=1"), (1, 3000, " pair=1")] {
            rig.settle_from(from, pair)?;
            rig.cross(from, seed, pair)?;
        }
        // One pair of two: the switch must not use the other.
        for nic in 0..2 {
            rig.guest.ask(&format!("net {nic} init queues=1"))?;
        }
        rig.settle()?;
        rig.cross(1, 4000, "")?;
        Ok(())
    })
}

/// The switch is killed while frames flow. `path` has the option that chooses who works on the guest's rings, and who does.
fn may_die(context: &Context, kind: Program, (option, path): (&str, &str)) -> Result<Outcome> {
    with_switch(context, kind, (1, option), |rig| {
        rig.settle()?;
        for round in 0..kind.kills() {
            rig.cross(0, 1000 * (round + 1), "")?;
            // It dies while frames flow; the link stays up.
            rig.guest.send("net 0 send 400 7 200")?;
            thread::sleep(Duration::from_millis(round));
            rig.switch.kill();
            wait_link(rig.guest.vm(), "without a daemon", |link| {
                link["state"] == "Disconnected"
            })?;
            rig.switch.start()?;
            rig.guest.answer()?;
            let link = wait_state(rig.guest.vm(), "Connected")?;
            ensure!(link["reconnects"].as_u64() == Some(round + 1), "{link}");
            ensure!(link["datapath"] == path, "not {path}: {link}");
            ensure!(number(&rig.guest.ask("net 0 info")?, "link")? & 1 == 1);
            rig.settle()?;
        }
        rig.cross(1, 9000, "")?;
        // Only what passes through the VMM is counted by it.
        let counters = rig.guest.vm().api()?.request("GET", "vm.counters", None)?.body;
        let counters: serde_json::Value = serde_json::from_str(&counters)?;
        let sent = counters["served"]["tx_frames"].as_u64();
        ensure!((sent > Some(0)) == (path == "relay"), "{path}: {counters}");
        Ok(())
    })
}

fn link_down(context: &Context, kind: Program) -> Result<Outcome> {
    with_switch(context, kind, (1, ",on_disconnect=error-after=1"), |rig| {
        rig.settle()?;
        rig.switch.kill();
        wait_state(rig.guest.vm(), "Failing")?;
        ensure!(number(&rig.guest.ask("net 0 info")?, "link")? & 1 == 0);
        // Nobody waits for frames that go nowhere.
        rig.guest.ask("net 0 send 100 1 300")?;
        rig.switch.start()?;
        rig.settle()?;
        ensure!(number(&rig.guest.ask("net 0 info")?, "link")? & 1 == 1);
        rig.cross(0, 1000, "")?;
        Ok(())
    })
}
