//! Memory devices for a long time, and with daemons.

use super::dimms::{BLOCK, MIB, SLOTS, disk_reaches, done, resize, room, start, works};
use super::guest::{Guest, builder};
use crate::held::Held;
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
    let rounds = rounds(if is_patient() { 4 } else { 20 });
    let (mut guest, api) = start(context, ",shared=on")?;
    let mut before = None;
    let (mut answers, mut whole) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Every tenth round fills all slots, or as many as an emulated host has memory for.
        let all = if is_patient() { 8 } else { SLOTS };
        let most = if round % 10 == 1 { all } else { 2 };
        for blocks in 1..=most {
            guest.send("dimm serve 1 5000")?;
            let begin = Instant::now();
            resize(&api, blocks)?;
            answers.push(begin.elapsed());
            guest.answer()?;
            done(&api, "the guest took 128 MiB")?;
            whole.push(begin.elapsed());
        }
        works(&mut guest, room() + most * BLOCK - MIB, MIB)?;
        guest.send(&format!("dimm serve {most} 10000"))?;
        let begin = Instant::now();
        resize(&api, 0)?;
        answers.push(begin.elapsed());
        guest.answer()?;
        done(&api, &format!("the guest gave back {} MiB", most * 128))?;
        whole.push(begin.elapsed());
        // The first rounds make what is kept.
        if round == 2 {
            before = Some(Held::at_rest(guest.vm())?);
        }
        if let Some(before) = &before {
            let same = before.is_all_of(guest.vm());
            same.with_context(|| format!("round {round}"))?;
        }
    }
    let before = before.context("too few rounds")?;
    let after = Held::of(guest.vm())?;
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    figure(&format!(
        "{rounds} rounds of memory, {} resizes: answer {:?} median, {:?} at most; done {:?} median, {:?} at most; first {before}; last {after}",
        answers.len(),
        median(&mut answers),
        answers.last().copied().unwrap_or_default(),
        median(&mut whole),
        whole.last().copied().unwrap_or_default(),
    ))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
