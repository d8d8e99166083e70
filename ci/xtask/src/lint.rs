//! Checks of the source: format, compiler's advice, house rules, licences, advisories.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::stdlib::{self, Library};
use crate::{build, licence, openapi, payload, tools};

/// The only places where code may depend on the processor's architecture: a crate, and the module with which the payload guest, a
/// workspace of its own, chooses.
const ARCH_PLACES: [&str; 2] = ["vmm/arch/", "tests/payload/src/arch/mod.rs"];
/// The longest source file, in lines.
const LONGEST: usize = 1000;

/// How a check that did not fail ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is wrong.
    Passed,
    /// It could not be made, and why.
    Skipped(String),
}

/// One check.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Its name, a word or two.
    pub name: &'static str,
    /// Makes the check; an error says what is wrong.
    pub run: fn() -> Result<Outcome>,
}

/// All checks, quick ones first.
pub const CHECKS: [Check; 9] = [
    Check {
        name: "format",
        run: format,
    },
    Check {
        name: "architecture",
        run: architecture,
    },
    Check {
        name: "file length",
        run: file_length,
    },
    Check {
        name: "openapi",
        run: openapi::lint,
    },
    Check {
        name: "licences",
        run: licences,
    },
    Check {
        name: "advisories",
        run: advisories,
    },
    Check {
        name: "payload guest",
        run: payload::lint,
    },
    Check {
        name: "clippy",
        run: clippy,
    },
    Check {
        name: "clippy aarch64",
        run: clippy_aarch64,
    },
];

/// Makes all checks and prints one line each.
///
/// # Errors
/// At least one check failed.
pub fn run() -> Result<()> {
    let mut failed = Vec::new();
    for check in CHECKS {
        let start = Instant::now();
        let result = (check.run)();
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(Outcome::Passed) => println!("lint {} ... ok ({seconds:.1} s)", check.name),
            Ok(Outcome::Skipped(why)) => println!("lint {} ... skipped: {why}", check.name),
            Err(error) => {
                println!("lint {} ... FAILED ({seconds:.1} s)\n{error:#}", check.name);
                failed.push(check.name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    Ok(())
}

fn format() -> Result<Outcome> {
    // Names the files; `cargo fmt` shows and mends the rest.
    tools::output(tools::cargo().args(["fmt", "--all", "--", "--check", "-l"]))?;
    Ok(Outcome::Passed)
}

fn clippy() -> Result<Outcome> {
    let mut command = tools::cargo();
    command.args(["clippy", "--quiet", "--workspace", "--all-targets"]);
    tools::output(command.args(["--", "-D", "warnings"]))?;
    Ok(Outcome::Passed)
}

/// The same advice on the code as compiled for the other architecture.
fn clippy_aarch64() -> Result<Outcome> {
    if let Library::Compiler(_) = stdlib::get(Arch::Aarch64)? {
        let why = "clippy's own compiler has no library for ARM here (docs/test-hosts.md)";
        return Ok(Outcome::Skipped(why.to_owned()));
    }
    let mut command = build::cargo(Arch::Aarch64, &["clippy", "--quiet", "--workspace", "--all-targets"])?;
    tools::output(command.args(["--", "-D", "warnings"]))?;
    Ok(Outcome::Passed)
}

fn git(args: &[&str]) -> Command {
    let mut command = Command::new("git");
    command.current_dir(tools::top()).args(args);
    command
}

/// The files of the project, those not yet added included.
fn files(patterns: &[&str]) -> Result<Vec<String>> {
    let mut command = git(&["ls-files", "--cached", "--others", "--exclude-standard", "--"]);
    let listed = tools::output(command.args(patterns)).context("the checkout is no git repository")?;
    let there = |f: &&str| tools::top().join(f).is_file();
    Ok(listed.lines().filter(there).map(str::to_owned).collect())
}

fn architecture() -> Result<Outcome> {
    // Written in two parts, so that this file does not find itself.
    let word = concat!("target", "_arch");
    let mut wrong = Vec::new();
    for file in files(&["*.rs", "*.toml"])? {
        if ARCH_PLACES.iter().any(|place| file.starts_with(place)) {
            continue;
        }
        let text = fs::read_to_string(tools::top().join(&file))?;
        wrong.extend(lines_with(&text, word).map(|n| format!("    {file}:{n}")));
    }
    if !wrong.is_empty() {
        bail!(
            "{word} stands outside {}:\n{}",
            ARCH_PLACES.join(" and "),
            wrong.join("\n")
        );
    }
    Ok(Outcome::Passed)
}

fn lines_with<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let numbered = text.lines().enumerate();
    numbered.filter(move |(_, l)| l.contains(word)).map(|(n, _)| n + 1)
}

fn file_length() -> Result<Outcome> {
    let mut wrong = Vec::new();
    for file in files(&["*.rs"])? {
        let lines = fs::read_to_string(tools::top().join(&file))?.lines().count();
        if lines > LONGEST {
            wrong.push(format!("    {file}: {lines}"));
        }
    }
    if !wrong.is_empty() {
        bail!("longer than {LONGEST} lines:\n{}", wrong.join("\n"));
    }
    Ok(Outcome::Passed)
}

fn licences() -> Result<Outcome> {
    let mut command = tools::cargo();
    command.args(["metadata", "--format-version", "1", "--locked"]);
    let metadata: serde_json::Value = serde_json::from_str(&tools::output(&mut command)?)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or("?");
        let version = package["version"].as_str().unwrap_or("?");
        match package["license"].as_str() {
            Some(text) if licence::allowed(text) => {}
            other => wrong.push(format!("    {name} {version}: {}", other.unwrap_or("no licence named"))),
        }
    }
    if !wrong.is_empty() {
        bail!(
            "licences that are not on the list in ci/xtask/src/licence.rs:\n{}",
            wrong.join("\n")
        );
    }
    Ok(Outcome::Passed)
}

/// Known vulnerabilities in dependencies, by whichever tool is installed.
fn advisories() -> Result<Outcome> {
    let there = |tool: &str| tools::output(tools::cargo().args([tool, "--version"])).is_ok();
    if !Path::new(&tools::top().join("Cargo.lock")).exists() {
        bail!("there is no Cargo.lock");
    }
    if there("deny") {
        if let Err(error) = tools::output(tools::cargo().args(["deny", "fetch", "db"])) {
            return Ok(unreachable_database(&error));
        }
        tools::output(tools::cargo().args(["deny", "check", "--disable-fetch", "advisories"]))?;
        return Ok(Outcome::Passed);
    }
    if there("audit") {
        return match tools::output(tools::cargo().args(["audit", "--quiet"])) {
            Ok(_) => Ok(Outcome::Passed),
            Err(error) if format!("{error:#}").contains("fetch advisory database") => Ok(unreachable_database(&error)),
            Err(error) => Err(error),
        };
    }
    Ok(Outcome::Skipped(
        "neither cargo-deny nor cargo-audit is installed".to_owned(),
    ))
}

fn unreachable_database(error: &anyhow::Error) -> Outcome {
    let said = format!("{error:#}");
    let last = said.lines().last().unwrap_or_default().trim();
    Outcome::Skipped(format!("the advisory database cannot be fetched: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_numbered_from_one() {
        let found: Vec<usize> = lines_with("a\nxby\n\nb\n", "b").collect();
        assert_eq!(found, [2, 4]);
    }

    #[test]
    fn checks_have_distinct_names() {
        let names: std::collections::BTreeSet<_> = CHECKS.iter().map(|c| c.name).collect();
        assert_eq!(names.len(), CHECKS.len());
    }

    #[test]
    fn this_project_is_listed() {
        let files = files(&["*.rs"]).unwrap();
        assert!(files.iter().any(|f| f == "ci/xtask/src/lint.rs"));
    }
}
