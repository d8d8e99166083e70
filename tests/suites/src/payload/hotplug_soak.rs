//! Processors that come and go for a long time, and in any order.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, Outcome, Test, figure, is_patient, rounds};

use super::hotplug::{done, resize, start};
use crate::held::Held;

/// This module's tests.
pub const TESTS: &[Test] = &[Test::payload(
    "hotplug::many_rounds_leave_nothing_behind",
    many_rounds_leave_nothing_behind,
)
.within(Duration::from_secs(60))
.soak()];

fn many_rounds_leave_nothing_behind(context: &Context) -> Result<Outcome> {
    let rounds = rounds(if is_patient() { 6 } else { 20 });
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    let mut before = None;
    let (mut answers, mut whole) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // The guest waits for the notice already when it is asked.
        for (target, phase) in [
            (4, "the guest started vCPUs 1, 2, 3"),
            (1, "the guest gave back vCPUs 1, 2, 3"),
        ] {
            guest.send("hot serve 3 5000")?;
            let begin = Instant::now();
            resize(&api, target)?;
            answers.push(begin.elapsed());
            guest.answer()?;
            done(&api, phase)?;
            whole.push(begin.elapsed());
        }
        // The first rounds make what is kept.
        if round == 2 {
            before = Some(Held::at_rest(guest.vm())?);
        }
        if let Some(before) = &before {
            before.is_all_of(guest.vm()).with_context(|| format!("round {round}"))?;
        }
    }
    let before = before.context("too few rounds")?;
    let after = Held::of(guest.vm())?;
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    figure(&format!(
        "{rounds} rounds of 3 vCPUs: answer {:?} median, {:?} at most; done {:?} median, {:?} at most; first {before}; last {after}",
        median(&mut answers),
        answers.last().copied().unwrap_or_default(),
        median(&mut whole),
        whole.last().copied().unwrap_or_default(),
    ))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
