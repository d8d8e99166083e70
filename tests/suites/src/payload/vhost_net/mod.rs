//! Network interfaces whose packets a daemon moves: one guest with two of them, and a switch between the two.

mod ovs;

use super::guest::{Guest, builder, field, number};
use crate::storage::{soon, wait_link, wait_state};
use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome, Test};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("vhost_net::testpmd_moves_frames", |c| moves_frames(c, Program::Testpmd)).within(LONG),
    Test::payload("vhost_net::netd_moves_frames", |c| moves_frames(c, Program::Netd)).within(LONG),
    Test::payload("vhost_net::testpmd_serves_several_pairs", |c| {
        several_pairs(c, Program::Testpmd)
    })
    .within(LONG),
    Test::payload("vhost_net::testpmd_may_die", |c| may_die(c, Program::Testpmd)).within(LONG),
    Test::payload("vhost_net::netd_may_die", |c| may_die(c, Program::Netd)).within(LONG),
    Test::payload("vhost_net::ovs::moves_frames", |c| {
        moves_frames(c, Program::OpenVswitch)
    })
    .within(LONG),
    Test::payload("vhost_net::ovs::serves_several_pairs", |c| {
        several_pairs(c, Program::OpenVswitch)
    })
    .within(LONG),
    Test::payload("vhost_net::ovs::may_die", |c| may_die(c, Program::OpenVswitch)).within(LONG),
    Test::payload("vhost_net::the_link_goes_down_when_told_so", |c| {
        link_down(c, Program::Testpmd)
    })
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(90);
const TESTPMD: &str = "dpdk-testpmd";
const NETD: &str = "triarch-netd";
const MAC: &str = "52:54:00:00:0a:01";

/// Which switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Testpmd,
    Netd,
    OpenVswitch,
}

impl Program {
    /// Whether it connects to the VMM, which listens.
    fn connects(self) -> bool {
        self == Self::OpenVswitch
    }

    /// How often it is killed. Open vSwitch takes seconds to start.
    fn kills(self) -> u64 {
        if self == Self::OpenVswitch { 2 } else { 5 }
    }
}

/// A switch with two ports.
struct Switch {
    kind: Program,
    program: PathBuf,
    /// Open vSwitch's.
    database: Option<ovs::Database>,
    sockets: [PathBuf; 2],
    pairs: u16,
    process: Option<Process>,
}

impl Switch {
    fn start(&mut self) -> Result<()> {
        self.process = None;
        if let Some(database) = &self.database {
            self.process = Some(Process::start(&mut database.switch())?);
            return Ok(());
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        let mut command = Command::new(&self.program);
        match self.kind {
            Program::Netd => self.netd(&mut command),
            _ => self.testpmd(&mut command),
        }
        self.process = Some(Process::start(&mut command)?);
        let deadline = Instant::now() + 2 * soon();
        while !self.sockets.iter().all(|socket| socket.exists()) {
            let words = self.process.as_ref().map(Process::last_words).unwrap_or_default();
            ensure!(Instant::now() < deadline, "the switch does not listen{words}");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Without huge pages, PCI or files of its own; its two threads share a CPU.
    fn testpmd(&self, command: &mut Command) {
        command.args([
            "--lcores",
            "0@0,1@0",
            "--no-pci",
            "--no-huge",
            "--no-shconf",
            "--no-telemetry",
        ]);
        command.args(["-m", "256"]);
        for plugin in ["librte_mempool_ring.so.25", "librte_net_vhost.so.25"] {
            command.arg("-d").arg(self.program.with_extension("d").join(plugin));
        }
        let pairs = self.pairs;
        for (n, socket) in self.sockets.iter().enumerate() {
            let port = format!("net_vhost{n},iface={},queues={pairs}", socket.display());
            command.arg("--vdev").arg(port);
        }
        command.args(["--", "--forward-mode=io", "--auto-start", "--total-num-mbufs=4096"]);
        command.arg(format!("--rxq={pairs}")).arg(format!("--txq={pairs}"));
        // Without a terminal it ends at once unless it has something to print now and then.
        command.arg("--stats-period=60");
    }

    fn netd(&self, command: &mut Command) {
        for (n, socket) in self.sockets.iter().enumerate() {
            let port = format!("name=port{n},socket={}", socket.display());
            command.arg("--port").arg(port);
        }
    }
}

/// A guest with two interfaces that a switch connects.
struct Rig {
    guest: Guest,
    switch: Switch,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

impl Rig {
    /// `None` where the switch is missing. `options` are further ones of both interfaces, beginning with a comma.
    fn start(context: &Context, kind: Program, pairs: u16, options: &str) -> Result<Option<Self>> {
        let program = match kind {
            Program::Testpmd => context.images.path(TESTPMD).ok(),
            Program::Netd => Some(context.triarch.with_file_name(NETD)).filter(|path| path.exists()),
            Program::OpenVswitch => context.images.path(ovs::PROGRAM).ok(),
        };
        let Some(program) = program else { return Ok(None) };
        let dir = tempfile::Builder::new().prefix("switch").tempdir_in(&context.dir)?;
        let sockets = ["one.sock", "two.sock"].map(|name| dir.path().join(name));
        let database = match kind {
            Program::OpenVswitch => Some(ovs::Database::start(&program, dir.path(), &sockets)?),
            _ => None,
        };
        let mut switch = Switch {
            kind,
            program,
            database,
            sockets,
            pairs,
            process: None,
        };
        switch.start()?;
        let mut vm = builder(context)?.api();
        for (n, id) in ["served", "other"].into_iter().enumerate() {
            let (socket, queues) = (switch.sockets[n].display(), 2 * pairs);
            let mac = if n == 0 { format!(",mac={MAC}") } else { String::new() };
            let mode = if kind.connects() { ",vhost_mode=server" } else { "" };
            let flag = format!("vhost_user=on,socket={socket},num_queues={queues},id={id}{mac}{mode}{options}");
            vm = vm.flag("--net", flag);
        }
        Ok(Some(Self {
            guest: Guest::start(vm)?,
            switch,
            _dir: dir,
        }))
    }

    /// Frames from interface `from` must reach the other one.
    fn cross(&mut self, from: usize, seed: u64, options: &str) -> Result<()> {
        let to = 1 - from;
        self.guest.ask(&format!("net {from} send 400 {seed} 20{options}"))?;
        self.guest.ask(&format!("net {to} expect 400 {seed} 20 5000"))?;
        Ok(())
    }

    /// Frames go through as soon as the switch has both of its ports.
    fn settle(&mut self) -> Result<()> {
        wait_state(self.guest.vm(), "Connected")?;
        let deadline = Instant::now() + 2 * soon();
        for seed in 0.. {
            // What came before belongs to nobody.
            let nothing = |answer: &str| answer.contains("did not come");
            while !nothing(&format!("{:?}", self.guest.ask("net 1 expect 64 999999 1 50"))) {
                ensure!(Instant::now() < deadline, "frames come and come");
            }
            self.guest.ask(&format!("net 0 send 64 {seed} 1"))?;
            let came = self.guest.ask(&format!("net 1 expect 64 {seed} 1 300"));
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
        return Ok(Outcome::Skipped("the switch is missing".into()));
    };
    test(&mut rig).with_context(|| {
        let switch = rig.switch.process.as_ref().map(Process::last_words);
        let vmm = rig.guest.vm().last_words();
        format!(
            "the VMM's last words:{vmm}; the switch's:{}",
            switch.unwrap_or_default()
        )
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
        rig.settle()?;
        rig.cross(0, 1000, "")?;
        rig.cross(0, 2000, " pair=1")?;
        rig.cross(1, 3000, " pair=1")?;
        // One pair of two: the switch must not use the other.
        for nic in 0..2 {
            rig.guest.ask(&format!("net {nic} init queues=1"))?;
        }
        rig.settle()?;
        rig.cross(1, 4000, "")?;
        Ok(())
    })
}

fn may_die(context: &Context, kind: Program) -> Result<Outcome> {
    with_switch(context, kind, (1, ""), |rig| {
        rig.settle()?;
        for round in 0..kind.kills() {
            rig.cross(0, 1000 * (round + 1), "")?;
            // It dies while frames flow; the link stays up.
            rig.guest.send("net 0 send 400 7 200")?;
            thread::sleep(Duration::from_millis(round));
            rig.switch.process = None;
            wait_link(rig.guest.vm(), "without a daemon", |link| {
                link["state"] == "Disconnected"
            })?;
            rig.switch.start()?;
            rig.guest.answer()?;
            let link = wait_state(rig.guest.vm(), "Connected")?;
            ensure!(link["reconnects"].as_u64() == Some(round + 1), "{link}");
            ensure!(number(&rig.guest.ask("net 0 info")?, "link")? & 1 == 1);
            rig.settle()?;
        }
        rig.cross(1, 9000, "")?;
        Ok(())
    })
}

fn link_down(context: &Context, kind: Program) -> Result<Outcome> {
    with_switch(context, kind, (1, ",on_disconnect=error-after=1"), |rig| {
        rig.settle()?;
        rig.switch.process = None;
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
