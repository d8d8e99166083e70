//! Processors that come and go for a long time, and in any order.

use anyhow::Result;
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, Outcome, Test, figure, is_patient, rounds};

use super::guest::Guest;
use super::hotplug::{done, resize, start};
use crate::soak::{Soak, Times};

/// This module's tests.
pub const TESTS: &[Test] = &[Test::payload(
    "hotplug::many_rounds_leave_nothing_behind",
    many_rounds_leave_nothing_behind,
)
.within(Duration::from_secs(60))
.soak()];

fn many_rounds_leave_nothing_behind(context: &Context) -> Result<Outcome> {
    let soak = Soak {
        rounds: rounds(if is_patient() { 6 } else { 20 }),
        settles: 3,
    };
    let (mut guest, api) = start(context, "boot=1,max=4")?;
    let (mut answers, mut whole) = (Times::default(), Times::default());
    let soaked = soak.run(&mut guest, Guest::vm, |guest, _| {
        // The guest waits for the notice already when it is asked.
        for (target, phase) in [
            (4, "the guest started vCPUs 1, 2, 3"),
            (1, "the guest gave back vCPUs 1, 2, 3"),
        ] {
            guest.send("hot serve 3 5000")?;
            let begin = Instant::now();
            resize(&api, target)?;
            answers.since(begin);
            guest.answer()?;
            done(&api, phase)?;
            whole.since(begin);
        }
        Ok(())
    })?;
    figure(&format!("3 vCPUs: answer {answers}; done {whole}; {soaked}"))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
