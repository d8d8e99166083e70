//! The framework of tests that run a whole VMM.
//!
//! Each test runs in a process of its own, leader of a process group, with a directory of its own:
//! a panic, a hang or a crash ends that test only, and what it leaves behind is found, and is a
//! failure. The binary with the tests calls [`main`].

mod cli;
mod run;

pub use cli::main;
pub use run::run_test;

use crate::images::Images;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// The environment variable that says how many times longer than on a usual machine a test of the payload level may take.
pub const PATIENCE: &str = "TRIARCH_PATIENCE";

/// The environment variable that says how often tests kill a daemon, when it is not as often as they do by themselves.
pub const KILLS: &str = "TRIARCH_KILLS";
/// The environment variable that says how often soak tests let something come and go in a running guest, when it is not as often as
/// they do by themselves. With it they have all the time they need.
pub const ROUNDS: &str = "TRIARCH_HOTPLUG_ROUNDS";
/// The environment variable that says how often tests move a guest to and fro, when it is not as often as they do by themselves. With it
/// they have all the time they need.
pub const MOVES: &str = "TRIARCH_MIGRATIONS";
/// The environment variable that makes a benchmark of tests that measure: so many seconds each time.
pub const SECONDS: &str = "TRIARCH_SECONDS";
/// The environment variable that names a file to which tests add a line with what they measured.
pub const FIGURES: &str = "TRIARCH_FIGURES";

/// The environment variable that names a directory to which the test of `tests/golden` copies the snapshot it makes.
pub const GOLDEN: &str = "TRIARCH_GOLDEN";

/// How often a test kills a daemon: as [`KILLS`] says, else 20 times, and four times where everything takes longer.
pub fn kills() -> u64 {
    let named = std::env::var(KILLS).ok().and_then(|text| text.parse().ok());
    let is_slow = std::env::var_os(PATIENCE).is_some();
    named.unwrap_or(if is_slow { 4 } else { 20 })
}

/// How often something comes and goes: as [`ROUNDS`] says, else `few` times.
pub fn rounds(few: u32) -> u32 {
    number(ROUNDS).unwrap_or(few)
}

/// How often a guest is moved: as [`MOVES`] says, else `few` times.
pub fn moves(few: u32) -> u32 {
    number(MOVES).unwrap_or(few)
}

/// The number in a variable of the environment, if there is one.
pub fn number(variable: &str) -> Option<u32> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Adds a line to the file that [`FIGURES`] names, if any.
///
/// # Errors
/// It cannot be written.
pub fn figure(line: &str) -> Result<()> {
    use std::io::Write;
    if let Some(file) = std::env::var_os(FIGURES) {
        let mut file = std::fs::File::options().create(true).append(true).open(file)?;
        writeln!(file, "{line}")?;
    }
    Ok(())
}

/// Starts a line that a test prints for whoever reads the log of the run, also when it passes.
const NOTE: &str = "note: ";

/// Tells something that the log of a run shall show, also when the test passes.
pub fn note(words: &str) {
    for line in words.lines() {
        println!("{NOTE}{line}");
    }
}

/// A time limit of the payload level, on this machine.
pub fn patient(limit: Duration) -> Duration {
    limit * patience()
}

/// Whether everything takes longer here than on a usual machine, so that a test which repeats something does so less often.
pub fn is_patient() -> bool {
    patience() > 1
}

fn patience() -> u32 {
    let factor = std::env::var(PATIENCE).ok().and_then(|text| text.parse().ok());
    factor.unwrap_or(1)
}

/// The time limit of a test that somebody wants to take its time.
const SOAK: Duration = Duration::from_secs(3600);

/// What a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Our own bare-metal guest on any KVM, also one in software.
    Payload,
    /// A Linux guest: a KVM that virtualises the whole processor, in hardware or emulated.
    Nested,
    /// The same on two hosts with a wire between them and a disk that both reach. The test runs on each, at the same time: [`Side`].
    Pair,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Payload => "payload",
            Self::Nested => "nested",
            Self::Pair => "pair",
        })
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "payload" => Ok(Self::Payload),
            "nested" => Ok(Self::Nested),
            "pair" => Ok(Self::Pair),
            _ => Err(format!("{text} is no level; there are payload, nested and pair")),
        }
    }
}

/// The environment variable that says on which of two hosts this is.
pub const SIDE: &str = "TRIARCH_SIDE";
/// The environment variable with what the host [`Side::There`] lacks, in words with blanks between them, for a guest that has all that the
/// other one offers.
pub const LACKS: &str = "TRIARCH_LACKS";

/// One of two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest begins.
    Here,
    /// The other one.
    There,
}

impl Side {
    /// Which of two hosts this is, if it is one.
    pub fn of_this_host() -> Option<Self> {
        std::env::var(SIDE).ok()?.parse().ok()
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Here => "here",
            Self::There => "there",
        })
    }
}

impl FromStr for Side {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "here" => Ok(Self::Here),
            "there" => Ok(Self::There),
            _ => Err(format!("{text} is no side; there are here and there")),
        }
    }
}

/// How a test that did not fail ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It ran and all was right.
    Passed,
    /// It could not run here, because of this.
    Skipped(String),
}

/// What a test is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// A directory of the test's own, removed after it.
    pub dir: PathBuf,
    /// The VMM under test.
    pub triarch: PathBuf,
    /// What guests boot.
    pub images: Images,
}

/// A test.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// `subject::what_holds`.
    pub name: &'static str,
    /// What it needs.
    pub level: Level,
    /// The test itself.
    pub run: fn(&Context) -> Result<Outcome>,
    /// After this it has failed.
    pub timeout: Duration,
    /// Whether it runs a VM: where /dev/kvm cannot be used it is skipped.
    pub needs_kvm: bool,
    /// Whether it takes longer when [`ROUNDS`] or [`MOVES`] says so.
    pub is_soak: bool,
    /// Whether it does nothing most of its time.
    pub is_idle: bool,
}

impl Test {
    /// A test of the payload level, which has ten seconds, and more where [`PATIENCE`] says so.
    pub const fn payload(name: &'static str, run: fn(&Context) -> Result<Outcome>) -> Self {
        Self {
            name,
            level: Level::Payload,
            run,
            timeout: Duration::from_secs(10),
            needs_kvm: true,
            is_soak: false,
            is_idle: false,
        }
    }

    /// A test of the nested level, which has three minutes: hosts may be emulated.
    pub const fn nested(name: &'static str, run: fn(&Context) -> Result<Outcome>) -> Self {
        Self {
            name,
            level: Level::Nested,
            run,
            timeout: Duration::from_secs(180),
            needs_kvm: true,
            is_soak: false,
            is_idle: false,
        }
    }

    /// A test of the pair level, which has five minutes.
    pub const fn pair(name: &'static str, run: fn(&Context) -> Result<Outcome>) -> Self {
        Self {
            name,
            level: Level::Pair,
            run,
            timeout: Duration::from_secs(300),
            needs_kvm: true,
            is_soak: false,
            is_idle: false,
        }
    }

    /// After this it has failed, on this machine.
    pub fn limit(&self) -> Duration {
        if self.is_soak && [ROUNDS, MOVES].iter().any(|name| std::env::var_os(name).is_some()) {
            return SOAK;
        }
        match self.level {
            Level::Payload => patient(self.timeout),
            Level::Nested | Level::Pair => self.timeout,
        }
    }

    /// The same test, which repeats something as often as [`rounds`] or [`moves`] tells.
    #[must_use]
    pub const fn soak(mut self) -> Self {
        self.is_soak = true;
        self
    }

    /// The same test, which waits most of its time for a limit of the VMM's to pass, so that others run beside it where there are several
    /// processors.
    #[must_use]
    pub const fn idle(mut self) -> Self {
        self.is_idle = true;
        self
    }

    /// The same test, which runs no VM.
    #[must_use]
    pub const fn without_kvm(mut self) -> Self {
        self.needs_kvm = false;
        self
    }

    /// The same test with another time limit.
    #[must_use]
    pub const fn within(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

/// How a test ended; with `--json` each is printed as one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The test's name.
    pub name: String,
    /// Its level.
    pub level: Level,
    /// How it ended.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long it took, in milliseconds.
    pub millis: u64,
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Verdict {
    /// It ran and all was right.
    Passed,
    /// It did not run.
    Skipped {
        /// Why.
        why: String,
    },
    /// It ran, and something was wrong.
    Failed {
        /// What, with the end of what the test printed.
        why: String,
    },
}

impl Verdict {
    /// The word for it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Passed => "ok",
            Self::Skipped { .. } => "skipped",
            Self::Failed { .. } => "FAILED",
        }
    }
}

/// Finds the VMM: `TRIARCH_BIN`, or `triarch` in the directory of this program.
fn find_triarch() -> PathBuf {
    std::env::var_os("TRIARCH_BIN").map_or_else(|| beside_us("triarch"), PathBuf::from)
}

/// A file in the directory of this program.
pub(crate) fn beside_us(name: &str) -> PathBuf {
    let us = std::env::current_exe().unwrap_or_default();
    us.parent().unwrap_or_else(|| Path::new(".")).join(name)
}
