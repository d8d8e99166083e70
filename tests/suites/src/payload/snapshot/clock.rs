//! What becomes of the time between a guest's being saved and restored.

use super::super::guest::{Guest, builder, is_arm, number};
use super::{crash, restore_with, snapshot};
use anyhow::{Result, ensure};
use serde_json::json;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, Outcome, Test, patient};

/// This module's tests.
pub const TESTS: &[Test] =
    &[Test::nested("snapshot::clock::it_stands_or_passes", it_stands_or_passes).within(Duration::from_secs(120))];

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;

/// The guest's counter, and its ticks a millisecond.
fn time(guest: &mut Guest) -> Result<(u64, u64)> {
    let answer = guest.ask("time")?;
    Ok((number(&answer, "ticks")?, number(&answer, "khz")?))
}

/// Whether a guest's counter can be another than the host's.
fn has_offsets(context: &Context) -> Result<bool> {
    if is_arm() {
        return Ok(true);
    }
    let mut guest = Guest::start(builder(context)?)?;
    let (before, _) = time(&mut guest)?;
    guest.ask(&format!("msr write {TSC} 0"))?;
    let (after, _) = time(&mut guest)?;
    guest.power_off()?;
    Ok(after < before)
}

/// How long the guest in `directory` finds that it was away.
fn away(context: &Context, directory: &Path, clock: &str, saved: u64) -> Result<Duration> {
    let mut guest = restore_with(context, directory, json!({ "clock": clock }))?;
    let (ticks, khz) = time(&mut guest)?;
    guest.ask("sleep 5")?;
    guest.power_off()?;
    let micros = ticks.wrapping_sub(saved).saturating_mul(1000) / khz;
    Ok(Duration::from_micros(micros))
}

fn it_stands_or_passes(context: &Context) -> Result<Outcome> {
    if !has_offsets(context)? {
        let why = "this host's KVM takes offsets of time stamp counters, and ignores them";
        return Ok(Outcome::Skipped(why.to_owned()));
    }
    let kept = tempfile::tempdir_in(&context.dir)?;
    let mut guest = Guest::start(builder(context)?.api())?;
    let (saved, _) = time(&mut guest)?;
    guest.vm().pause()?;
    let paused = Instant::now();
    let directory = kept.path().join("snapshot");
    snapshot(guest.vm().api()?, &directory)?;
    crash(guest);
    // So much longer than what else takes time that the two can be told apart.
    thread::sleep(patient(Duration::from_secs(5)));
    let gap = paused.elapsed();
    let stood = away(context, &directory, "Stands", saved)?;
    let asked = paused.elapsed();
    let passed = away(context, &directory, "Passes", saved)?;
    let all = paused.elapsed();
    ensure!(stood < gap, "its time did not stand: {stood:?} in {gap:?}");
    // Counters and the host's clock are not of one rate, nearly.
    let least = asked.mul_f64(0.98);
    ensure!(
        passed >= least && passed <= all.mul_f64(1.02) + patient(Duration::from_secs(2)),
        "{passed:?}, not {asked:?} to {all:?}"
    );
    Ok(Outcome::Passed)
}
