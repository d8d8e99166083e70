//! `cargo xtask fuzz`: random input for what reads other people's bytes, led by the branches that it takes (libFuzzer).
//!
//! The stable compiler has the passes that count branches; what a nightly one would add is the address sanitizer, for which code without
//! `unsafe` has little use.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::{packages, tools};

/// Programs of tests/fuzz, and functions of the modules `fuzzing` of what they are about.
const TARGETS: [&str; 6] = ["http", "bodies", "flags", "vhost_user", "snapshot", "migration"];
/// What makes the compiler count branches, and remember what numbers are compared with.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

/// Feeds random input to the readers of requests, bodies, flags, snapshots and migrations, and to the back end of vhost-user.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this one
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long each is tried, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// Carries out the verb. Inputs that got further are kept in target/fuzz/corpus and tried first the next time; one that failed is kept in
/// target/fuzz/found.
///
/// # Errors
/// The programs do not compile, or an input was found that fails.
pub fn run(args: &Args) -> Result<()> {
    let programs = compile()?;
    for target in TARGETS {
        if args.target.as_deref().is_none_or(|only| only == target) {
            fuzz(&programs.join(target), target, args.seconds)?;
        }
    }
    Ok(())
}

fn directory() -> PathBuf {
    tools::top().join("target/fuzz")
}

fn compile() -> Result<PathBuf> {
    packages::require(&packages::FUZZ)?;
    let triple = Arch::native().target();
    let mut command = tools::cargo();
    command.current_dir(tools::top().join("tests/fuzz"));
    tools::without_flags(&mut command);
    command.args([
        "build",
        "--quiet",
        "--release",
        "--bins",
        "--features",
        "libfuzzer",
        "--target",
        triple,
    ]);
    command.env("CARGO_TARGET_DIR", directory()).env("RUSTFLAGS", FLAGS);
    tools::step("building the fuzz targets", || tools::run(&mut command))?;
    Ok(directory().join(triple).join("release"))
}

/// Inputs to start from: files where they are no text.
fn seeds(target: &str) -> Result<Vec<Vec<u8>>> {
    let files = tools::top().join("tests/fuzz/seeds").join(target);
    if !files.is_dir() {
        return Ok(triarch_api::fuzzing::seeds(target));
    }
    let files = fs::read_dir(files)?;
    files.map(|entry| Ok(fs::read(entry?.path())?)).collect()
}

fn fuzz(program: &std::path::Path, target: &str, seconds: u32) -> Result<()> {
    let (corpus, found) = (directory().join("corpus").join(target), directory().join("found"));
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&found)?;
    for (number, seed) in seeds(target)?.iter().enumerate() {
        fs::write(corpus.join(format!("seed-{number}")), seed)?;
    }
    let mut command = Command::new(program);
    command
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/{target}-", found.display()))
        .args([
            "-max_len=4096",
            "-timeout=10",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
            "-verbosity=0",
        ]);
    tools::run(&mut command).with_context(|| format!("the target {target} failed; the input is in {}", found.display()))
}
