//! Runs one test: the process around it, and inside it.

use super::{Context, NOTE, Outcome, Report, Test, Verdict, find_triarch};
use crate::capture::tail;
use crate::images::Images;
use crate::kvm;
use crate::process::Process;
use crate::signals;
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use triarch_guest_init::kill_group;

/// The option, not for users, with which this program runs one test inside a new process.
pub(super) const INSIDE: &str = "--inside";
const RESULT: &str = "result.json";
/// A process that was killed may take a moment to go.
const LINGER: Duration = Duration::from_millis(500);

/// Runs `test` in a process of its own.
pub fn run_test(test: &Test) -> Report {
    let start = Instant::now();
    let verdict = around(test).unwrap_or_else(|e| Verdict::Failed { why: format!("{e:#}") });
    let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    Report {
        name: test.name.into(),
        level: test.level,
        verdict,
        millis,
    }
}

fn around(test: &Test) -> Result<Verdict> {
    if let Some(why) = test.needs_kvm.then(kvm::unavailable).flatten() {
        return Ok(Verdict::Skipped { why });
    }
    let dir = tempfile::Builder::new().prefix("triarch-test-").tempdir()?;
    let program = std::env::current_exe().context("this program's path is unknown")?;
    let mut command = Command::new(program);
    command
        .arg(INSIDE)
        .arg(test.level.to_string())
        .arg(test.name)
        .arg(dir.path());
    command.process_group(0);
    let mut process = Process::start(&mut command)?;
    let ended = process.wait(test.limit());
    let group = process.pid();
    let left = if ended.is_ok() {
        members_after(group, LINGER)
    } else {
        Vec::new()
    };
    // None is left if all is well.
    let _ = kill_group(group);
    for note in notes(&process.stdout().text()) {
        println!("{}: {note}", test.name);
    }
    let printed = || {
        let words = [process.stdout(), process.stderr()].map(|c| tail(c.text().as_bytes()));
        words
            .into_iter()
            .filter(|w| !w.is_empty())
            .map(|w| format!("\n{w}"))
            .collect::<String>()
    };
    let Ok(status) = ended else {
        let limit = test.limit();
        return Ok(Verdict::Failed {
            why: format!("not done in {limit:?}{}", printed()),
        });
    };
    let result = fs::read(dir.path().join(RESULT)).ok();
    let outcome = result.and_then(|r| serde_json::from_slice::<Outcome>(&r).ok());
    Ok(match outcome {
        _ if !left.is_empty() => {
            let left = left.join(", ");
            Verdict::Failed {
                why: format!("it left processes behind: {left}{}", printed()),
            }
        }
        Some(Outcome::Passed) if status.success() => Verdict::Passed,
        Some(Outcome::Skipped(why)) if status.success() => Verdict::Skipped { why },
        _ => Verdict::Failed {
            why: printed().trim_start().to_owned(),
        },
    })
}

/// What a test that printed this has told by [`super::note`].
fn notes(printed: &str) -> Vec<&str> {
    printed.lines().filter_map(|line| line.strip_prefix(NOTE)).collect()
}

/// Runs the test here; the other side of [`around`].
pub(super) fn inside(test: &Test, dir: &Path) -> ExitCode {
    let context = Context {
        dir: dir.to_path_buf(),
        triarch: find_triarch(),
        images: Images::find(),
    };
    let run = || {
        // Whoever runs the tests may have been started by nohup(1).
        signals::by_default().context("cannot reset signals")?;
        let outcome = (test.run)(&context)?;
        fs::write(dir.join(RESULT), serde_json::to_vec(&outcome)?).context("cannot tell the result")
    };
    let written = run();
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The living members of a process group, asked again until there are none or time is over.
fn members_after(group: u32, limit: Duration) -> Vec<String> {
    let deadline = Instant::now() + limit;
    loop {
        let left = members(group).unwrap_or_default();
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn members(group: u32) -> Result<Vec<String>> {
    let stats = fs::read_dir("/proc")?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    Ok(stats.filter_map(|stat| member(&stat, group).ok()).collect())
}

/// The process that a line of `/proc/PID/stat` (proc(5)) describes, if it lives and is in `group`.
fn member(stat: &str, group: u32) -> Result<String> {
    // The name may hold anything, also spaces and parentheses.
    let (name, rest) = stat.rsplit_once(')').context("no name")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    match fields.as_slice() {
        [state, _parent, pgrp, ..] if *state != "Z" && *state != "X" && pgrp.parse() == Ok(group) => {
            Ok(format!("{name})"))
        }
        _ => bail!("another one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_living_of_a_group() {
        let stat = "12 (a) b) S 1 77 77 0 -1";
        assert_eq!(member(stat, 77).unwrap(), "12 (a) b)");
        assert!(member(stat, 7).is_err());
        assert!(member("12 (a) Z 1 77 77 0 -1", 77).is_err());
        assert!(member("", 77).is_err());
    }

    #[test]
    fn notes_are_told_apart_from_what_else_is_printed() {
        assert_eq!(notes("one\nnote: two\nthree note: four\nnote: five"), ["two", "five"]);
    }

    #[test]
    fn finds_a_process_left_behind() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 60 >/dev/null 2>&1 &"]).process_group(0);
        let mut process = Process::start(&mut shell).unwrap();
        process.wait(Duration::from_secs(10)).unwrap();
        let left = members_after(process.pid(), Duration::from_millis(50));
        assert!(left.len() == 1 && left[0].contains("sleep"), "{left:?}");
        kill_group(process.pid()).unwrap();
        assert_eq!(members_after(process.pid(), Duration::from_secs(10)), [""; 0]);
    }
}
