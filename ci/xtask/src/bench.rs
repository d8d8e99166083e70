//! `cargo xtask bench`: how Triarch compares, measured side by side on this machine.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

mod api;
mod client;
mod hotplug;
mod migration;
mod snapshot;
mod vfio;
mod vhost_user;

use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::root::Rig;
use crate::smaps::{self, Usage};
use crate::{local, payload, table, tools};

/// The payload writes this first when its command line is `bench`.
const FIRST: u8 = b'T';
const GUEST_MIB: u64 = 512;
/// Mappings of this many KiB and more are guest RAM.
const GUEST_KIB: u64 = 400 * 1024;
/// A start that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub enum Args {
    /// From exec to the guest's first byte, with CPU time and memory of the VMM
    Start {
        /// Starts of triarch
        #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
        runs: u32,
        /// Starts of each peer: some take seconds
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        peer_runs: u32,
        /// How triarch is compiled
        #[arg(long, value_enum, default_value = "release")]
        profile: Profile,
    },
    /// How soon and how fast the API answers, and what the guest notices of it
    Api {
        /// Starts of triarch
        #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
        starts: u32,
        /// Turns in which the guest works for a second without requests and for one beside them
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        turns: u32,
        /// Requests of each kind
        #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
        requests: u32,
        /// How triarch is compiled
        #[arg(long, value_enum, default_value = "release")]
        profile: Profile,
    },
    /// How soon what comes and goes in a running guest is there and gone
    Hotplug(hotplug::Args),
    /// How fast a guest moves, and for how long it stands still
    Migration(migration::Args),
    /// How soon a guest that was saved goes on, and how long one stands still that is saved
    Snapshot(snapshot::Args),
    /// A guest's disk served by a daemon and by the VMM, under triarch and under QEMU
    VhostUser(vhost_user::Args),
    /// A disk of an emulated host, read by a guest that has it and by the host itself
    Vfio(vfio::Args),
}

/// Carries out the verb.
///
/// # Errors
/// This machine has no usable /dev/kvm, or a VMM did not start.
pub fn run(args: &Args) -> Result<()> {
    // That of emulated hosts is their own.
    if !matches!(args, Args::Vfio(_)) {
        local::usable_kvm().context("the benchmark needs /dev/kvm")?;
    }
    match args {
        &Args::Start {
            runs,
            peer_runs,
            profile,
        } => starts(runs, peer_runs, profile),
        &Args::Api {
            starts,
            turns,
            requests,
            profile,
        } => api::run(starts, turns, requests, profile),
        Args::Hotplug(args) => hotplug::run(args),
        Args::Migration(args) => migration::run(args),
        Args::Snapshot(args) => snapshot::run(args),
        Args::VhostUser(args) => vhost_user::run(args),
        Args::Vfio(args) => vfio::run(args),
    }
}

fn starts(runs: u32, peer_runs: u32, profile: Profile) -> Result<()> {
    let vmms = vmms(profile)?;
    let mut samples: Vec<Vec<Sample>> = vmms.iter().map(|_| Vec::new()).collect();
    let what = format!("starting triarch {runs} times, its peers {peer_runs} times");
    tools::step(&what, || {
        // In turns, so that what else the machine does meets all alike. The first round warms caches.
        for round in 0..=runs.max(peer_runs) {
            for (n, (vmm, samples)) in vmms.iter().zip(&mut samples).enumerate() {
                let wanted = if n == 0 { runs } else { peer_runs };
                if round > wanted {
                    continue;
                }
                let sample = start(vmm).with_context(|| format!("starting {}", vmm.name))?;
                if round > 0 {
                    samples.push(sample);
                }
            }
        }
        Ok(())
    })?;
    println!("{}", report(&vmms, &samples));
    Ok(())
}

/// A program that starts the payload in 512 MiB with its serial port on standard output.
struct Vmm {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    /// The file whose size counts.
    binary: PathBuf,
}

/// Triarch first, then the peers there are.
fn vmms(profile: Profile) -> Result<Vec<Vmm>> {
    let kernel = payload::build(Arch::native())?.display().to_string();
    let triarch = build::program(Arch::native(), profile, "triarch", "triarch")?;
    let memory = format!("size={GUEST_MIB}M");
    let dialect = |program: PathBuf, name: &str| Vmm {
        name: name.to_owned(),
        args: words(
            [
                "--kernel",
                &kernel,
                "--cmdline",
                "bench",
                "--cpus",
                "boot=1",
                "--memory",
                &memory,
            ],
            ["--serial", "tty", "--console", "off"],
        ),
        binary: program.clone(),
        program,
    };
    let mut vmms = vec![dialect(triarch, "triarch")];
    if let Some(found) = tools::find("cloud-hypervisor") {
        vmms.push(dialect(found, "Cloud Hypervisor"));
    }
    let rig = Rig::get(Arch::native())?;
    let qemu = rig.qemu();
    let own = words(
        [
            "-accel", "kvm", "-machine", "microvm", "-cpu", "host", "-m", "512M", "-kernel", &kernel,
        ],
        [
            "-append",
            "bench",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-serial",
            "stdio",
        ],
    );
    let before = qemu.get_args().map(|a| a.to_string_lossy().into_owned());
    vmms.push(Vmm {
        name: format!("QEMU {} microvm", rig.qemu_version()?),
        program: PathBuf::from(qemu.get_program()),
        args: before.chain(own).collect(),
        binary: rig.qemu_binary().to_path_buf(),
    });
    Ok(vmms)
}

fn words<const A: usize, const B: usize>(first: [&str; A], then: [&str; B]) -> Vec<String> {
    first.into_iter().chain(then).map(str::to_owned).collect()
}

/// What one start cost.
#[derive(Debug, Clone, Copy)]
struct Sample {
    wall: Duration,
    cpu: Duration,
    memory: Usage,
}

/// A process that ends with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(vmm: &Vmm) -> Result<Sample> {
    let errors = tempfile::tempfile()?;
    let mut command = Command::new(&vmm.program);
    command.args(&vmm.args).stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(errors.try_clone()?);
    let begin = Instant::now();
    let mut child = Ended(command.spawn().context("it cannot be run")?);
    let mut output = child.0.stdout.take().context("it has no output")?;
    let (sender, first) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut byte = [0];
        while output.read(&mut byte).is_ok_and(|n| n == 1) {
            if byte[0] == FIRST {
                let _ = sender.send(begin.elapsed());
                break;
            }
        }
        // Kept open: a VMM must not meet a closed console while it is measured.
        output
    });
    let wall = first.recv_timeout(LIMIT);
    let measured = cpu_time(child.0.id()).and_then(|cpu| Ok((cpu, memory(child.0.id())?)));
    drop(child);
    let _ = reader.join();
    match wall {
        Ok(wall) => {
            let (cpu, memory) = measured?;
            Ok(Sample { wall, cpu, memory })
        }
        Err(RecvTimeoutError::Timeout) => bail!("no byte from the guest in {} s", LIMIT.as_secs()),
        Err(RecvTimeoutError::Disconnected) => bail!("it ended early:\n{}", said(errors)),
    }
}

fn said(mut errors: fs::File) -> String {
    use std::io::{Seek, SeekFrom};
    let mut text = Vec::new();
    let _ = errors
        .seek(SeekFrom::Start(0))
        .and_then(|_| errors.read_to_end(&mut text));
    tools::tail(&String::from_utf8_lossy(&text), 8)
}

/// CPU time of all threads so far: the first field of schedstat is nanoseconds (Linux,
/// Documentation/scheduler/sched-stats.rst).
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        total += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}

fn memory(pid: u32) -> Result<Usage> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    smaps::usage(&smaps, GUEST_KIB)
}

fn report(vmms: &[Vmm], samples: &[Vec<Sample>]) -> String {
    type Figure = fn(&[Sample], &Vmm) -> Option<f64>;
    let rows: [(&str, &str, Figure); 8] = [
        ("exec to first byte, ms, min", "4", |s, _| least(s, |s| ms(s.wall))),
        ("exec to first byte, ms, median", "", |s, _| middle(s, |s| ms(s.wall))),
        ("CPU time, ms, min", "4", |s, _| least(s, |s| ms(s.cpu))),
        ("CPU time, ms, median", "", |s, _| middle(s, |s| ms(s.cpu))),
        ("Private_Dirty, KiB, median", "400", |s, _| {
            middle(s, |s| kib(s.memory.private_dirty))
        }),
        ("Pss, KiB, median", "", |s, _| middle(s, |s| kib(s.memory.pss))),
        ("RSS, KiB, median", "4608", |s, _| middle(s, |s| kib(s.memory.rss))),
        ("program, KiB", "4096", |_, vmm| {
            Some(kib(fs::metadata(&vmm.binary).ok()?.len() / 1024))
        }),
    ];
    let mut heading = vec![format!("{GUEST_MIB} MiB guest"), "goal".to_owned()];
    for vmm in vmms {
        heading.push(vmm.name.clone());
        if heading.len() > 3 {
            heading.push("ratio".to_owned());
        }
    }
    let mut lines = vec![heading];
    for (name, goal, figure) in rows {
        let mut line = vec![name.to_owned(), goal.to_owned()];
        let mut ours = None;
        for (vmm, samples) in vmms.iter().zip(samples) {
            let value = figure(samples, vmm);
            line.push(value.map_or_else(|| "?".to_owned(), shown));
            match ours {
                None => ours = Some(value),
                Some(ours) => line.push(ratio(value, ours)),
            }
        }
        lines.push(line);
    }
    table::format(&lines)
}

/// How many times ours the other is.
fn ratio(other: Option<f64>, ours: Option<f64>) -> String {
    match (other, ours) {
        (Some(other), Some(ours)) if ours > 0.0 => format!("{:.1}x", other / ours),
        _ => "?".to_owned(),
    }
}

fn shown(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Sizes here are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn kib(kib: u64) -> f64 {
    kib as f64
}

fn sorted(samples: &[Sample], value: fn(&Sample) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values
}

fn least(samples: &[Sample], value: fn(&Sample) -> f64) -> Option<f64> {
    sorted(samples, value).first().copied()
}

fn middle(samples: &[Sample], value: fn(&Sample) -> f64) -> Option<f64> {
    let values = sorted(samples, value);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Vmm {
        Vmm {
            name: "a script".to_owned(),
            program: PathBuf::from("/bin/sh"),
            args: vec!["-c".to_owned(), script.to_owned()],
            binary: PathBuf::from("/bin/sh"),
        }
    }

    #[test]
    fn a_start_is_timed_to_the_first_byte_and_the_vmm_ends() {
        let sample = start(&shell("sleep 0.05; printf xT; exec sleep 100")).unwrap();
        assert!(sample.wall >= Duration::from_millis(50), "{sample:?}");
        assert!(sample.wall < LIMIT, "{sample:?}");
        assert!(sample.memory.rss > 0 && sample.cpu > Duration::ZERO, "{sample:?}");
    }

    #[test]
    fn a_vmm_that_fails_is_quoted() {
        let error = start(&shell("echo the kernel is missing >&2; exit 1")).unwrap_err();
        assert!(format!("{error:#}").contains("the kernel is missing"), "{error:#}");
    }

    #[test]
    fn figures_are_least_and_middle() {
        let sample = |n| Sample {
            wall: Duration::from_millis(n),
            cpu: Duration::ZERO,
            memory: Usage::default(),
        };
        let samples = [9, 3, 5, 4, 8].map(sample);
        assert_eq!(least(&samples, |s| ms(s.wall)), Some(3.0));
        assert_eq!(middle(&samples, |s| ms(s.wall)), Some(5.0));
        assert_eq!(least(&[], |s| ms(s.wall)), None);
        assert_eq!(ratio(Some(30.0), Some(4.0)), "7.5x");
        assert_eq!(ratio(Some(30.0), None), "?");
    }
}
