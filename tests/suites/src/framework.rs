//! Tests of the framework itself: it has to see what goes wrong.

use anyhow::{Context as _, Result, bail, ensure};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;
use triarch_harness::suite::{Context, Level, Outcome, Report, Test, Verdict};

/// The environment variable with which this program offers, instead of the tests, those that go
/// wrong.
pub const VICTIMS: &str = "TRIARCH_SUITES_VICTIMS";

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("framework::sees_what_goes_wrong", sees_what_goes_wrong).without_kvm(),
    Test::payload("framework::needs_a_test_to_run", needs_a_test_to_run).without_kvm(),
];

/// Tests that go wrong.
pub fn victims() -> Vec<Test> {
    let tests = [
        Test::payload("passes", |_| Ok(Outcome::Passed)),
        Test::payload("skips", |_| Ok(Outcome::Skipped("no moon".into()))),
        Test::payload("fails", |_| bail!("wrong sum")),
        Test::payload("panics", |_| panic!("out of cheese")),
        Test::payload("exits", |_| std::process::exit(0)),
        Test::payload("hangs", hangs).within(Duration::from_millis(300)),
        Test::payload("leaves_a_process", |_| {
            Command::new("sleep")
                .arg("60")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            Ok(Outcome::Passed)
        }),
        Test::nested("other_level", |_| Ok(Outcome::Passed)),
    ];
    tests.map(Test::without_kvm).to_vec()
}

fn hangs(context: &Context) -> Result<Outcome> {
    println!("dir {}", context.dir.display());
    thread::sleep(Duration::from_secs(60));
    Ok(Outcome::Passed)
}

fn sees_what_goes_wrong(_: &Context) -> Result<Outcome> {
    let program = std::env::current_exe()?;
    let output = Command::new(program)
        .args(["--json", "--level", "payload"])
        .env(VICTIMS, "1")
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let reports = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Report>, _>>()?;
    let names: Vec<_> = reports.iter().map(|r| r.name.as_str()).collect();
    ensure!(
        names
            == [
                "passes",
                "skips",
                "fails",
                "panics",
                "exits",
                "hangs",
                "leaves_a_process"
            ],
        "{names:?}"
    );
    ensure!(reports.iter().all(|r| r.level == Level::Payload));
    ensure!(!output.status.success(), "failures, and yet success");
    ensure!(reports[0].verdict == Verdict::Passed, "{:?}", reports[0]);
    ensure!(
        reports[1].verdict == Verdict::Skipped { why: "no moon".into() },
        "{:?}",
        reports[1]
    );
    let why = |i: usize| match &reports[i].verdict {
        Verdict::Failed { why } => Ok(why),
        _ => bail!("{:?} should have failed", reports[i]),
    };
    for (i, text) in [
        (2, "wrong sum"),
        (3, "out of cheese"),
        (4, ""),
        (5, "not done in 300ms"),
        (6, "(sleep)"),
    ] {
        ensure!(why(i)?.contains(text), "{}", why(i)?);
    }
    let dir = why(5)?
        .lines()
        .find_map(|l| l.strip_prefix("dir "))
        .context("no directory")?;
    ensure!(!Path::new(dir).exists(), "{dir} is left behind");
    Ok(Outcome::Passed)
}

fn needs_a_test_to_run(_: &Context) -> Result<Outcome> {
    let program = std::env::current_exe()?;
    let run = |name: &str| Command::new(&program).arg(name).env(VICTIMS, "1").output();
    ensure!(run("passes")?.status.success(), "a passing test is no success");
    ensure!(!run("no such name")?.status.success(), "nothing ran, and yet success");
    ensure!(
        !run("skips")?.status.success(),
        "everything was skipped, and yet success"
    );
    Ok(Outcome::Passed)
}
