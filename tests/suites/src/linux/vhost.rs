//! Disks that a daemon serves, and what happens when it dies: with a stock Linux, whose disk driver is not ours.

use super::blk::{SIZE, read_and_write};
use super::load::{self, Load};
use crate::storage::{self, Daemon, Program, wait_reason, wait_state};
use anyhow::{Context as _, Result, ensure};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test, figure, kills};

pub const TESTS: &[Test] = &[
    Test::nested("vhost::data_matches_on_linux_6_1", |c| {
        data_matches(c, Program::Qemu, Kernel::V6_1)
    }),
    Test::nested("vhost::data_matches_on_linux_6_12", |c| {
        data_matches(c, Program::Qemu, Kernel::V6_12)
    }),
    Test::nested("vhost::no_write_is_lost_with_killed_daemons", |c| {
        killed_daemons(c, Program::Qemu)
    })
    .within(LONG),
    Test::nested("vhost::a_stopped_daemon_stalls_its_disk_only", |c| {
        stopped_daemon(c, Program::Qemu)
    }),
    Test::nested("vhost::pauses_without_a_daemon", |c| {
        pauses_without_daemon(c, Program::Qemu)
    }),
    Test::nested("vhost::grows_and_refuses_another_disk", |c| {
        another_disk(c, Program::Qemu)
    }),
    Test::nested("vhost::requests_fail_when_told_so", |c| requests_fail(c, Program::Qemu)),
    Test::nested("vhost::blkd::data_matches", |c| {
        data_matches(c, Program::Blkd, Kernel::V6_12)
    }),
    Test::nested("vhost::blkd::no_write_is_lost_with_killed_daemons", |c| {
        killed_daemons(c, Program::Blkd)
    })
    .within(LONG),
    Test::nested("vhost::blkd::a_stopped_daemon_stalls_its_disk_only", |c| {
        stopped_daemon(c, Program::Blkd)
    }),
    Test::nested("vhost::blkd::pauses_without_a_daemon", |c| {
        pauses_without_daemon(c, Program::Blkd)
    }),
    Test::nested("vhost::blkd::grows_and_refuses_another_disk", |c| {
        another_disk(c, Program::Blkd)
    }),
    Test::nested("vhost::blkd::requests_fail_when_told_so", |c| {
        requests_fail(c, Program::Blkd)
    }),
];

/// The disk in the guest.
const DISK: &str = "/dev/vda";
/// How long there is load for each kill.
const ROUND: Duration = Duration::from_millis(500);
/// Enough for a hundred kills.
const LONG: Duration = Duration::from_secs(1800);

/// A guest with a disk that a daemon serves, /dev/vda.
struct Rig {
    guest: LinuxVm,
    daemon: Daemon,
    image: DiskImage,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

/// Runs a test with a guest of `queues` vCPUs whose disk of `size` bytes has as many queues, or tells that there is no daemon. `options`
/// are further ones of the disk, beginning with a comma.
fn with_guest(
    context: &Context,
    (whose, kernel): (Program, Kernel),
    queues: u16,
    size: usize,
    options: &str,
    test: impl FnOnce(&mut Rig) -> Result<()>,
) -> Result<Outcome> {
    // Apart from the VM's own directory: the daemon's sockets stay behind.
    let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
    let Some(mut daemon) = Daemon::find(whose, context, dir.path(), queues) else {
        return Ok(Outcome::Skipped(storage::missing()));
    };
    let image = DiskImage::with(dir.path().join("disk"), &pattern(1, size))?;
    daemon.start(image.path())?;
    let flag = daemon.flag(&format!(",num_queues={queues}{options}"));
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.api().cpus(queues.into()).flag("--disk", flag))
        .boot()?;
    let mut rig = Rig {
        guest,
        daemon,
        image,
        _dir: dir,
    };
    test(&mut rig).with_context(|| format!("the VMM's last words:{}", rig.guest.vm().last_words()))?;
    rig.guest.power_off()?;
    Ok(Outcome::Passed)
}

impl Rig {
    fn restart(&mut self) -> Result<()> {
        self.daemon.start(self.image.path())
    }

    /// Compares all that the guest ever wrote in soaks with the image.
    fn compare(&self) -> Result<()> {
        load::compare(&self.image.read(0, load::BYTES)?, &self.guest.agent().get(load::TABLE)?)
    }
}

fn data_matches(context: &Context, whose: Program, kernel: Kernel) -> Result<Outcome> {
    with_guest(context, (whose, kernel), 1, SIZE, "", |rig| {
        read_and_write(&rig.guest, |offset, len| rig.image.read(offset, len))
    })
}

fn killed_daemons(context: &Context, whose: Program) -> Result<Outcome> {
    let kills = kills();
    with_guest(context, (whose, Kernel::V6_12), 2, load::BYTES, "", |rig| {
        // A round in which nothing happens tells what the machine itself costs.
        let quiet = Load::start(&rig.guest, DISK, ROUND, kills)?.end()?;
        let (mut away, mut stalls, mut longer) = (Vec::new(), Vec::new(), Vec::new());
        let mut round = 0;
        while storage::kills_again(rig.guest.vm(), kills, round)? {
            let load = Load::start(&rig.guest, DISK, ROUND, round)?;
            // Somewhere under load.
            thread::sleep(ROUND / 10 + ROUND * (round as u32 * 37 % 83) / 100);
            let killed = Instant::now();
            rig.daemon.kill();
            if round % 4 == 0 {
                // Long enough for several tries.
                thread::sleep(Duration::from_millis(200));
            }
            rig.daemon.start(rig.image.path())?;
            let gone = killed.elapsed();
            away.push(gone);
            let stall = load.end().with_context(|| format!("round {round}"))?;
            stalls.push(stall);
            longer.push(stall.saturating_sub(gone));
            round += 1;
        }
        rig.compare()?;
        let link = wait_state(rig.guest.vm(), "Connected")?;
        ensure!(link["reconnects"].as_u64() >= Some(round), "{link}");
        let again = link["resubmitted"].as_u64().unwrap_or(0);
        figure(&format!(
            "{}: {round} kills, {again} requests given to the next daemon; it was away for {}; no answer came for {}, which is longer \
                 by {}; without a kill for {} ms",
            whose.name(),
            spread(away),
            spread(stalls),
            spread(longer),
            quiet.as_millis()
        ))
    })
}

/// Median and maximum, as text.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let [median, longest] = [times.len() / 2, times.len().saturating_sub(1)];
    let at = |n: usize| times.get(n).map_or(0, Duration::as_millis);
    format!("{} ms (median) to {} ms (longest)", at(median), at(longest))
}

fn stopped_daemon(context: &Context, whose: Program) -> Result<Outcome> {
    with_guest(context, (whose, Kernel::V6_1), 1, load::BYTES, "", |rig| {
        let load = Load::start(&rig.guest, DISK, Duration::from_secs(1), 1)?;
        thread::sleep(Duration::from_millis(300));
        rig.daemon.signal("STOP")?;
        let stopped = Instant::now();
        // All else goes on: the API, and programs in the guest that leave the disk alone.
        while stopped.elapsed() < Duration::from_secs(10) {
            let asked = Instant::now();
            storage::link(rig.guest.vm())?;
            rig.guest.shell("echo still here")?;
            ensure!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
            thread::sleep(Duration::from_millis(500));
        }
        rig.daemon.signal("CONT")?;
        let stall = load.end()?;
        ensure!(
            stall > Duration::from_secs(8),
            "the disk went on for {stall:?} without a daemon"
        );
        rig.compare()?;
        // Nobody gave the daemon up.
        let link = storage::link(rig.guest.vm())?;
        ensure!(link["state"] == "Connected" && link["reconnects"] == 0, "{link}");
        Ok(())
    })
}

fn pauses_without_daemon(context: &Context, whose: Program) -> Result<Outcome> {
    with_guest(context, (whose, Kernel::V6_1), 1, load::BYTES, "", |rig| {
        let load = Load::start(&rig.guest, DISK, Duration::from_secs(1), 1)?;
        thread::sleep(Duration::from_millis(300));
        rig.daemon.kill();
        wait_state(rig.guest.vm(), "Disconnected")?;
        for _ in 0..3 {
            rig.guest.vm().pause()?;
            rig.guest.vm().resume()?;
            rig.guest.shell("true")?;
        }
        // What was in flight outlives the pauses; a daemon may come back during one.
        rig.guest.vm().pause()?;
        rig.daemon.start(rig.image.path())?;
        wait_state(rig.guest.vm(), "Connected")?;
        rig.guest.vm().resume()?;
        load.end()?;
        rig.compare()
    })
}

fn another_disk(context: &Context, whose: Program) -> Result<Outcome> {
    with_guest(context, (whose, Kernel::V6_1), 2, SIZE, "", |rig| {
        let grown = 2 * SIZE as u64;
        rig.daemon.resize(grown)?;
        let wanted = grown / 512;
        rig.guest.shell(&format!(
            "while [ $(cat /sys/block/vda/size) != {wanted} ]; do usleep 10000; done"
        ))?;
        let last = SIZE / 4096 * 2 - 1;
        rig.guest.shell(&format!(
            "dd if=/dev/urandom of=/tmp/new bs=4k count=1; dd if=/tmp/new of=/dev/vda bs=4k seek={last} oflag=direct"
        ))?;
        let new = rig.guest.agent().get("/tmp/new")?;
        ensure!(
            rig.image.read(last as u64 * 4096, 4096)? == new,
            "the host's file differs"
        );
        // A smaller one is refused, and one with fewer queues.
        let small = DiskImage::empty(rig.image.path().with_extension("small"), SIZE as u64)?;
        rig.daemon.start(small.path())?;
        wait_reason(rig.guest.vm(), &format!("the guest knows one of {grown}"))?;
        rig.daemon.queues = 1;
        rig.restart()?;
        wait_reason(rig.guest.vm(), "serves 1 queues, the disk has 2")?;
        rig.daemon.queues = 2;
        rig.restart()?;
        wait_state(rig.guest.vm(), "Connected")?;
        rig.guest.shell("dd if=/dev/vda of=/tmp/all bs=64k iflag=direct")?;
        let all = rig.guest.agent().get("/tmp/all")?;
        ensure!(
            all == rig.image.read(0, grown as usize)?,
            "the guest reads something else"
        );
        Ok(())
    })
}

fn requests_fail(context: &Context, whose: Program) -> Result<Outcome> {
    with_guest(
        context,
        (whose, Kernel::V6_1),
        1,
        SIZE,
        ",on_disconnect=error-after=1",
        |rig| {
            let write = "dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=3 oflag=direct";
            rig.guest.shell(write)?;
            rig.daemon.kill();
            // This one waits, then fails; the next one fails at once.
            for _ in 0..2 {
                let failed = rig.guest.shell(write);
                ensure!(
                    failed
                        .as_ref()
                        .is_err_and(|error| format!("{error:#}").contains("Input/output error")),
                    "{failed:?}"
                );
            }
            wait_state(rig.guest.vm(), "Failing")?;
            rig.restart()?;
            wait_state(rig.guest.vm(), "Connected")?;
            rig.guest.shell(write)?;
            let mut expected = pattern(1, SIZE);
            expected[3 * 4096..4 * 4096].fill(0);
            rig.guest.shell("dd if=/dev/vda of=/tmp/all bs=64k iflag=direct")?;
            ensure!(
                rig.guest.agent().get("/tmp/all")? == expected,
                "the guest reads something else"
            );
            Ok(())
        },
    )
}
