//! `cargo xtask golden`: a snapshot that later versions have to restore.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use triarch_harness::agent::{Exec, Stream};
use triarch_harness::suite;

use crate::host::{Host, Kind, Options, with_host};
use crate::test::{PATIENCE, Programs, SUITES};
use crate::tools;

/// The test that makes one, and sees to it that a guest goes on from it.
const TEST: &str = "golden::a_new_one_is_made_and_restored";
const LIMIT: Duration = Duration::from_secs(600);
const FILES: [&str; 3] = ["config.json", "state.json", "memory-pages.gz"];
/// How `state.json` tells the version of its format.
const VERSION: &str = "\"version\":";

/// Saves the bare-metal guest on an emulated host into tests/golden, where a test has later versions restore it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The emulated host
    #[arg(long, value_enum, default_value = "amd")]
    host: Kind,
    /// Put it in the place of one that is there: only before a version of the format is released
    #[arg(long)]
    replace: bool,
}

/// Carries out the verb.
///
/// # Errors
/// It cannot be made, or there is one.
pub fn run(args: &Args) -> Result<()> {
    ensure!(
        matches!(args.host, Kind::Amd | Kind::Arm),
        "a snapshot that is kept is of an emulated AMD or ARM host"
    );
    let arch = args.host.arch();
    let options = Options {
        files: Programs::build()?.without_linux(arch)?,
        ..Options::default()
    };
    let made = with_host(args.host, &options, make)?;
    let [_, (_, state), _] = &made;
    let state = String::from_utf8_lossy(state);
    let version = state.split_once(VERSION).context("state.json has no version")?.1;
    let version: String = version.chars().take_while(char::is_ascii_digit).collect();
    let directory = PathBuf::from("tests/golden").join(version).join(arch.to_string());
    if directory.exists() && !args.replace {
        bail!(
            "{} is there; --replace if no release has this format",
            directory.display()
        );
    }
    fs::create_dir_all(&directory)?;
    for (name, content) in &made {
        fs::write(directory.join(name), content)?;
    }
    let bytes: usize = made.iter().map(|(_, content)| content.len()).sum();
    println!("{}: {bytes} bytes", directory.display());
    Ok(())
}

fn make(host: &Host) -> Result<[(&'static str, Vec<u8>); 3]> {
    let to = host.path("golden");
    let argv = [&host.path(SUITES), "--exact", "--level", "nested", TEST].map(str::to_owned);
    let exec = Exec::new(argv)
        .cwd(&host.path(""))
        .timeout(LIMIT)
        .env(suite::PATIENCE, PATIENCE)
        .env(suite::GOLDEN, &to);
    let mut said = Vec::new();
    let exit = host.exec(&exec, |_: Stream, data| said.extend_from_slice(data))?;
    let said = tools::tail(&String::from_utf8_lossy(&said), 30);
    ensure!(exit.code == Some(0), "no snapshot was made: {said}");
    let read = |name: &'static str| -> Result<_> { Ok((name, host.get(&format!("{to}/{name}"))?)) };
    let [config, state, pages] = FILES;
    Ok([read(config)?, read(state)?, read(pages)?])
}
