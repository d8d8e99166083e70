//! `cargo xtask bench snapshot`: how soon a guest that was saved goes on, and how long one stands still that is saved.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::client::{Client, Guest, Vmm, config, quantile};
use super::{Ended, LIMIT, said, shown};
use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::{payload, table, tools};

const MIB: u64 = 1 << 20;
/// Where the payload has RAM for tests.
const TEST_RAM: u64 = 16 * MIB;
/// What guests fill at once.
const FILL: u64 = 64 * MIB;
/// What the guest writes that is saved again and again, round and round.
const SET: u64 = 512 * MIB;

/// What to measure, and how often.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Restores of each kind, and snapshots
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// MiB of memory of the guests that are restored, half of it in use
    #[arg(long, value_delimiter = ',', default_values_t = [128_u64, 1024, 4096])]
    sizes: Vec<u64>,
    /// MiB of memory that the guest writes in a second, which is saved again and again
    #[arg(long, value_delimiter = ',', default_values_t = [0_u64, 100, 500])]
    rates: Vec<u64>,
    /// How triarch is compiled
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
}

/// Carries out the benchmark.
///
/// # Errors
/// A VM does not start, or cannot be saved or restored.
pub fn run(args: &Args) -> Result<()> {
    let program = build::program(Arch::native(), args.profile, "triarch", "triarch")?;
    let kernel = payload::build(Arch::native())?;
    let setup = Setup {
        program,
        kernel,
        // On a disk: whoever saves a guest waits for that.
        kept: tempfile::Builder::new().prefix("snapshots").tempdir_in("target")?,
        runs: args.runs,
    };
    let load = || fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let before = load();
    let mut lines = vec![
        ["exec to the guest's first byte, ms", "goal", "least", "median", "most"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for size in &args.sizes {
        let what = format!("{size} MiB: {} restores of each kind", args.runs);
        lines.extend(tools::step(&what, || setup.restores(*size)).context("restoring")?);
    }
    println!("{}", table::format(&lines));
    let mut lines = vec![
        ["", "snapshot", "median, ms", "most, ms", "MiB of memory in it"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for rate in &args.rates {
        let what = format!("{rate} MiB/s: {} snapshots", args.runs);
        lines.extend(tools::step(&what, || setup.saves(*rate)).context("saving")?);
    }
    println!("{}", table::format(&lines));
    let first = |load: &str| load.split(' ').next().unwrap_or_default().to_owned();
    println!("load average before {}, after {}", first(&before), first(&load()));
    Ok(())
}

struct Setup {
    program: PathBuf,
    kernel: PathBuf,
    kept: tempfile::TempDir,
    runs: u32,
}

fn url(directory: &Path) -> Result<String> {
    Ok(format!(
        "file://{}",
        directory
            .canonicalize()
            .unwrap_or_else(|_| std::env::current_dir().unwrap_or_default().join(directory))
            .display()
    ))
}

impl Setup {
    /// A guest with `size` MiB that has filled the first `filled` bytes for tests.
    fn start(&self, size: u64, filled: u64) -> Result<(Vmm, Client, Guest)> {
        let with_size = |serial: &str| -> String {
            let text = config(&self.kernel, serial);
            let read: Result<Value, _> = serde_json::from_str(&text);
            read.map_or(text, |mut config| {
                config["memory"]["size"] = json!(size * MIB);
                config.to_string()
            })
        };
        let (vmm, client, mut guest) = Vmm::with_guest(&self.program, with_size)?;
        for at in (0..filled).step_by(FILL as usize) {
            let len = FILL.min(filled - at);
            guest.ask(&format!("mem fill {} {len} 7", TEST_RAM + at))?;
        }
        Ok((vmm, client, guest))
    }

    /// Lines about a guest with `size` MiB that was saved while it waited for a byte.
    fn restores(&self, size: u64) -> Result<Vec<Vec<String>>> {
        let directory = self.kept.path().join(format!("{size}"));
        let (vmm, mut client, mut guest) = self.start(size, (size / 2).saturating_sub(16) * MIB)?;
        guest.send("dirty 1 0 0")?;
        std::thread::sleep(Duration::from_millis(100));
        client.put("vm.pause", "")?;
        client.put(
            "vm.snapshot",
            &json!({ "destination_url": url(&directory)? }).to_string(),
        )?;
        drop((client, guest, vmm));
        let path = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["serial"] = json!({ "mode": "Tty" });
        fs::write(&path, config.to_string())?;
        let modes = ["mapped", "ondemand", "copy"];
        let mut times = modes.map(|_| Vec::new());
        // In turns, so that what else the machine does meets all alike. The first round warms caches.
        for round in 0..=self.runs {
            for (mode, times) in modes.iter().zip(&mut times) {
                let took = self
                    .restore(&directory, mode)
                    .with_context(|| format!("{size} MiB, {mode}"))?;
                if round > 0 {
                    times.push(took.as_secs_f64() * 1e3);
                }
            }
        }
        fs::remove_dir_all(&directory)?;
        let line = |(mode, times): (&str, Vec<f64>)| {
            let goal = if mode == "mapped" { "10" } else { "" };
            let figures = [0.0, 0.5, 1.0].map(|part| shown(quantile(&times, part)));
            let names = [format!("{size} MiB, {mode}"), goal.to_owned()];
            names.into_iter().chain(figures).collect()
        };
        Ok(modes.into_iter().zip(times).map(line).collect())
    }

    /// From exec to the first byte of a guest that goes on: what it answers to the byte that waits for it.
    fn restore(&self, directory: &Path, mode: &str) -> Result<Duration> {
        let errors = tempfile::tempfile()?;
        let mut command = Command::new(&self.program);
        let from = url(directory)?;
        command.arg("--restore");
        command.arg(format!("source_url={from},memory_restore_mode={mode},resume=on"));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors.try_clone()?);
        let begin = Instant::now();
        let mut child = Ended(command.spawn().context("it cannot be run")?);
        let mut input = child.0.stdin.take().context("it has no input")?;
        let mut output = child.0.stdout.take().context("it has no output")?;
        input.write_all(b"\n")?;
        let (sender, first) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut byte = [0];
            if output.read(&mut byte).is_ok_and(|n| n == 1) {
                let _ = sender.send(begin.elapsed());
            }
            output
        });
        let took = first.recv_timeout(LIMIT);
        drop(child);
        let _ = reader.join();
        drop(input);
        took.map_err(|_| anyhow::anyhow!("no byte from the guest:\n{}", said(errors)))
    }

    /// Lines about a guest with 1 GiB that writes `rate` MiB a second and is saved every half a second: as a whole, and what was written.
    fn saves(&self, rate: u64) -> Result<Vec<Vec<String>>> {
        let (_vmm, mut client, mut guest) = self.start(1024, SET)?;
        if rate > 0 {
            guest.send(&format!("dirty {} {} 0", SET / 4096, rate * MIB / 4096))?;
        }
        let place = |name: String| self.kept.path().join(name);
        let mut last: Option<PathBuf> = None;
        let (mut whole, mut increments) = (Vec::new(), Vec::new());
        for round in 0..=self.runs {
            let (full, next) = (place(format!("whole{round}")), place(format!("{round}")));
            std::thread::sleep(Duration::from_millis(500));
            let body = json!({ "destination_url": url(&full)? });
            whole.push(save(&mut client, &full, &body)?);
            fs::remove_dir_all(&full)?;
            std::thread::sleep(Duration::from_millis(500));
            let mut body = json!({ "destination_url": url(&next)?, "track_writes": true });
            if let Some(last) = &last {
                body["base"] = json!(url(last)?);
            }
            let saved = save(&mut client, &next, &body)?;
            if last.is_some() {
                increments.push(saved);
            }
            last = Some(next);
        }
        for round in 0..=self.runs {
            fs::remove_dir_all(place(format!("{round}")))?;
        }
        let line = |name: &str, saved: &[(f64, f64)]| {
            let times: Vec<f64> = saved.iter().map(|(time, _)| *time).collect();
            let sizes: Vec<f64> = saved.iter().map(|(_, size)| *size).collect();
            vec![
                format!("{rate} MiB/s written"),
                name.to_owned(),
                shown(quantile(&times, 0.5)),
                shown(quantile(&times, 1.0)),
                shown(quantile(&sizes, 0.5)),
            ]
        };
        ensure!(whole.len() > 1, "the first does not count");
        Ok(vec![line("whole", &whole[1..]), line("what was written", &increments)])
    }
}

/// Saves a guest that runs. For how long it stands still, in milliseconds, and how many MiB the files take.
fn save(client: &mut Client, directory: &Path, body: &Value) -> Result<(f64, f64)> {
    let begin = Instant::now();
    client.put("vm.pause", "")?;
    client.put("vm.snapshot", &body.to_string())?;
    client.put("vm.resume", "")?;
    let took = begin.elapsed();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(directory.join("memory-ranges"))?);
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let size = (blocks * 512) as f64 / MIB as f64;
    Ok((took.as_secs_f64() * 1e3, size))
}
