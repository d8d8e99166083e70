//! Memory devices for a long time, and with daemons.

use super::dimms::{BLOCK, MIB, SLOTS, disk_reaches, done, resize, room, start, works};
use super::guest::{Guest, builder};
use crate::soak::{Soak, Times};
use crate::storage::{self, Daemon, Program};
use anyhow::{Context as _, Result, ensure};
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, figure, is_patient, rounds};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("dimms::daemons_reach_memory_that_came", daemons_reach_it).within(Duration::from_secs(60)),
    Test::payload(
        "dimms::many_rounds_leave_nothing_behind",
        many_rounds_leave_nothing_behind,
    )
    .within(Duration::from_secs(240))
    .soak(),
];

fn daemons_reach_it(context: &Context) -> Result<Outcome> {
    let mut found = false;
    for (whose, options) in [
        (Program::Blkd, ",datapath=direct"),
        (Program::Blkd, ",datapath=relay"),
        (Program::Qemu, ""),
    ] {
        let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
        let Some(mut daemon) = Daemon::find(whose, context, dir.path(), 1) else {
            continue;
        };
        found = true;
        let image = DiskImage::with(dir.path().join("disk"), &vec![0; 4 * MIB as usize])?;
        daemon.start(image.path())?;
        let vm = builder(context)?.set("--memory", "size=64M,hotplug_size=8G");
        let mut guest = Guest::start(vm.api().flag("--disk", daemon.flag(options)))?;
        let api = guest.vm().api()?.clone();
        guest.ask("blk 0 info")?;
        for blocks in 1..=3 {
            resize(&api, blocks)?;
            guest.ask("dimm serve 1 5000")?;
            done(&api, "the guest took 128 MiB")?;
            disk_reaches(&mut guest, room() + (blocks - 1) * BLOCK)
                .with_context(|| format!("{}{options}: {}", whose.name(), guest.vm().last_words()))?;
        }
        // Another one is told of all of it.
        daemon.kill();
        daemon.start(image.path())?;
        storage::wait_state(guest.vm(), "Connected")?;
        disk_reaches(&mut guest, room() + 2 * BLOCK)?;
        resize(&api, 1)?;
        guest.ask("dimm serve 2 5000")?;
        done(&api, "the guest gave back 256 MiB")?;
        disk_reaches(&mut guest, room())?;
        let link = storage::link(guest.vm())?;
        ensure!(link["state"] == "Connected" && link["reconnects"] == 1, "{link}");
        guest.power_off()?;
    }
    match found {
        true => Ok(Outcome::Passed),
        false => Ok(Outcome::Skipped(storage::missing())),
    }
}

fn many_rounds_leave_nothing_behind(context: &Context) -> Result<Outcome> {
    let soak = Soak {
        rounds: rounds(if is_patient() { 4 } else { 20 }),
        settles: 3,
    };
    let (mut guest, api) = start(context, ",shared=on")?;
    let (mut answers, mut whole) = (Times::default(), Times::default());
    let soaked = soak.run(&mut guest, Guest::vm, |guest, round| {
        // Every tenth round fills all slots, or as many as an emulated host has memory for.
        let all = if is_patient() { 8 } else { SLOTS };
        let most = if round % 10 == 1 { all } else { 2 };
        for blocks in 1..=most {
            guest.send("dimm serve 1 5000")?;
            let begin = Instant::now();
            resize(&api, blocks)?;
            answers.since(begin);
            guest.answer()?;
            done(&api, "the guest took 128 MiB")?;
            whole.since(begin);
        }
        works(guest, room() + most * BLOCK - MIB, MIB)?;
        guest.send(&format!("dimm serve {most} 10000"))?;
        let begin = Instant::now();
        resize(&api, 0)?;
        answers.since(begin);
        guest.answer()?;
        done(&api, &format!("the guest gave back {} MiB", most * 128))?;
        whole.since(begin);
        Ok(())
    })?;
    figure(&format!("memory devices: answer {answers}; done {whole}; {soaked}"))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
