//! `cargo xtask bench vhost-user`: a guest's disk by way of a daemon and without one, and two guests on a switch,
//! under Triarch and under QEMU.
//!
//! All guests are started once and sleep except for the one that is measured. The turns go round: what else the machine does
//! meets all alike, and a ratio is that of two figures of one round.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;
use triarch_harness::process::Process;

mod cpu;
mod guest;
mod net;
mod report;
mod setup;

use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::root::Rig;
use crate::smaps::Usage;
use crate::{daemons, payload, tools};
use cpu::Cpu;
use guest::number;
use net::Traffic;
use setup::{Back, Front, Programs, Setup};

/// So much that its mapping is known from all others.
const GUEST_MIB: u64 = 512;
const IMAGE_MIB: usize = 256;
const IDLE: Duration = Duration::from_secs(1);

/// What and how long to measure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Rounds in which everything is measured once; one more comes first and does not count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..))]
    ms: u64,
    /// Only loads whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Read this image or block device instead of 256 MiB in memory
    #[arg(long)]
    image: Option<PathBuf>,
    /// Read around the host's page cache
    #[arg(long)]
    direct: bool,
    /// Take triarch and its daemons from this directory instead of building them
    #[arg(long, conflicts_with = "profile")]
    programs: Option<PathBuf>,
    /// How triarch is compiled
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
}

/// What a guest does with its disk.
#[derive(Debug, Clone, Copy)]
struct Work {
    /// KiB a read.
    kib: u32,
    /// One read after the other, else at random places.
    sequential: bool,
    /// Queues used.
    queues: u32,
    /// Reads in flight on each.
    depth: u32,
    /// The guest looks for completions all the time.
    poll: bool,
}

impl Work {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for (kib, sequential, poll) in [(4, false, false), (128, true, false), (4, false, true)] {
            for (queues, depth) in [(1, 1), (1, 32), (4, 1), (4, 32)] {
                all.push(Self {
                    kib,
                    sequential,
                    queues,
                    depth,
                    poll,
                });
            }
        }
        all
    }

    fn name(&self) -> String {
        let order = if self.sequential { "sequential" } else { "random" };
        let poll = if self.poll { ", polled" } else { "" };
        format!("{} KiB {order}, {}q x {}{poll}", self.kib, self.queues, self.depth)
    }

    fn command(&self, ms: u64) -> String {
        let order = if self.sequential { " seq" } else { "" };
        let poll = if self.poll { " poll" } else { "" };
        format!("blk 0 load {} {} {ms}{order}{poll}", self.depth, self.kib)
    }
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Reads a second.
    rate: f64,
    /// Microseconds that half of the reads took at most.
    p50: f64,
    /// Microseconds that 99 of 100 reads took at most.
    p99: f64,
    /// Microseconds of CPU a read: the VMM's threads beside its vCPU.
    vmm: f64,
    /// Microseconds of CPU a read: the vCPU's thread with the guest.
    vcpu: f64,
    /// Microseconds of CPU a read: the daemon.
    daemon: f64,
}

/// What a setup costs at rest.
#[derive(Debug, Clone, Copy)]
struct Rest {
    vmm: Usage,
    daemon: Option<Usage>,
    /// CPU time of a second without work.
    vmm_cpu: Duration,
    daemon_cpu: Duration,
}

/// All samples: by load, then setup, then round.
type Samples = Vec<Vec<Vec<Sample>>>;

/// Carries out the benchmark.
///
/// # Errors
/// A program does not start, or a guest reads something else than the others.
pub(super) fn run(args: &Args) -> Result<()> {
    let (image, _made) = image(args)?;
    let tools_dir = tempfile::tempdir()?;
    let programs = Programs {
        triarch: program(args, "triarch")?,
        blkd: program(args, "triarch-blkd")?,
        kernel: payload::build(Arch::native())?,
        rig: Rig::get(Arch::native())?,
        daemons: daemons::root()?,
        netd: program(args, "triarch-netd")?,
        testpmd: daemons::testpmd(tools_dir.path())?,
        image,
        direct: args.direct,
    };
    let wanted = |name: String| args.only.as_ref().is_none_or(|part| name.contains(part.as_str()));
    let works: Vec<Work> = Work::all().into_iter().filter(|w| wanted(w.name())).collect();
    let traffics: Vec<Traffic> = Traffic::ALL.into_iter().filter(|t| wanted(t.to_string())).collect();
    ensure!(!works.is_empty() || !traffics.is_empty(), "no load is called so");
    let before = load_average()?;
    if !works.is_empty() {
        disks(&programs, &works, args)?;
    }
    if !traffics.is_empty() {
        let (setups, samples) = net::run(&programs, &traffics, args)?;
        println!("{}", report::network(&setups, &traffics, &samples));
    }
    println!(
        "QEMU {}; load average before {before}, after {}",
        programs.rig.qemu_version()?,
        load_average()?
    );
    Ok(())
}

fn disks(programs: &Programs, works: &[Work], args: &Args) -> Result<()> {
    let mut setups = tools::step("starting guests and daemons", || {
        let pairs = Back::ALL
            .into_iter()
            .flat_map(|back| [(Front::Triarch, back), (Front::Qemu, back)]);
        let starts = pairs
            .map(|(front, back)| Setup::start(programs, front, back).with_context(|| format!("{front} with {back}")));
        starts.collect::<Result<Vec<_>>>()
    })?;
    same_data(&mut setups)?;
    let what = format!(
        "{} loads on {} setups, {} rounds",
        works.len(),
        setups.len(),
        args.rounds
    );
    let samples = tools::step(&what, || measure(&mut setups, works, args))?;
    let rests = tools::step("letting them rest", || {
        setups.iter().map(rest).collect::<Result<Vec<_>>>()
    })?;
    println!("{}", report::disks(&setups, works, &samples, &rests));
    Ok(())
}

/// A program of this project, from its package of the same name.
fn program(args: &Args, name: &str) -> Result<PathBuf> {
    match &args.programs {
        Some(directory) => {
            let file = fs::canonicalize(directory)?.join(name);
            ensure!(file.is_file(), "there is no {}", file.display());
            Ok(file)
        }
        None => build::program(Arch::native(), args.profile, name, name),
    }
}

/// The image to read, and what keeps it if it was made here.
fn image(args: &Args) -> Result<(PathBuf, Option<NamedTempFile>)> {
    if let Some(image) = &args.image {
        return Ok((fs::canonicalize(image)?, None));
    }
    let memory = Path::new("/dev/shm");
    let mut file = if memory.is_dir() {
        NamedTempFile::new_in(memory)?
    } else {
        NamedTempFile::new()?
    };
    let mut random = File::open("/dev/urandom")?;
    let mut piece = vec![0; 1 << 20];
    for _ in 0..IMAGE_MIB {
        std::io::Read::read_exact(&mut random, &mut piece)?;
        file.write_all(&piece)?;
    }
    Ok((file.path().to_path_buf(), Some(file)))
}

/// A disk that is quick because it gives something else is none.
fn same_data(setups: &mut [Setup]) -> Result<()> {
    let mut first = None;
    for setup in setups {
        let mut sums = Vec::new();
        for sector in [0, 8, 4096] {
            sums.push(setup.guest.ask(&format!("blk 0 read {sector} 1024"))?);
        }
        let expected = first.get_or_insert_with(|| sums.clone());
        ensure!(
            *expected == sums,
            "{} with {} reads other data",
            setup.front,
            setup.back
        );
    }
    Ok(())
}

fn measure(setups: &mut [Setup], works: &[Work], args: &Args) -> Result<Samples> {
    let mut samples: Samples = works
        .iter()
        .map(|_| setups.iter().map(|_| Vec::new()).collect())
        .collect();
    for round in 0..=args.rounds {
        for (work, samples) in works.iter().zip(&mut samples) {
            for turn in 0..setups.len() {
                // Another one begins each time: none always follows the same.
                let at = (turn + round as usize) % setups.len();
                let setup = &mut setups[at];
                let (front, back) = (setup.front, setup.back);
                let sample = sample(setup, work, args.ms);
                let sample = sample.with_context(|| format!("{}: {front} with {back}", work.name()))?;
                // The first round warms caches.
                if round > 0 {
                    samples[at].push(sample);
                }
            }
        }
    }
    Ok(samples)
}

fn sample(setup: &mut Setup, work: &Work, ms: u64) -> Result<Sample> {
    setup.guest.ask(&format!("blk 0 init queues={}", work.queues))?;
    let cpu = |daemon: &Option<Process>| daemon.as_ref().map_or(Ok(Cpu::default()), |d| Cpu::of(d.pid()));
    let (vmm, daemon) = (Cpu::of(setup.vmm.pid())?, cpu(&setup.daemon)?);
    let start = Instant::now();
    let answer = setup.guest.ask(&work.command(ms))?;
    let passed = start.elapsed().as_secs_f64();
    let (vmm, daemon) = (Cpu::of(setup.vmm.pid())? - vmm, cpu(&setup.daemon)? - daemon);
    let (requests, seconds) = (number(&answer, "requests")?, number(&answer, "us")? / 1e6);
    ensure!(requests > 0.0, "nothing was read");
    // The guest's clock is its own.
    ensure!(
        seconds < passed * 1.02,
        "the guest's clock is fast: {seconds} s of {passed}"
    );
    let each = |time: Duration| time.as_secs_f64() * 1e6 / requests;
    Ok(Sample {
        rate: requests / seconds,
        p50: number(&answer, "ns_p50")? / 1000.0,
        p99: number(&answer, "ns_p99")? / 1000.0,
        vmm: each(vmm.others),
        vcpu: each(vmm.vcpus),
        daemon: each(daemon.all()),
    })
}

/// Memory, and CPU time of a second in which the guest wants nothing.
fn rest(setup: &Setup) -> Result<Rest> {
    let daemon = setup.daemon.as_ref().map(Process::pid);
    let total = |pid: u32| Cpu::of(pid).map(Cpu::all);
    let of_daemon = || daemon.map_or(Ok(Duration::ZERO), total);
    let (vmm, served) = (total(setup.vmm.pid())?, of_daemon()?);
    std::thread::sleep(IDLE);
    Ok(Rest {
        vmm_cpu: total(setup.vmm.pid())?.saturating_sub(vmm),
        daemon_cpu: of_daemon()?.saturating_sub(served),
        vmm: super::memory(setup.vmm.pid())?,
        daemon: daemon.map(super::memory).transpose()?,
    })
}

fn load_average() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_have_names_and_commands() {
        let works = Work::all();
        assert_eq!(works.len(), 12);
        assert_eq!(works[1].name(), "4 KiB random, 1q x 32");
        assert_eq!(works[1].command(500), "blk 0 load 32 4 500");
        assert_eq!(works[7].command(9), "blk 0 load 32 128 9 seq");
        assert_eq!(works[8].name(), "4 KiB random, 1q x 1, polled");
        assert_eq!(works[8].command(9), "blk 0 load 1 4 9 poll");
    }
}
