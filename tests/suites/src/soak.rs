//! What comes and goes on one guest for a long time, and what its VMM holds meanwhile.

use crate::held::Held;
use anyhow::{Context as _, Result, ensure};
use std::fmt;
use std::time::{Duration, Instant};
use triarch_harness::vm::Vm;

/// How often something comes and goes.
pub struct Soak {
    /// Rounds in all.
    pub rounds: u32,
    /// The first ones, which make what is kept.
    pub settles: u32,
}

impl Soak {
    /// Lets `round` be done with `subject`, whose VMM `vm` gives, and with numbers from 0 on. What the VMM held once it had settled it must hold after each later round.
    pub fn run<S>(
        &self,
        subject: &mut S,
        vm: fn(&S) -> &Vm,
        mut round: impl FnMut(&mut S, u32) -> Result<()>,
    ) -> Result<Soaked> {
        let (rounds, began) = (self.rounds, Instant::now());
        let mut first = None;
        for number in 0..rounds {
            let what = || format!("round {number} of {rounds}");
            round(subject, number).with_context(what)?;
            match &first {
                Some(first) => Held::is_all_of(first, vm(subject)).with_context(what)?,
                None if number + 1 == self.settles => first = Some(Held::at_rest(vm(subject))?),
                None => {}
            }
        }
        ensure!(rounds > self.settles, "{rounds} rounds are too few");
        Ok(Soaked {
            rounds,
            took: began.elapsed(),
            first: first.context("it never settles")?,
            last: Held::of(vm(subject))?,
        })
    }
}

/// What came of it.
pub struct Soaked {
    rounds: u32,
    took: Duration,
    first: Held,
    last: Held,
}

impl fmt::Display for Soaked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rounds,
            took,
            first,
            last,
        } = self;
        write!(f, "{rounds} rounds in {took:.1?}; first {first}; last {last}")
    }
}

/// What something took each time.
#[derive(Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Adds what has passed since `begin`.
    pub fn since(&mut self, begin: Instant) {
        self.0.push(begin.elapsed());
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut times = self.0.clone();
        times.sort_unstable();
        let at = |place: usize| times.get(place).copied().unwrap_or_default();
        let (median, most) = (at(times.len() / 2), at(times.len().saturating_sub(1)));
        write!(f, "{} times, {median:.1?} median, {most:.1?} at most", times.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_by_the_middle_and_the_longest() {
        let times = Times([30, 10, 20].map(Duration::from_millis).to_vec());
        assert_eq!(times.to_string(), "3 times, 20.0ms median, 30.0ms at most");
        assert_eq!(Times::default().to_string(), "0 times, 0.0ns median, 0.0ns at most");
    }
}
