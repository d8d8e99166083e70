//! The unit tests of all crates, run by their own programs so that names and counts can be merged.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::tally::{Tally, Verdict};
use crate::arch::Arch;
use crate::{build, packages, tools};

/// A compiled test program.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    /// Its crate's name.
    name: String,
    file: PathBuf,
    /// Where its package lies, in which cargo would start it.
    dir: PathBuf,
}

/// Builds and runs the unit tests whose names contain one of `filters`.
///
/// # Errors
/// They do not compile, or a program cannot be started.
pub fn run(filters: &[String], tally: &mut Tally) -> Result<()> {
    packages::require(&packages::UNIT_TESTS)?;
    let words = [
        "test",
        "--quiet",
        "--workspace",
        "--lib",
        "--bins",
        "--tests",
        "--no-run",
    ];
    let mut command = build::cargo(Arch::native(), &words)?;
    command.args(["--message-format", "json-render-diagnostics"]);
    let messages = tools::step("building unit tests", || {
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("`{}` failed: {}", tools::shown(&command), output.status);
        }
        Ok(String::from_utf8(output.stdout)?)
    })?;
    let programs = programs(&messages)?;
    if programs.is_empty() {
        bail!("cargo names no test program");
    }
    programs
        .iter()
        .try_for_each(|program| run_program(program, filters, tally))
}

/// The test programs in cargo's messages (cargo's reference, "JSON messages").
fn programs(messages: &str) -> Result<Vec<Program>> {
    #[derive(Deserialize)]
    struct Message {
        manifest_path: Option<PathBuf>,
        target: Option<Target>,
        profile: Option<Profile>,
        executable: Option<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let mut found = Vec::new();
    for line in messages.lines().filter(|l| l.starts_with('{')) {
        let message: Message = serde_json::from_str(line).context("cargo printed something unknown")?;
        if let (Some(manifest), Some(target), Some(Profile { test: true }), Some(file)) = (
            message.manifest_path,
            message.target,
            message.profile,
            message.executable,
        ) {
            let dir = manifest.parent().unwrap_or(Path::new("/")).to_path_buf();
            let name = target.name;
            found.push(Program { name, file, dir });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn run_program(program: &Program, filters: &[String], tally: &mut Tally) -> Result<()> {
    // A name given by the user may be that of the crate.
    let whole = super::selected(filters, &program.name);
    let filters = if whole { &[][..] } else { filters };
    let start = Instant::now();
    let output = Command::new(&program.file)
        .args(["--color", "never", "--format", "pretty"])
        .args(filters)
        .current_dir(&program.dir)
        .env("CARGO_MANIFEST_DIR", &program.dir)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", program.file.display()))?;
    let time = start.elapsed();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut failed = 0;
    for (name, verdict) in others(&text) {
        failed += usize::from(matches!(verdict, Verdict::Failed(_)));
        tally.add(&format!("{}::{name}", program.name), verdict, None);
    }
    let passed = passed(&text);
    if (!output.status.success() && failed == 0) || passed.is_none() {
        let said = text + &String::from_utf8_lossy(&output.stderr);
        let why = format!("ended with {}\n{}", output.status, tools::tail(&said, 30));
        tally.add(&program.name, Verdict::Failed(why), Some(time));
    }
    tally.add_passed(&program.name, passed.unwrap_or(0), time);
    Ok(())
}

/// How many tests passed, as the program itself sums up at its end; `None` if it did not get there.
fn passed(text: &str) -> Option<usize> {
    let summary = text.lines().rev().find_map(|line| line.strip_prefix("test result: "))?;
    let counts = summary.split([';', '.']).map(str::trim);
    counts.filter_map(|c| c.strip_suffix(" passed")?.parse().ok()).next()
}

/// The tests that did not pass; those that failed with what they printed.
fn others(text: &str) -> Vec<(String, Verdict)> {
    let tests = text
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    tests
        .filter_map(|(name, word)| {
            let name = name.trim_end_matches(" - should panic");
            let verdict = match word.split([',', ' ']).next() {
                Some("ignored") => Verdict::Skipped(word.to_owned()),
                Some("FAILED") => Verdict::Failed(printed(text, name)),
                _ => return None,
            };
            Some((name.to_owned(), verdict))
        })
        .collect()
}

/// What a failed test printed.
fn printed(text: &str, name: &str) -> String {
    let heading = format!("---- {name} stdout ----\n");
    let part = text.split_once(&heading).map_or("", |(_, rest)| rest);
    let end = part.find("\n---- ").or_else(|| part.find("\n\nfailures:\n"));
    part[..end.unwrap_or(part.len())].trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found() {
        let messages = r#"
{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"name":"a","kind":["lib"]},"profile":{"test":false},"executable":null}
{"reason":"compiler-artifact","manifest_path":"/w/b/Cargo.toml","target":{"name":"b"},"profile":{"test":true},"executable":"/t/b-1"}
{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"name":"a"},"profile":{"test":true},"executable":"/t/a-2"}
{"reason":"build-finished","success":true}
"#;
        let found = programs(messages).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|p| (p.name.as_str(), p.file.to_str().unwrap()))
            .collect();
        assert_eq!(names, [("a", "/t/a-2"), ("b", "/t/b-1")]);
        assert_eq!(found[1].dir, Path::new("/w/b"));
    }

    #[test]
    fn results_are_read() {
        let text = "\nrunning 5 tests\ntest a::b ... ok\ntest c ... FAILED\ntest d - should panic ... ok\n\
                    test e ... ignored, slow\ntest f ... FAILED\n\nfailures:\n\n---- c stdout ----\nleft: 1\n\
                    ---- f stdout ----\nboom\n\n\nfailures:\n    c\n    f\n\ntest result: FAILED. 2 passed\n";
        assert_eq!(passed(text), Some(2));
        assert_eq!(passed("running 1 test\ntest a ... ok\n"), None);
        let expected = [
            ("c", Verdict::Failed("left: 1".into())),
            ("e", Verdict::Skipped("ignored, slow".into())),
            ("f", Verdict::Failed("boom".into())),
        ];
        assert_eq!(others(text), expected.map(|(name, verdict)| (name.to_owned(), verdict)));
    }

    #[test]
    fn a_program_that_crashes_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("crash");
        std::fs::write(&file, "#!/bin/sh\necho 'test a ... ok'\nkill -9 $$\n").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let program = Program {
            name: "crash".into(),
            file,
            dir: dir.path().into(),
        };
        let mut tally = Tally::new(std::io::sink());
        run_program(&program, &[], &mut tally).unwrap();
        assert_eq!(tally.counts(), "0 passed, 1 failed, 0 skipped");
    }
}
