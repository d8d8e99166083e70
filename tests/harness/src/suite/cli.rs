//! The command line of the binary with the tests.

use super::run::{INSIDE, inside};
use super::{Level, Report, Test, Verdict, run_test};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;

const USAGE: &str = "\
usage: triarch-suites [--level payload|nested|pair] [--list] [--json] [--exact] [NAME ...]

Runs tests that run a whole VMM: all of them, or those whose names contain a NAME.
  --level L  only this level
  --exact    a NAME is a whole name, not a part
  --list     print names and levels, run nothing
  --json     print each result as a line of JSON

TRIARCH_BIN    the VMM (default: `triarch` beside this program)
TRIARCH_IMAGES the directory with kernels and initramfs (default: where this program is)
TRIARCH_PATIENCE how many times longer tests of the payload level may take (default: 1)";

#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    level: Option<Level>,
    list: bool,
    json: bool,
    exact: bool,
    names: Vec<String>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--list" => options.list = true,
                "--json" => options.json = true,
                "--exact" => options.exact = true,
                "--level" => {
                    let level = rest.next().ok_or("--level needs payload, nested or pair")?;
                    options.level = Some(level.parse()?);
                }
                other if other.starts_with('-') => {
                    return Err(format!("{other} is not an option\n\n{USAGE}"));
                }
                name => options.names.push(name.into()),
            }
        }
        Ok(options)
    }

    fn wants(&self, test: &Test) -> bool {
        let named = |name: &String| {
            if self.exact {
                test.name == name
            } else {
                test.name.contains(name.as_str())
            }
        };
        self.level.is_none_or(|level| level == test.level) && (self.names.is_empty() || self.names.iter().any(named))
    }
}

/// Runs what the command line asks for; fails if a test failed, or if none ran.
pub fn main(tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [INSIDE, level, name, dir] = arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // A test of the other level may have the same name.
        let is_it = |t: &&Test| t.name == name && t.level.to_string() == level;
        return match tests.iter().find(is_it) {
            Some(test) => inside(test, Path::new(dir)),
            None => ExitCode::FAILURE,
        };
    }
    if arguments.iter().any(|a| a == "--help" || a == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(&arguments) {
        Ok(options) => options,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    let wanted: Vec<&Test> = tests.iter().filter(|test| options.wants(test)).collect();
    if options.list {
        for test in &wanted {
            println!("{:<8} {}", test.level.to_string(), test.name);
        }
        return ExitCode::SUCCESS;
    }
    if run_all(&wanted, options.json) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs tests one after the other, and beside them those that do nothing most of their time, if there is a processor for that; whether some
/// ran and none failed.
fn run_all(tests: &[&Test], json: bool) -> bool {
    let shown = Mutex::new([0; 3]);
    let has_room = thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
    let (idle, others): (Vec<&Test>, Vec<&Test>) = tests.iter().partition(|test| has_room && test.is_idle);
    let run = |tests: &[&Test]| {
        for test in tests {
            let report = run_test(test);
            show(&report, json, &mut shown.lock().unwrap_or_else(PoisonError::into_inner));
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| run(&idle));
        run(&others);
    });
    let [passed, failed, skipped] = shown.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !json {
        println!("{passed} passed, {failed} failed, {skipped} skipped");
    }
    failed == 0 && passed > 0
}

/// Prints how a test ended, and counts it.
fn show(report: &Report, json: bool, counts: &mut [u32; 3]) {
    match report.verdict {
        Verdict::Passed => counts[0] += 1,
        Verdict::Failed { .. } => counts[1] += 1,
        Verdict::Skipped { .. } => counts[2] += 1,
    }
    if json {
        println!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        print!("{}", describe(report));
    }
}

fn describe(report: &Report) -> String {
    let Report {
        name, verdict, millis, ..
    } = report;
    let millis = *millis as f64 / 1000.0;
    let line = format!("{:<8}{millis:8.2} s  {name}\n", verdict.word());
    match verdict {
        Verdict::Passed => line,
        Verdict::Skipped { why } => format!("{}: {why}\n", line.trim_end()),
        Verdict::Failed { why } => {
            let indented = why.lines().map(|l| format!("    {l}\n")).collect::<String>();
            line + &indented
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::Outcome;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        Options::parse(&arguments.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn selects_by_level_and_name() {
        let blk = Test::payload("blk::reads", |_| Ok(Outcome::Passed));
        let boot = Test::nested("boot::one_cpu", |_| Ok(Outcome::Passed));
        let wanted = |arguments: &[&str]| {
            let options = parse(arguments).unwrap();
            [options.wants(&blk), options.wants(&boot)]
        };
        assert_eq!(wanted(&[]), [true, true]);
        assert_eq!(wanted(&["--level", "nested"]), [false, true]);
        assert_eq!(wanted(&["blk"]), [true, false]);
        assert_eq!(wanted(&["--level", "payload", "boot"]), [false, false]);
        assert_eq!(wanted(&["cpu", "read"]), [true, true]);
        assert_eq!(wanted(&["--exact", "blk", "boot::one_cpu"]), [false, true]);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert!(parse(&["--levl"]).unwrap_err().starts_with("--levl is not an option"));
        assert!(parse(&["--level"]).is_err());
        assert!(parse(&["--level", "unit"]).is_err());
    }

    #[test]
    fn nothing_run_is_no_success() {
        assert!(!run_all(&[], true));
    }
}
