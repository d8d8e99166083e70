//! Disks that a daemon serves, and what happens when it dies. The daemon is QEMU's storage daemon, or ours.

use super::data::pattern;
use super::guest::{Guest, builder, number};
use crate::storage::{self, Daemon, Program, soon};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, figure, kills, patient};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("vhost::blk_reads_and_writes", blk_reads_and_writes::<THEIRS>),
    Test::payload("vhost::blk_runs_several_queues", blk_runs_several_queues::<THEIRS>),
    Test::payload(
        "vhost::blk_describes_the_daemons_disk",
        blk_describes_the_daemons_disk::<THEIRS>,
    ),
    Test::payload(
        "vhost::blk_survives_resets_and_pauses",
        blk_survives_resets_and_pauses::<THEIRS>,
    ),
    Test::payload("vhost::blk_grows_while_it_runs", blk_grows_while_it_runs::<THEIRS>),
    Test::payload("vhost::blk_needs_a_daemon_to_start", blk_needs_a_daemon_to_start),
    Test::payload("vhost::no_write_is_lost_with_killed_daemons", killed_daemons::<THEIRS>)
        .within(Duration::from_secs(300)),
    Test::payload("vhost::a_stopped_daemon_stalls_its_disk_only", stopped_daemon::<THEIRS>)
        .within(Duration::from_secs(30)),
    Test::payload(
        "vhost::pauses_and_ends_without_a_daemon",
        pauses_without_daemon::<THEIRS>,
    ),
    Test::payload("vhost::requests_fail_when_told_so", requests_fail::<THEIRS>).within(Duration::from_secs(20)),
    Test::payload("vhost::another_disk_is_refused", another_disk::<THEIRS>).within(Duration::from_secs(20)),
    Test::payload("vhost::blkd::blk_reads_and_writes", blk_reads_and_writes::<OURS>),
    Test::payload("vhost::blkd::blk_runs_several_queues", blk_runs_several_queues::<OURS>),
    Test::payload(
        "vhost::blkd::blk_describes_the_daemons_disk",
        blk_describes_the_daemons_disk::<OURS>,
    ),
    Test::payload("vhost::blkd::blk_grows_while_it_runs", blk_grows_while_it_runs::<OURS>),
    Test::payload("vhost::blkd::the_data_path_can_be_chosen", data_path).within(Duration::from_secs(60)),
    Test::payload("vhost::blkd::limits_change_while_it_runs", limits_change).within(Duration::from_secs(30)),
    Test::payload("vhost::blkd::is_confined_idle_and_ends", confined_and_idle).within(Duration::from_secs(30)),
    Test::payload("vhost::blkd::polls_while_it_pays", polls).within(Duration::from_secs(30)),
    Test::payload("vhost::blkd::one_vm_has_a_disk", one_vm_has_a_disk).within(Duration::from_secs(20)),
    Test::payload(
        "vhost::blkd::blk_survives_resets_and_pauses",
        blk_survives_resets_and_pauses::<OURS>,
    ),
    Test::payload(
        "vhost::blkd::no_write_is_lost_with_killed_daemons",
        killed_daemons::<OURS>,
    )
    .within(Duration::from_secs(300)),
    Test::payload(
        "vhost::blkd::a_stopped_daemon_stalls_its_disk_only",
        stopped_daemon::<OURS>,
    )
    .within(Duration::from_secs(30)),
    Test::payload(
        "vhost::blkd::pauses_and_ends_without_a_daemon",
        pauses_without_daemon::<OURS>,
    ),
    Test::payload("vhost::blkd::requests_fail_when_told_so", requests_fail::<OURS>).within(Duration::from_secs(20)),
    Test::payload("vhost::blkd::another_disk_is_refused", another_disk::<OURS>).within(Duration::from_secs(20)),
];

const THEIRS: bool = false;
pub(super) const OURS: bool = true;

pub(super) const SIZE: u64 = 8 << 20;

/// A guest with a disk that a daemon serves.
pub(super) struct Rig {
    pub(super) guest: Guest,
    pub(super) daemon: Daemon,
    pub(super) image: DiskImage,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

impl Rig {
    /// `None` where the daemon is missing. `options` are further ones of the disk, beginning with a comma.
    fn start<const WHOSE: bool>(context: &Context, queues: u16, options: &str) -> Result<Option<Self>> {
        let whose = if WHOSE == OURS { Program::Blkd } else { Program::Qemu };
        Self::with(context, whose, queues, |daemon| ("--disk", daemon.flag(options)))
    }

    /// The same with a device that `flag` says, a flag and its value.
    pub(super) fn with(
        context: &Context,
        whose: Program,
        queues: u16,
        flag: impl FnOnce(&Daemon) -> (&'static str, String),
    ) -> Result<Option<Self>> {
        // Apart from the VM's own directory: the daemon's sockets stay behind.
        let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
        let Some(mut daemon) = Daemon::find(whose, context, dir.path(), queues) else {
            return Ok(None);
        };
        let image = DiskImage::with(dir.path().join("disk"), &pattern(1, 0, SIZE as usize))?;
        daemon.start(image.path())?;
        let (name, value) = flag(&daemon);
        Ok(Some(Self {
            guest: Guest::start(builder(context)?.api().flag(name, value))?,
            daemon,
            image,
            _dir: dir,
        }))
    }

    fn restart(&mut self) -> Result<()> {
        self.daemon.start(self.image.path())
    }

    /// How the disk stands with its daemon.
    pub(super) fn link(&self) -> Result<serde_json::Value> {
        storage::link(self.guest.vm())
    }

    /// Waits until it stands so.
    fn wait_link(&self, state: &str) -> Result<serde_json::Value> {
        storage::wait_state(self.guest.vm(), state)
    }

    /// The daemon dies some times under load and is back at once; requests go the way `way` before and after it. The driver has two
    /// queues. Where the VMM counts what was in flight (`counted`: it knows that queues of disks answer), something was.
    pub(super) fn outlives_daemons(&mut self, way: &str, counted: bool) -> Result<()> {
        ensure!(self.link()?["datapath"] == way, "not {way}: {}", self.link()?);
        let mut round = 0;
        while round < 4 || counted && storage::kills_again(self.guest.vm(), 4, round)? {
            self.guest.send(&format!("blk 0 soak 2000 48 {round} 1000"))?;
            // Somewhere under load.
            thread::sleep(patient(Duration::from_millis(5 + 8 * (round % 4))));
            self.daemon.kill();
            self.restart()?;
            self.guest.answer().with_context(|| format!("{way}: round {round}"))?;
            round += 1;
        }
        let link = self.wait_link("Connected")?;
        ensure!(link["datapath"] == way, "not {way}: {link}");
        ensure!(link["reconnects"].as_u64() >= Some(4), "it did not come back: {link}");
        Ok(())
    }
}

/// Runs a test that has a daemon, or tells that there is none.
pub(super) fn with_daemon<const WHOSE: bool>(
    context: &Context,
    queues: u16,
    options: &str,
    test: impl FnOnce(&mut Rig) -> Result<()>,
) -> Result<Outcome> {
    on_rig(Rig::start::<WHOSE>(context, queues, options)?, test)
}

/// The same with what was started.
pub(super) fn on_rig(rig: Option<Rig>, test: impl FnOnce(&mut Rig) -> Result<()>) -> Result<Outcome> {
    match rig {
        None => Ok(Outcome::Skipped(storage::missing())),
        Some(mut rig) => {
            test(&mut rig).with_context(|| {
                let (vmm, daemon) = (rig.guest.vm().last_words(), rig.daemon.last_words());
                format!("the VMM's last words:{vmm}; the daemon's:{daemon}")
            })?;
            rig.guest.power_off()?;
            Ok(Outcome::Passed)
        }
    }
}

fn blk_reads_and_writes<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 1, "", |rig| {
        rig.guest.ask("blk 0 verify 0 2048 1")?;
        for (sector, count, seed) in [(0, 1, 2), (7, 9, 3), (1000, 2048, 4), (SIZE / 512 - 1, 1, 5)] {
            rig.guest.ask(&format!("blk 0 write {sector} {count} {seed}"))?;
            rig.guest.ask("blk 0 flush")?;
            let data = rig.image.read(sector * 512, count * 512)?;
            ensure!(data == pattern(seed, sector, count * 512), "sector {sector}");
        }
        rig.guest.refused(&format!("blk 0 write {} 1 1", SIZE / 512))?;
        ensure!(rig.link()?["state"] == "Connected", "{}", rig.link()?);
        Ok(())
    })
}

fn blk_runs_several_queues<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 4, ",num_queues=4,queue_size=64", |rig| {
        for init in ["queues=4", "queues=3 size=32 indirect=0", "queues=4 event_idx=0"] {
            rig.guest.ask(&format!("blk 0 init {init}"))?;
            rig.guest.ask("blk 0 stress 800 8 12")?;
        }
        ensure!(rig.image.read(0, 800 * 4096)? == pattern(12, 0, 800 * 4096));
        Ok(())
    })
}

fn blk_describes_the_daemons_disk<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 2, ",num_queues=2,queue_size=64", |rig| {
        let info = rig.guest.ask("blk 0 info")?;
        ensure!(number(&info, "sectors")? == SIZE / 512, "{info}");
        ensure!(number(&info, "queues")? == 2, "{info}");
        ensure!((1..=62).contains(&number(&info, "seg_max")?), "{info}");
        Ok(())
    })
}

fn blk_survives_resets_and_pauses<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 2, ",num_queues=2", |rig| {
        for seed in 2..5 {
            rig.guest.ask("blk 0 init queues=2")?;
            rig.guest.send(&format!("blk 0 stress 1500 32 {seed}"))?;
            for _ in 0..10 {
                rig.guest.vm().pause()?;
                rig.guest.vm().resume()?;
                thread::sleep(Duration::from_millis(2));
            }
            rig.guest.answer()?;
            ensure!(rig.image.read(0, 1500 * 4096)? == pattern(seed, 0, 1500 * 4096));
            // The whole machine anew, with the same daemon.
            rig.guest.send("pm reset")?;
            rig.guest.wait_ready()?;
        }
        Ok(())
    })
}

fn blk_grows_while_it_runs<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 1, "", |rig| {
        rig.guest.ask("blk 0 verify 0 8 1")?;
        let grown = 2 * SIZE;
        rig.daemon.resize(grown)?;
        let deadline = Instant::now() + soon();
        while number(&rig.guest.ask("blk 0 info")?, "sectors")? != grown / 512 {
            ensure!(Instant::now() < deadline, "the guest sees the old size");
            thread::sleep(Duration::from_millis(5));
        }
        let last = grown / 512 - 8;
        rig.guest.ask(&format!("blk 0 write {last} 8 9"))?;
        // Not through the VMM.
        let refused = rig
            .guest
            .vm()
            .api()?
            .put("vm.resize-disk", Some(r#"{"id":"served","desired_size":33554432}"#));
        ensure!(refused.is_err_and(|error| format!("{error:#}").contains("daemon")));
        Ok(())
    })
}

fn blk_needs_a_daemon_to_start(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let socket = vm.dir().join("nobody");
    let started = Instant::now();
    let vm = vm.flag(
        "--disk",
        format!("vhost_user=on,vhost_socket={},id=served", socket.display()),
    );
    let ended = vm.start()?.expect_end(1)?;
    ensure!(
        ended.stderr.contains("served") && ended.stderr.contains("cannot connect to"),
        "{}",
        ended.stderr
    );
    ensure!(
        started.elapsed() > Duration::from_secs(3),
        "it did not wait for a daemon that is just starting"
    );
    Ok(Outcome::Passed)
}

fn killed_daemons<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    let kills = kills();
    with_daemon::<WHOSE>(context, 2, ",num_queues=2", |rig| {
        rig.guest.ask("blk 0 init queues=2")?;
        let (mut prompt, mut late) = (Vec::new(), Vec::new());
        let mut round = 0;
        while storage::kills_again(rig.guest.vm(), kills, round)? {
            rig.guest.send(&format!("blk 0 soak 3000 48 {round} 1000"))?;
            // Somewhere under load.
            thread::sleep(Duration::from_micros(3000 + round * 7919 % 40_000));
            rig.daemon.kill();
            let is_late = round % 4 == 0;
            if is_late {
                // Long enough for several tries.
                thread::sleep(Duration::from_millis(200));
            }
            rig.restart()?;
            let answer = rig.guest.answer().with_context(|| format!("round {round}"))?;
            let stall = number(&answer, "stall_us")? / 1000;
            if is_late { &mut late } else { &mut prompt }.push(stall);
            round += 1;
        }
        let link = rig.wait_link("Connected")?;
        ensure!(link["reconnects"].as_u64() >= Some(round), "{link}");
        let again = link["resubmitted"].as_u64().unwrap_or(0);
        let metrics = rig.guest.vm().api()?.request("GET", "metrics", None)?.body;
        let line = format!("triarch_daemon_resubmitted_total{{device=\"served\"}} {again}");
        ensure!(metrics.lines().any(|l| l == line), "no `{line}` in {metrics}");
        prompt.sort_unstable();
        let [median, longest] =
            [prompt.len() / 2, prompt.len().saturating_sub(1)].map(|at| prompt.get(at).copied().unwrap_or(0));
        let latest = late.iter().max().copied().unwrap_or(0);
        let whose = if WHOSE == OURS { Program::Blkd } else { Program::Qemu };
        figure(&format!(
            "{}: {round} kills, {again} requests given to the next daemon; without an answer for {median} ms (median), \
             {longest} ms (longest); {latest} ms (longest) when the daemon came back 200 ms later",
            whose.name()
        ))
    })
}

fn data_path(context: &Context) -> Result<Outcome> {
    for (option, way) in [
        ("", "direct"),
        (",datapath=direct", "direct"),
        (",datapath=relay", "relay"),
    ] {
        let outcome = with_daemon::<OURS>(context, 2, &format!(",num_queues=2{option}"), |rig| {
            rig.guest.ask("blk 0 init queues=2")?;
            rig.outlives_daemons(way, true)
                .with_context(|| format!("with `{option}`"))
        })?;
        if !matches!(outcome, Outcome::Passed) {
            return Ok(outcome);
        }
    }
    // QEMU's keeps no record, so it cannot be had that way.
    let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
    let Some(mut daemon) = Daemon::find(Program::Qemu, context, dir.path(), 1) else {
        return Ok(Outcome::Skipped(storage::missing()));
    };
    let image = DiskImage::with(dir.path().join("disk"), &pattern(1, 0, SIZE as usize))?;
    daemon.start(image.path())?;
    let vm = builder(context)?.flag("--disk", daemon.flag(",datapath=direct"));
    let ended = vm.start()?.expect_end(1)?;
    ensure!(ended.stderr.contains("INFLIGHT_SHMFD"), "{}", ended.stderr);
    Ok(Outcome::Passed)
}

fn stopped_daemon<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 1, "", |rig| {
        rig.guest.send("blk 0 soak 4000 32 5 1000")?;
        thread::sleep(Duration::from_millis(10));
        rig.daemon.signal("STOP")?;
        // The API is as quick as ever.
        for _ in 0..20 {
            let asked = Instant::now();
            rig.link()?;
            ensure!(asked.elapsed() < patient(Duration::from_secs(1)));
            thread::sleep(Duration::from_millis(100));
        }
        // Pausing takes no longer than it waits for what is in flight; then the daemon is given up.
        let asked = Instant::now();
        rig.guest.vm().pause()?;
        ensure!(
            asked.elapsed() < patient(Duration::from_secs(8)),
            "{:?}",
            asked.elapsed()
        );
        rig.guest.vm().resume()?;
        rig.daemon.signal("CONT")?;
        rig.daemon.tend(rig.image.path(), Duration::from_millis(500))?;
        rig.guest.answer()?;
        ensure!(rig.wait_link("Connected")?["reconnects"].as_u64() >= Some(1));
        Ok(())
    })
}

fn pauses_without_daemon<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    let Some(mut rig) = Rig::start::<WHOSE>(context, 1, "")? else {
        return Ok(Outcome::Skipped(storage::missing()));
    };
    rig.guest.send("blk 0 soak 2000 32 5 1000")?;
    thread::sleep(Duration::from_millis(10));
    rig.daemon.kill();
    let link = rig.wait_link("Disconnected")?;
    ensure!(
        link["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
        "{link}"
    );
    let asked = Instant::now();
    for _ in 0..5 {
        rig.guest.vm().pause()?;
        rig.guest.vm().resume()?;
    }
    ensure!(asked.elapsed() < soon(), "{:?}", asked.elapsed());
    // What was in flight outlives the pauses.
    rig.guest.vm().pause()?;
    rig.restart()?;
    rig.wait_link("Connected")?;
    rig.guest.vm().resume()?;
    rig.guest.answer()?;
    // And an end needs no daemon.
    rig.guest.send("blk 0 soak 20000 32 6 1000")?;
    thread::sleep(Duration::from_millis(10));
    rig.daemon.kill();
    rig.wait_link("Disconnected")?;
    rig.guest.vm().api()?.put("vmm.shutdown", None)?;
    rig.guest.expect_end(0)?;
    Ok(Outcome::Passed)
}

fn requests_fail<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 1, ",on_disconnect=error-after=1", |rig| {
        rig.guest.ask("blk 0 write 0 8 2")?;
        rig.daemon.kill();
        // This one waits, then fails; the next ones fail at once.
        for command in ["blk 0 write 0 8 3", "blk 0 verify 0 8 2", "blk 0 flush"] {
            let refused = rig.guest.refused(command)?;
            ensure!(refused.contains("I/O error"), "{command}: {refused}");
        }
        ensure!(rig.link()?["state"] == "Failing", "{}", rig.link()?);
        rig.restart()?;
        rig.wait_link("Connected")?;
        rig.guest.ask("blk 0 verify 0 8 2")?;
        rig.guest.ask("blk 0 write 0 8 4")?;
        let events = rig
            .guest
            .vm()
            .api()?
            .request("GET", "vm.events?follow=false", None)?
            .body;
        for event in ["connected", "disconnected", "failing"] {
            ensure!(
                events.contains(&format!("\"event\":\"{event}\"")),
                "no `{event}` in {events}"
            );
        }
        Ok(())
    })
}

fn another_disk<const WHOSE: bool>(context: &Context) -> Result<Outcome> {
    with_daemon::<WHOSE>(context, 2, ",num_queues=2", |rig| {
        rig.guest.ask("blk 0 write 0 8 2")?;
        let small = DiskImage::empty(rig.image.path().with_extension("small"), SIZE / 2)?;
        rig.daemon.start(small.path())?;
        storage::wait_reason(rig.guest.vm(), "the guest knows one of 8388608")?;
        rig.daemon.queues = 1;
        rig.restart()?;
        storage::wait_reason(rig.guest.vm(), "serves 1 queues, the disk has 2")?;
        // The right one is welcome.
        rig.daemon.queues = 2;
        rig.restart()?;
        rig.wait_link("Connected")?;
        rig.guest.ask("blk 0 verify 0 8 2")?;
        Ok(())
    })
}

/// Limits are kept under load, and another one counts at once.
fn limits_change(context: &Context) -> Result<Outcome> {
    with_daemon::<OURS>(context, 2, ",num_queues=2", |rig| {
        let control = rig.daemon.control();
        let limit = |limits: &str| {
            control.put(
                "export.limit",
                Some(&format!(r#"{{"name":"served","limits":{limits}}}"#)),
            )
        };
        rig.guest.ask("blk 0 init queues=2")?;
        limit(r#"{"iops":500,"iops_burst":10}"#)?;
        let asked = Instant::now();
        rig.guest.ask("blk 0 stress 500 16 3")?;
        let took = asked.elapsed();
        // Each block is written and read.
        ensure!(
            took >= Duration::from_millis(1975),
            "1000 requests at 500 a second took {took:?}"
        );
        ensure!(
            took < patient(Duration::from_secs(5)),
            "1000 requests at 500 a second took {took:?}"
        );
        // What waits under a limit that would take minutes goes on without it.
        limit(r#"{"iops":1,"bw":4096}"#)?;
        rig.guest.send("blk 0 stress 500 16 4")?;
        thread::sleep(Duration::from_millis(300));
        limit("{}")?;
        let asked = Instant::now();
        rig.guest.answer()?;
        ensure!(asked.elapsed() < soon(), "{:?}", asked.elapsed());
        ensure!(limit(r#"{"iops":0}"#).is_err() && limit(r#"{"bw_burst":5}"#).is_err());
        let metrics = control.request("GET", "/metrics", None)?.body;
        let held = metrics
            .lines()
            .find_map(|line| line.strip_prefix(r#"triarch_blkd_held_back_total{export="served"} "#));
        ensure!(
            held.is_some_and(|n| n.parse::<u64>().is_ok_and(|n| n > 100)),
            "{metrics}"
        );
        Ok(())
    })
}

/// Neither another front end nor another process gets a disk that is in use.
fn one_vm_has_a_disk(context: &Context) -> Result<Outcome> {
    with_daemon::<OURS>(context, 1, "", |rig| {
        rig.guest.ask("blk 0 write 0 8 2")?;
        let other = builder(context)?.flag("--disk", rig.daemon.flag(""));
        let ended = other.start()?.expect_end(1)?;
        ensure!(ended.stderr.contains("served"), "{}", ended.stderr);
        rig.guest.ask("blk 0 verify 0 8 2")?;
        let control = rig.daemon.control();
        let again = format!(
            r#"{{"name":"again","path":"{}","socket":"{}"}}"#,
            rig.image.path().display(),
            rig.image.path().with_extension("again").display()
        );
        let refused = control.put("export.add", Some(&again));
        ensure!(refused.is_err_and(|error| format!("{error:#}").contains("in use")));
        // With the export gone, another one has the disk.
        control.put("export.remove", Some(r#"{"name":"served"}"#))?;
        rig.wait_link("Disconnected")?;
        control.put(
            "export.add",
            Some(&again.replace("again", "served").replace("disk.served", "disk.sock")),
        )?;
        rig.wait_link("Connected")?;
        rig.guest.ask("blk 0 verify 0 8 2")?;
        Ok(())
    })
}

/// The daemon has no privileges, uses no processor while nothing is asked of it, and ends when it is told to.
fn confined_and_idle(context: &Context) -> Result<Outcome> {
    with_daemon::<OURS>(context, 2, ",num_queues=2", |rig| {
        rig.guest.ask("blk 0 init queues=2")?;
        rig.guest.ask("blk 0 stress 100 8 12")?;
        let proc = |file: &str| Ok::<_, anyhow::Error>(format!("/proc/{}/{file}", rig.daemon.pid()?));
        for task in std::fs::read_dir(proc("task")?)? {
            let status = std::fs::read_to_string(task?.path().join("status"))?;
            for line in [
                "CapEff:\t0000000000000000",
                "CapPrm:\t0000000000000000",
                "NoNewPrivs:\t1",
                "Seccomp:\t2",
            ] {
                ensure!(
                    status.contains(line),
                    "no {line:?} in {}",
                    status.lines().next().unwrap_or_default()
                );
            }
        }
        is_idle(rig)?;
        rig.daemon.signal("TERM")?;
        rig.daemon.expect_end()?;
        rig.wait_link("Disconnected")?;
        rig.restart()?;
        rig.guest.ask("blk 0 stress 100 8 13")?;
        Ok(())
    })
}

/// The daemon uses no processor.
fn is_idle(rig: &Rig) -> Result<()> {
    // User and system time are the 12th and 13th field behind the name.
    let time = || -> Result<Vec<String>> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", rig.daemon.pid()?))?;
        let fields = stat.rsplit_once(')').context("no name")?.1.split_whitespace();
        Ok(fields.skip(11).take(2).map(str::to_owned).collect())
    };
    // What it still does of what came before is soon over.
    thread::sleep(Duration::from_millis(100));
    let before = time()?;
    thread::sleep(Duration::from_secs(2));
    let after = time()?;
    ensure!(after == before, "it used the processor: {before:?}, then {after:?}");
    Ok(())
}

/// With `poll_us`, queues look for requests while they follow each other, and sleep when they do not.
fn polls(context: &Context) -> Result<Outcome> {
    with_daemon::<OURS>(context, 2, ",num_queues=2", |rig| {
        rig.daemon.options = ",poll_us=5000";
        rig.restart()?;
        rig.wait_link("Connected")?;
        rig.guest.ask("blk 0 init queues=2")?;
        rig.guest.ask("blk 0 stress 300 2 7")?;
        let found = |rig: &Rig| -> Result<u64> {
            let metrics = rig.daemon.control().request("GET", "/metrics", None)?.body;
            let name = r#"triarch_blkd_polls_total{export="served",outcome="found"} "#;
            let count = metrics.lines().find_map(|line| line.strip_prefix(name)?.parse().ok());
            count.with_context(|| format!("no {name}in {metrics}"))
        };
        ensure!(found(rig)? > 0, "it found nothing");
        is_idle(rig)?;
        // Another process goes on in the same way.
        rig.daemon.hand_over()?;
        rig.guest.ask("blk 0 stress 300 2 8")?;
        ensure!(found(rig)? > 0, "the next one found nothing");
        is_idle(rig)
    })
}
