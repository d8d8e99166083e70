//! `cargo xtask bench vfio`: a disk of the host's, read by the host itself and by a guest that has it.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use triarch_harness::suite;

use crate::host::Kind;
use crate::tools;

/// The test that measures.
const TEST: &str = "vfio::a_disk_that_works_never_leaves_the_guest";

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The emulated hosts; only those have a device to spare
    #[arg(long, value_enum, default_value = "amd")]
    host: Vec<Kind>,
    /// How long each measurement takes
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
}

/// Measures on one host after the other.
///
/// # Errors
/// The test fails there, or measures nothing.
pub fn run(args: &Args) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let figures = dir.path().join("figures");
    for kind in &args.host {
        let name = kind.to_possible_value().context("a host without a name")?;
        // The test brings its host, programs and images.
        let mut command = Command::new(env::current_exe()?);
        command
            .args(["test", "--level", "nested", "--host", name.get_name(), TEST])
            .env(suite::FIGURES, &figures)
            .env(suite::SECONDS, args.seconds.to_string());
        let what = format!("reading a disk of the {} host", name.get_name());
        tools::step(&what, || {
            let output = command.output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(output.status.success(), "{}", tools::tail(&said, 20));
            Ok(())
        })?;
    }
    let measured = fs::read_to_string(&figures).context("nothing was measured: no host has a device to spare")?;
    print!("{measured}");
    Ok(())
}
