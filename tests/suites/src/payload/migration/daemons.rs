//! Guests whose disks daemons serve.

use super::super::data::pattern;
use super::super::guest::{Guest, builder, number, test_ram};
use super::{MIB, MOVE, Waiting, begin, joined, progress, send};
use crate::storage::{self, Daemon, Program};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tempfile::TempDir;
use triarch_harness::dice::Dice;
use triarch_harness::disk::DiskImage;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, figure, kills, patient};
use triarch_harness::vm::VmBuilder;

/// This module's tests.
pub(super) const TESTS: &[Test] = &[
    Test::payload("migration::vhost::disk_of_qemus", |c| disk(c, Program::Qemu, "")).within(LONG),
    Test::payload("migration::vhost::local_disk_of_qemus", |c| local(c, Program::Qemu, "")).within(LONG),
    Test::payload("migration::vhost::local_disk", |c| local(c, Program::Blkd, "")).within(LONG),
    Test::payload("migration::vhost::local_disk_behind_the_relay", |c| {
        local(c, Program::Blkd, RELAY)
    })
    .within(LONG),
    Test::payload("migration::vhost::disk", |c| disk(c, Program::Blkd, "")).within(LONG),
    Test::payload("migration::vhost::disk_behind_the_relay", |c| {
        disk(c, Program::Blkd, RELAY)
    })
    .within(LONG),
    Test::payload("migration::vhost::what_a_daemon_of_qemus_wrote_is_moved", |c| {
        written(c, Program::Qemu, "")
    })
    .within(LONG),
    Test::payload("migration::vhost::what_a_daemon_wrote_is_moved", |c| {
        written(c, Program::Blkd, "")
    })
    .within(LONG),
    Test::payload("migration::vhost::what_a_daemon_wrote_behind_the_relay_is_moved", |c| {
        written(c, Program::Blkd, RELAY)
    })
    .within(LONG),
    Test::payload(
        "migration::vhost::what_a_daemon_wrote_before_it_was_killed_is_moved",
        unlogged,
    )
    .within(LONG),
    Test::payload("migration::vhost::killed_daemons_of_qemus", |c| {
        killed(c, Program::Qemu)
    })
    .within(KILLS),
    Test::payload("migration::vhost::killed_daemons", |c| killed(c, Program::Blkd)).within(KILLS),
    Test::payload("migration::vhost::disk_of_a_daemon_of_its_own", own).within(LONG),
    Test::payload("migration::vhost::another_daemon_is_refused_by_name", refused).within(LONG),
    Test::payload("migration::vhost::a_disk_that_somebody_has_stays", locked).within(LONG),
];

const LONG: Duration = Duration::from_secs(120);
const KILLS: Duration = Duration::from_secs(300);
const RELAY: &str = ",datapath=relay";
const SIZE: u64 = 16 * MIB;
/// What our daemons have beside the path of the disk where a guest is to come.
const LATE: &str = ",lock=late";
/// Moves of a guest in a row.
const MOVES: u64 = 20;

/// A guest with a disk, and its daemon.
struct Rig {
    guest: Guest,
    daemon: Daemon,
    program: Program,
    image: DiskImage,
    /// Where the image and the daemons' sockets are.
    kept: TempDir,
    moves: u32,
}

impl Rig {
    fn start(context: &Context, program: Program, options: &str) -> Result<Option<Self>> {
        let kept = tempfile::Builder::new().prefix("kept").tempdir_in(&context.dir)?;
        let Some(mut daemon) = Daemon::find(program, context, kept.path(), 2) else {
            return Ok(None);
        };
        let image = DiskImage::with(kept.path().join("disk"), &pattern(1, 0, SIZE as usize))?;
        daemon.start(image.path())?;
        let flag = daemon.flag(&format!(",num_queues=2{options}"));
        let mut guest = Guest::start(builder(context)?.api().flag("--disk", flag))?;
        guest.ask("blk 0 init queues=2")?;
        Ok(Some(Self {
            guest,
            daemon,
            program,
            image,
            kept,
            moves: 0,
        }))
    }

    /// A daemon of another place that serves `image`.
    fn other(&mut self, context: &Context, image: &Path, queues: u16, options: &'static str) -> Result<Daemon> {
        self.moves += 1;
        let dir = self.kept.path().join(format!("daemon{}", self.moves));
        fs::create_dir(&dir)?;
        let mut daemon = Daemon::find(self.program, context, &dir, queues).context("the daemon is gone")?;
        if self.program == Program::Blkd {
            daemon.options = options;
        }
        daemon.start(image)?;
        Ok(daemon)
    }

    /// A daemon of the same disk.
    fn next(&mut self, context: &Context) -> Result<Daemon> {
        let image = self.image.path().to_owned();
        self.other(context, &image, 2, LATE)
    }

    /// Moves the guest to a VMM and a daemon of their own, and ends the others.
    fn go_on(mut self, context: &Context, more: &Value) -> Result<Self> {
        let daemon = self.next(context)?;
        let waiting = Waiting::start(context, "unix", &at(&daemon))?;
        send(&self.guest, &waiting, more)?;
        self.arrived(waiting, daemon)
    }

    /// The guest runs there now.
    fn arrived(self, waiting: Waiting, daemon: Daemon) -> Result<Self> {
        let guest = waiting.guest(self.guest)?;
        let link = storage::wait_state(guest.vm(), "Connected")?;
        ensure!(
            link["reconnects"] == 0,
            "it was not connected before the guest ran: {link}"
        );
        Ok(Self { guest, daemon, ..self })
    }

    fn last_words(&mut self) -> String {
        let (vmm, daemon) = (self.guest.vm().last_words(), self.daemon.last_words());
        format!("the VMM's last words:{vmm}; the daemon's:{daemon}")
    }
}

/// What is different at the destination.
fn at(daemon: &Daemon) -> Value {
    json!({ "config": { "disks": [{ "id": "served", "vhost_socket": daemon.socket() }] } })
}

fn skipped() -> Result<Outcome> {
    Ok(Outcome::Skipped(storage::missing()))
}

/// The guest writes, and compares what it reads; it is moved again and again in the middle of that.
fn disk(context: &Context, program: Program, options: &str) -> Result<Outcome> {
    again_and_again(
        context,
        program,
        options,
        |round| json!({ "connections": 1 + round % 2 }),
    )
}

/// The same with its memory handed over, to the VMM and to the daemon.
fn local(context: &Context, program: Program, options: &str) -> Result<Outcome> {
    again_and_again(context, program, options, |_| super::local::local())
}

fn again_and_again(context: &Context, program: Program, options: &str, request: fn(u64) -> Value) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, program, options)? else {
        return skipped();
    };
    let way = storage::link(rig.guest.vm())?["datapath"].clone();
    for round in 0..MOVES {
        rig.guest.send(&format!("blk 0 soak 600 48 {round} 1000"))?;
        thread::sleep(patient(Duration::from_millis(3 + 7 * (round % 4))));
        rig = rig.go_on(context, &request(round))?;
        let answer = rig.guest.answer();
        answer.with_context(|| format!("round {round}: {}", rig.last_words()))?;
        ensure!(storage::link(rig.guest.vm())?["datapath"] == way);
    }
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// What daemons are to write to, and what is copied behind it.
fn prepare(guest: &mut Guest) -> Result<u64> {
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {MIB} 99"))?;
    guest.ask(&format!("mem fill {} {} 98", ram + 8 * MIB, 8 * MIB))?;
    Ok(ram)
}

/// Begins a migration so slow that it takes seconds, and waits until the first was copied, and not yet all of the second.
fn half_way(guest: &Guest, waiting: &Waiting) -> Result<JoinHandle<Result<String>>> {
    let sending = begin(guest, &waiting.address, &json!({ "bandwidth": 2 * MIB }))?;
    let api = guest.vm().api()?;
    wait("memory is not copied", patient(MOVE), || {
        let answer = api.request("GET", "vm.migration-progress", None)?;
        if !answer.is_success() {
            return Ok(None);
        }
        let found: Value = serde_json::from_str(&answer.body)?;
        // Of 64 MiB the first is at 16, the second from 24 to 32; before the start none are left, either.
        let left = found["remaining"].as_u64().unwrap_or(0);
        Ok((left > 0 && left <= 38 * MIB).then_some(()))
    })?;
    Ok(sending)
}

/// Lets it end soon; it must be in its first round.
fn hurry(guest: &Guest) -> Result<()> {
    let api = guest.vm().api()?;
    let now = progress(api)?;
    ensure!(
        now["phase"] == "copying" && now["rounds"] == 1,
        "it is over too soon: {now}"
    );
    api.put("vm.set-migration", Some(&json!({ "bandwidth": 0 }).to_string()))?;
    Ok(())
}

/// Has the daemon read into memory that was copied.
fn read_into(guest: &mut Guest, ram: u64) -> Result<()> {
    for piece in 0..MIB / 65_536 {
        let (sector, gpa) = (piece * 128, ram + piece * 65_536);
        guest.ask(&format!("blk 0 dma in {sector} 128 {gpa}"))?;
    }
    Ok(())
}

/// What a daemon wrote into memory that was copied already is there afterwards.
fn written(context: &Context, program: Program, options: &str) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, program, options)? else {
        return skipped();
    };
    for round in 0..3 {
        let ram = prepare(&mut rig.guest)?;
        let daemon = rig.next(context)?;
        let waiting = Waiting::start(context, "unix", &at(&daemon))?;
        let sending = half_way(&rig.guest, &waiting)?;
        if round == 1 {
            // A driver that begins anew changes nothing of it.
            rig.guest.ask("blk 0 init queues=2")?;
        }
        read_into(&mut rig.guest, ram)?;
        hurry(&rig.guest)?;
        joined(sending)?;
        rig = rig.arrived(waiting, daemon)?;
        rig.guest
            .ask(&format!("mem verify {ram} {MIB} 1"))
            .with_context(|| format!("round {round}: {}", rig.last_words()))?;
    }
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// One that is killed has not logged all of that.
fn unlogged(context: &Context) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, Program::Blkd, "")? else {
        return skipped();
    };
    for round in 0..4 {
        let ram = prepare(&mut rig.guest)?;
        let daemon = rig.next(context)?;
        let waiting = Waiting::start(context, "unix", &at(&daemon))?;
        let sending = half_way(&rig.guest, &waiting)?;
        read_into(&mut rig.guest, ram)?;
        // It writes its log every 50 ms.
        rig.daemon.kill();
        rig.daemon.options = LATE;
        rig.daemon.start(rig.image.path())?;
        hurry(&rig.guest)?;
        joined(sending)?;
        rig = rig.arrived(waiting, daemon)?;
        rig.guest
            .ask(&format!("mem verify {ram} {MIB} 1"))
            .with_context(|| format!("round {round}: {}", rig.last_words()))?;
    }
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Daemons of both sides are killed at any moment, and come back: no write is lost, wherever the guest is then.
fn killed(context: &Context, program: Program) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, program, "")? else {
        return skipped();
    };
    let mut dice = Dice::new(13);
    let (mut moved, mut stayed) = (0, 0);
    for round in 0..kills() {
        rig.guest.send(&format!("blk 0 soak 600 48 {round} 1000"))?;
        let mut other = rig.next(context)?;
        let waiting = Waiting::start(context, "unix", &at(&other))?;
        let sending = begin(&rig.guest, &waiting.address, &json!({ "bandwidth": 48 * MIB }))?;
        thread::sleep(Duration::from_micros(dice.below(400_000) as u64));
        let image = rig.image.path().to_owned();
        match dice.below(2) {
            0 => {
                rig.daemon.kill();
                if program == Program::Blkd {
                    rig.daemon.options = LATE;
                }
                rig.daemon.start(&image)?;
            }
            _ => {
                other.kill();
                other.start(&image)?;
            }
        }
        match sending
            .join()
            .map_err(|_| anyhow::anyhow!("the client's thread panicked"))?
        {
            Ok(_) => {
                moved += 1;
                rig = Rig {
                    guest: waiting.guest(rig.guest)?,
                    daemon: other,
                    ..rig
                };
            }
            Err(error) => {
                stayed += 1;
                let state = rig.guest.vm().api()?.get("vm.info")?["state"].clone();
                ensure!(state == "Running", "round {round}: {state}: {error:#}");
                waiting.failed()?;
            }
        }
        let answer = rig.guest.answer();
        let answer = answer.with_context(|| format!("round {round}: {}", rig.last_words()))?;
        ensure!(number(&answer, "requests")? >= 600, "round {round}: {answer}");
    }
    ensure!(moved > 0, "none of {stayed} was moved");
    rig.guest.power_off()?;
    figure(&format!(
        "migration::vhost: {} of {moved} moved, {stayed} stayed",
        program.name()
    ))?;
    Ok(Outcome::Passed)
}

/// Each VMM has a daemon of its own.
fn own(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let image = DiskImage::with(kept.path().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let vm = builder(context)?.api().switch("--daemons");
    let mut guest = Guest::start(vm.disk(image.path(), "backend=blkd,id=served,num_queues=2"))?;
    guest.ask("blk 0 init queues=2")?;
    for round in 0..MOVES {
        guest.send(&format!("blk 0 soak 600 48 {round} 1000"))?;
        let vm = VmBuilder::new(context)?.api().switch("--daemons").start()?;
        let waiting = Waiting::on(vm, "unix", &json!({}))?;
        send(&guest, &waiting, &json!({}))?;
        guest = waiting.guest(guest)?;
        guest.answer().with_context(|| format!("round {round}"))?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// What of a daemon the guest could not go on with is told before any memory is moved.
fn refused(context: &Context) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, Program::Blkd, "")? else {
        return skipped();
    };
    let small = DiskImage::empty(rig.kept.path().join("small"), SIZE / 2)?;
    let same = rig.image.path().to_owned();
    let late_readonly = ",lock=late,readonly=on";
    for (image, queues, options, why) in [
        (small.path(), 2, LATE, "has 8388608 bytes"),
        (&same, 1, LATE, "serves 1 queues"),
        (&same, 2, late_readonly, "no longer offers VIRTIO_BLK_F_DISCARD"),
    ] {
        let daemon = rig.other(context, image, queues, options)?;
        let waiting = Waiting::start(context, "unix", &at(&daemon))?;
        let error = send(&rig.guest, &waiting, &json!({})).err().context("it was moved")?;
        let error = format!("{error:#}");
        ensure!(error.contains("device served") && error.contains(why), "{error}");
        let last = progress(rig.guest.vm().api()?)?;
        ensure!(last["pages"] == 0, "memory was moved: {last}");
        waiting.failed()?;
        rig.guest.ask("blk 0 verify 0 64 1")?;
    }
    // There is none.
    let nowhere: PathBuf = rig.kept.path().join("nowhere.sock");
    let there = json!({ "config": { "disks": [{ "id": "served", "vhost_socket": nowhere }] } });
    let waiting = Waiting::start(context, "unix", &there)?;
    let error = send(&rig.guest, &waiting, &json!({})).err().context("it was moved")?;
    ensure!(format!("{error:#}").contains("nowhere.sock"), "{error:#}");
    waiting.failed()?;
    rig.guest.ask("blk 0 verify 0 64 1")?;
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// A disk that the destination cannot have stays with its guest.
fn locked(context: &Context) -> Result<Outcome> {
    let Some(mut rig) = Rig::start(context, Program::Blkd, "")? else {
        return skipped();
    };
    prepare(&mut rig.guest)?;
    rig.guest.send("blk 0 soak 3000 48 1 1000")?;
    let daemon = rig.next(context)?;
    let waiting = Waiting::start(context, "unix", &at(&daemon))?;
    let sending = half_way(&rig.guest, &waiting)?;
    // It ends, and nobody starts another one: the guest cannot have its disk there.
    drop(daemon);
    hurry(&rig.guest)?;
    let error = joined(sending).err().context("it was moved")?;
    ensure!(format!("{error:#}").contains("device served"), "{error:#}");
    waiting.failed()?;
    let state = rig.guest.vm().api()?.get("vm.info")?["state"].clone();
    ensure!(state == "Running", "{state}: {error:#}");
    let answer = rig.guest.answer()?;
    ensure!(number(&answer, "requests")? >= 3000, "{answer}");
    // The lock is here: nobody else gets the disk.
    let mut thief = rig.next(context)?;
    thief.options = "";
    ensure!(
        thief.start(rig.image.path()).is_err(),
        "somebody else has the disk, too"
    );
    drop(thief);
    // And it goes as ever.
    rig = rig.go_on(context, &json!({}))?;
    rig.guest.ask("blk 0 soak 500 48 2 1000")?;
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}
