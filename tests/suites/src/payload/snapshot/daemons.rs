//! Devices that daemons serve go on with other daemons, at other sockets.

use super::super::data::pattern;
use super::super::guest::{Guest, builder, field, number};
use super::super::{vhost, vhost_net};
use super::{crash, edit, restore_with, snapshot};
use crate::storage::{self, Daemon, soon};
use crate::switches::{self, Switch, skipped};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome, Test, patient};
use triarch_harness::vm::{Vm, VmBuilder};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("snapshot::vhost::disk_of_qemus", |c| {
        disk(c, storage::Program::Qemu, "")
    })
    .within(LONG),
    Test::payload("snapshot::vhost::disk", |c| disk(c, storage::Program::Blkd, "")).within(LONG),
    Test::payload("snapshot::vhost::disk_behind_the_relay", |c| {
        disk(c, storage::Program::Blkd, RELAY)
    })
    .within(LONG),
    Test::payload("snapshot::vhost::requests_of_a_killed_one_of_qemus", |c| {
        unanswered(c, storage::Program::Qemu, KILLED)
    })
    .within(LONG),
    Test::payload("snapshot::vhost::requests_of_a_killed_one", |c| {
        unanswered(c, storage::Program::Blkd, KILLED)
    })
    .within(LONG),
    Test::payload("snapshot::vhost::requests_of_one_that_hangs", |c| {
        unanswered(c, storage::Program::Blkd, HANGING)
    })
    .within(LONG),
    Test::payload("snapshot::vhost::interfaces", |c| interfaces(c, "")).within(LONG),
    Test::payload("snapshot::vhost::interfaces_behind_the_relay", |c| interfaces(c, RELAY)).within(LONG),
    Test::payload("snapshot::vhost_fs::files", files).within(LONG),
    Test::payload("snapshot::vhost_fs::files_of_a_daemon_that_is_gone", lost_files).within(LONG),
];

const LONG: Duration = Duration::from_secs(90);
const RELAY: &str = ",datapath=relay";
const ROUNDS: u64 = 4;
/// What becomes of a daemon before its guest is saved.
const KILLED: bool = false;
const HANGING: bool = true;

/// A guest with a disk, and its daemon.
struct Disk {
    rig: vhost::Rig,
    program: storage::Program,
    /// Where its daemons after the first one are, and its snapshots.
    kept: TempDir,
    moves: u32,
}

impl Disk {
    fn start(context: &Context, program: storage::Program, options: &str) -> Result<Option<Self>> {
        let options = format!(",num_queues=2{options}");
        let rig = vhost::Rig::with(context, program, 2, |daemon| ("--disk", daemon.flag(&options)))?;
        let Some(mut rig) = rig else { return Ok(None) };
        rig.guest.ask("blk 0 init queues=2")?;
        Ok(Some(Self {
            rig,
            program,
            kept: tempfile::Builder::new().prefix("kept").tempdir_in(&context.dir)?,
            moves: 0,
        }))
    }

    /// Saves the guest, ends its VMM and its daemon, and goes on with others.
    fn go_on(&mut self, context: &Context) -> Result<()> {
        self.moves += 1;
        let directory = self.kept.path().join(format!("snapshot{}", self.moves));
        let sockets = self.kept.path().join(format!("daemon{}", self.moves));
        fs::create_dir(&sockets)?;
        self.rig.guest.vm().pause()?;
        snapshot(self.rig.guest.vm().api()?, &directory)?;
        let daemon = Daemon::find(self.program, context, &sockets, 2).context("the daemon is gone")?;
        edit(&directory, |config| {
            config["disks"][0]["vhost_socket"] = json!(daemon.socket());
        })?;
        // The old one is still there: nothing of it may be needed.
        let mut old = std::mem::replace(&mut self.rig.daemon, daemon);
        old.kill();
        self.rig.daemon.start(self.rig.image.path())?;
        let vm = VmBuilder::new(context)?.api().start()?;
        let guest = super::restore_in(vm, &directory, json!({}))?;
        let before = std::mem::replace(&mut self.rig.guest, guest);
        let words = before.vm().last_words();
        ensure!(
            !words.contains("GET_FEATURES"),
            "it tried a daemon that hangs again while the guest stood still: {words}"
        );
        crash(before);
        self.rig.guest.vm().resume()?;
        let link = storage::wait_state(self.rig.guest.vm(), "Connected")?;
        ensure!(
            link["reconnects"] == 0,
            "it was not connected before the guest ran: {link}"
        );
        Ok(())
    }

    fn last_words(&mut self) -> String {
        let (vmm, daemon) = (self.rig.guest.vm().last_words(), self.rig.daemon.last_words());
        format!("the VMM's last words:{vmm}; the daemon's:{daemon}")
    }
}

/// The guest writes, and compares what it reads; it is saved in the middle of that.
fn disk(context: &Context, program: storage::Program, options: &str) -> Result<Outcome> {
    let Some(mut disk) = Disk::start(context, program, options)? else {
        return Ok(Outcome::Skipped(storage::missing()));
    };
    let way = storage::link(disk.rig.guest.vm())?["datapath"].clone();
    let expected = match (program, options) {
        (storage::Program::Blkd, "") => "direct",
        _ => "relay",
    };
    ensure!(way == expected, "{way}, not {expected}");
    for round in 0..ROUNDS {
        disk.rig.guest.send(&format!("blk 0 soak 3000 48 {round} 1000"))?;
        thread::sleep(patient(Duration::from_millis(10 + 7 * round)));
        disk.go_on(context)?;
        let answer = disk.rig.guest.answer();
        answer.with_context(|| format!("round {round}: {}", disk.last_words()))?;
        ensure!(storage::link(disk.rig.guest.vm())?["datapath"] == way);
    }
    // What the driver wrote into the configuration space, every daemon is told.
    for writeback in [0, 1, 0] {
        disk.rig.guest.ask(&format!("blk 0 writeback {writeback}"))?;
        disk.go_on(context)?;
        let known = number(&disk.rig.guest.ask("blk 0 info")?, "writeback")?;
        ensure!(known == writeback, "{known}, not {writeback}");
    }
    disk.rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The same with a daemon that was killed before, or is stopped for good: what it had not answered, the next one does.
fn unanswered(context: &Context, program: storage::Program, hangs: bool) -> Result<Outcome> {
    let Some(mut disk) = Disk::start(context, program, "")? else {
        return Ok(Outcome::Skipped(storage::missing()));
    };
    let (mut again, least) = (0, if hangs { 1 } else { ROUNDS });
    for round in 0.. {
        ensure!(round < 50, "nothing was in flight in any round");
        disk.rig.guest.send(&format!("blk 0 soak 3000 48 {round} 1000"))?;
        thread::sleep(patient(Duration::from_millis(5 + 7 * (round % 5))));
        if hangs {
            disk.rig.daemon.signal("STOP")?;
        } else {
            disk.rig.daemon.kill();
            storage::wait_state(disk.rig.guest.vm(), "Disconnected")?;
        }
        disk.go_on(context)?;
        let answer = disk.rig.guest.answer();
        answer.with_context(|| format!("round {round}: {}", disk.last_words()))?;
        again += resubmitted(disk.rig.guest.vm())?;
        if again > 0 && round + 1 >= least {
            break;
        }
    }
    disk.rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Requests that were given to the daemon because the one before had not answered them.
fn resubmitted(vm: &Vm) -> Result<u64> {
    let metrics = vm.api()?.request("GET", "metrics", None)?.body;
    let name = "triarch_daemon_resubmitted_total{device=\"served\"} ";
    let count = metrics.lines().find_map(|line| line.strip_prefix(name));
    Ok(count.context("no such metric")?.parse()?)
}

fn interfaces(context: &Context, options: &str) -> Result<Outcome> {
    let Some(mut rig) = vhost_net::Rig::start(context, switches::Program::Netd, 1, options)? else {
        return skipped();
    };
    let kept = tempfile::tempdir_in(&context.dir)?;
    rig.guest.ask("net 0 init")?;
    rig.guest.ask("net 1 init")?;
    rig.settle()?;
    rig.cross(0, 1000, "")?;
    for round in 0..2 {
        // Frames are on their way: nobody promises that they arrive, only that others do afterwards.
        rig.guest.send("net 0 send 400 7 200")?;
        rig.guest.vm().pause()?;
        let directory = kept.path().join(format!("snapshot{round}"));
        snapshot(rig.guest.vm().api()?, &directory)?;
        let mut switch = Switch::find(switches::Program::Netd, context, 1)?.context("the switch is gone")?;
        switch.start()?;
        edit(&directory, |config| {
            for n in 0..2 {
                config["net"][n]["vhost_socket"] = json!(switch.socket(n));
            }
        })?;
        crash(rig.guest);
        let guest = restore_with(context, &directory, json!({}))?;
        rig = vhost_net::Rig { guest, switch };
        rig.guest.answer()?;
        rig.settle()
            .with_context(|| format!("the VMM's last words:{}", rig.guest.vm().last_words()))?;
        rig.cross(0, 2000 * (round + 1), "")?;
        rig.cross(1, 2000 * (round + 1) + 500, "")?;
    }
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

const VIRTIOFSD: &str = "virtiofsd";

/// A guest with a directory of the host's.
struct Files {
    guest: Guest,
    daemon: Process,
    kept: TempDir,
}

impl Files {
    fn start(context: &Context) -> Result<Option<Self>> {
        let Ok(program) = context.images.path(VIRTIOFSD) else {
            return Ok(None);
        };
        let kept = tempfile::Builder::new().prefix("files").tempdir_in(&context.dir)?;
        let shared = kept.path().join("shared");
        fs::create_dir(&shared)?;
        fs::write(shared.join("file"), pattern(3, 0, 50_000))?;
        let socket = kept.path().join("first.sock");
        let daemon = virtiofsd(&program, &shared, &socket)?;
        let vm = builder(context)?.api();
        let guest = Guest::start(vm.flag("--fs", format!("tag=shared,socket={},id=files", socket.display())))?;
        Ok(Some(Self { guest, daemon, kept }))
    }

    fn shared(&self) -> PathBuf {
        self.kept.path().join("shared")
    }

    fn reads(&mut self, expected: &str) -> Result<()> {
        let answer = self.guest.ask("fs 0 read file")?;
        let found = field(&answer, "crc32")?;
        ensure!(found == expected, "{found}, not {expected}");
        Ok(())
    }
}

fn virtiofsd(program: &Path, shared: &Path, socket: &Path) -> Result<Process> {
    let mut command = Command::new(program);
    command.arg(format!("--socket-path={}", socket.display()));
    command.arg(format!("--shared-dir={}", shared.display()));
    command.args(["--sandbox=chroot", "--inode-file-handles=never"]);
    command.args(["--migration-mode=find-paths", "--migration-on-error=abort"]);
    let daemon = Process::start(&mut command)?;
    let deadline = Instant::now() + soon();
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "it does not listen{}", daemon.last_words());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(daemon)
}

/// What virtiofsd knows of the guest goes with it.
fn files(context: &Context) -> Result<Outcome> {
    let Some(mut files) = Files::start(context)? else {
        return Ok(Outcome::Skipped(format!("there is no {VIRTIOFSD} among the images")));
    };
    let answer = files.guest.ask("fs 0 read file")?;
    let expected = field(&answer, "crc32")?.to_owned();
    for round in 0..2 {
        files.guest.vm().pause()?;
        let directory = files.kept.path().join(format!("snapshot{round}"));
        snapshot(files.guest.vm().api()?, &directory)
            .with_context(|| format!("the daemon's last words:{}", files.daemon.last_words()))?;
        // The guest that was saved goes on with the daemon that it has.
        files.guest.vm().resume()?;
        files.reads(&expected)?;
        let socket = files.kept.path().join(format!("next{round}.sock"));
        let program = context.images.path(VIRTIOFSD)?;
        let daemon = virtiofsd(&program, &files.shared(), &socket)?;
        edit(&directory, |config| config["fs"][0]["socket"] = json!(socket))?;
        crash(files.guest);
        let guest = restore_with(context, &directory, json!({}))
            .with_context(|| format!("the daemon's last words:{}", daemon.last_words()))?;
        files = Files { guest, daemon, ..files };
        // Its session goes on: it does not begin one.
        files.reads(&expected)?;
        files.guest.ask("fs 0 write file 20000 9")?;
        let found = fs::read(files.shared().join("file"))?;
        ensure!(
            found[..20_000] == pattern(9, 0, 20_000),
            "the host reads something else"
        );
        files.guest.ask("fs 0 write file 50000 3")?;
    }
    files.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Nobody else knows it.
fn lost_files(context: &Context) -> Result<Outcome> {
    let Some(files) = Files::start(context)? else {
        return Ok(Outcome::Skipped(format!("there is no {VIRTIOFSD} among the images")));
    };
    let Files {
        mut guest,
        daemon,
        kept,
    } = files;
    guest.ask("fs 0 read file")?;
    drop(daemon);
    let api = guest.vm().api()?;
    let link = || -> Result<Value> { Ok(api.get("vm.info")?["links"]["files"]["state"].clone()) };
    let deadline = Instant::now() + soon();
    while link()? != "Disconnected" {
        ensure!(Instant::now() < deadline, "{}", link()?);
        thread::sleep(Duration::from_millis(5));
    }
    guest.vm().pause()?;
    let directory = kept.path().join("snapshot");
    let to = super::url("destination_url", &directory);
    api.refused("vm.snapshot", &to, 400, &["files", "no daemon serves the device"])?;
    ensure!(!directory.exists(), "something was left");
    guest.vm().resume()?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
