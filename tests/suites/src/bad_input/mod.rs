//! Bad input: one clear sentence on standard error with cause and fix, the exit code that tells whose fault it is, no panic, nothing
//! left behind.
//!
//! No guest runs in these tests. They pass on what a user could get wrong and read what the VMM says about it.

mod boot;
mod devices;
mod flags;
mod hosts;
mod interfaces;
mod sizes;
mod sockets;

use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::VmBuilder;

use crate::payload::guest::builder;
use crate::payload::payload_tests;

/// This module's tests.
pub fn tests() -> Vec<Test> {
    [
        boot::TESTS,
        sizes::TESTS,
        devices::TESTS,
        interfaces::TESTS,
        sockets::TESTS,
        flags::TESTS,
        hosts::TESTS,
    ]
    .concat()
}

/// The exit code of what is wrong whatever the host.
const WRONG: i32 = 2;
/// The exit code of what cannot be had: what a flag names is not there, in use, or not what it should be.
const FAILED: i32 = 1;
/// The exit code of hosts that cannot run any VM.
const HOST: i32 = 3;

/// Starts it and expects the refusal, as wrong in itself, to say all of `words`.
pub(crate) fn refused(context: &Context, vm: VmBuilder, words: &[&str]) -> Result<()> {
    ended(context, vm, WRONG, words)
}

/// Starts it and expects it to say all of `words` about what cannot be had.
pub(crate) fn failed(context: &Context, vm: VmBuilder, words: &[&str]) -> Result<()> {
    ended(context, vm, FAILED, words)
}

/// Starts it and expects it to end with `code` and to say all of `words`.
fn ended(context: &Context, vm: VmBuilder, code: i32, words: &[&str]) -> Result<()> {
    let beside = |dir: &Path| -> Result<BTreeSet<OsString>> {
        let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name()));
        names.collect()
    };
    let (own, mut shared) = (beside(vm.dir())?, beside(&context.dir)?);
    let vm_dir = vm.dir().file_name().map(OsString::from);
    let ended = vm
        .start()?
        .expect_end(code)
        .with_context(|| format!("should be refused for {words:?}"))?;
    let lines: Vec<_> = ended.stderr.lines().collect();
    let [line] = lines[..] else {
        bail!("not one sentence but: {}", ended.stderr);
    };
    ensure!(line.starts_with("triarch: "), "`{line}` does not say who speaks");
    ensure!(!line.contains("panicked"), "{line}");
    for word in words {
        ensure!(line.contains(word), "no `{word}` in `{line}`");
    }
    ensure!(ended.output.is_empty(), "on standard output: {}", ended.output);
    let left: BTreeSet<OsString> = ended.files.into_iter().collect();
    ensure!(left == own, "in its directory {left:?}, before it {own:?}");
    shared.retain(|name| Some(name) != vm_dir.as_ref());
    let left = beside(&context.dir)?;
    ensure!(left == shared, "in the test's directory {left:?}, before it {shared:?}");
    Ok(())
}

/// Each value of `flag` is refused with its words.
fn each(context: &Context, flag: &str, cases: &[(&str, &[&str])]) -> Result<Outcome> {
    each_ends(context, flag, WRONG, cases)
}

/// Each value of `flag` asks for what cannot be had, and is told so with its words.
fn each_fails(context: &Context, flag: &str, cases: &[(&str, &[&str])]) -> Result<Outcome> {
    each_ends(context, flag, FAILED, cases)
}

fn each_ends(context: &Context, flag: &str, code: i32, cases: &[(&str, &[&str])]) -> Result<Outcome> {
    for (value, words) in cases {
        let vm = builder(context)?.set(flag, value);
        ended(context, vm, code, words).with_context(|| format!("{flag} '{value}'"))?;
    }
    Ok(Outcome::Passed)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the test directory's name is not UTF-8")
}

/// The context with a VMM that starts in other surroundings: `script` is shell, and ends with the command that runs what follows it.
/// As the error, what this machine does not let us do.
fn surrounded(context: &Context, name: &str, script: &str) -> Result<Result<Context, String>> {
    let make = |file: &str, program: &str| -> Result<_> {
        let path = context.dir.join(file);
        fs::write(&path, format!("#!/bin/sh -e\n{script} {program}\n"))?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        Ok(path)
    };
    let probe = make("probe", "true")?;
    let tried = Command::new(&probe).output()?;
    fs::remove_file(probe)?;
    if !tried.status.success() {
        let said = String::from_utf8_lossy(&tried.stderr).into_owned();
        let why = said.trim().lines().next().unwrap_or("no reason given");
        return Ok(Err(format!("cannot make the surroundings ({}): {why}", tried.status)));
    }
    let triarch = make(name, &format!("'{}' \"$@\"", text(&context.triarch)?))?;
    Ok(Ok(Context {
        triarch,
        ..context.clone()
    }))
}

/// Surroundings in which root may not read what others own and may not make interfaces: what a user without rights finds, who may
/// however use /dev/kvm.
const WITHOUT_RIGHTS: &str = "exec setpriv --bounding-set=-dac_override,-dac_read_search,-net_admin";

/// The owner of what is nobody's business: not root, and no user of the machine.
const STRANGER: u32 = 65_533;

/// Gives a file to [`STRANGER`], who alone may use it; why that is impossible, if so.
fn give_away(path: &Path) -> Option<String> {
    let mode = fs::set_permissions(path, PermissionsExt::from_mode(0o600));
    let given = mode.and_then(|()| std::os::unix::fs::chown(path, Some(STRANGER), Some(STRANGER)));
    given.err().map(|e| format!("cannot give a file away: {e}"))
}
