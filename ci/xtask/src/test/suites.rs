//! The tests that run a whole VMM: on this machine, and on hosts.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use triarch_harness::agent::{Exec, Stream};
use triarch_harness::suite::{self, Report};

use super::place::Place;
use super::tally::{Tally, Verdict};
use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::daemons;
use crate::host::{self, Host, Kind, Options};
use crate::images;
use crate::kernels::{Kernel, Version};
use crate::root::Rig;
use crate::{packages, payload, schemathesis, tools};

/// The program with the tests.
pub const SUITES: &str = "triarch-suites";
const VMM: &str = "triarch";
/// The daemons, which tests find beside the VMM.
const BLKD: &str = "triarch-blkd";
const NETD: &str = "triarch-netd";
const CLIENT: &str = "triarch-client";
/// The client's program, which tests find beside the VMM.
const TRICTL: &str = "trictl";
const PAYLOAD: &str = "triarch-payload";
/// Tests of the payload level that look at the programs as they are shipped: what the compiler makes of all crates at once may lack what the
/// others have. All kinds of threads run in them, and all programs.
const SHIPPED: [&str; 9] = [
    "boot::says_hello",
    "smp::starts_sixteen",
    "hotplug::processors_come_and_go",
    "virtio_mem::grows_and_shrinks",
    "blk::runs_several_queues",
    "snapshot::on_demand::it_comes_when_it_is_touched",
    "migration::goes_on_by_every_connection",
    "migration::limits::a_guest_that_writes_too_fast_is_slowed_down",
    "vhost::blkd::blk_reads_and_writes",
];
/// All tests on one host; each has a limit of its own.
const LIMIT: Duration = Duration::from_secs(3600);
/// The same when somebody asked for more rounds than a run has.
const SOAK_LIMIT: Duration = Duration::from_secs(4 * 3600);
/// How much longer than on this machine tests with the payload guest may take on an emulated host.
pub const PATIENCE: &str = "12";
/// The framework's own tests, which say nothing about a host.
const FRAMEWORK: &str = "framework::";
/// What the names of tests with the payload guest begin with on the nested level.
const PAYLOAD_TESTS: &str = "payload::";
/// A host with more tests with Linux guests than these is two, one after the other or side by side, so that no processor is left without work
/// while another one has a whole host's to do.
const MANY: usize = 60;
/// Enough for a guest with memory on both sides of the 32-bit hole; what nobody touches costs nothing.
const HOST_MIB: u32 = 4096;

/// The programs, built once; those of other architectures when a host needs them.
pub struct Programs {
    dir: PathBuf,
    payload: PathBuf,
}

impl Programs {
    /// Builds them.
    ///
    /// # Errors
    /// They do not compile.
    pub fn build() -> Result<Self> {
        let dir = programs(Arch::native())?;
        let payload = payload::build(Arch::native())?;
        Ok(Self { dir, payload })
    }

    /// Our storage daemon.
    pub fn blkd(&self) -> PathBuf {
        self.dir.join(BLKD)
    }

    /// Runs the payload level on this machine.
    ///
    /// # Errors
    /// The program with the tests does not run.
    pub fn payload(&self, filters: &[String], tally: &mut Tally) -> Result<()> {
        let pending = Pending::new("payload", "payload", self.list("payload", filters)?);
        self.here(pending, &self.dir, tally)
    }

    /// Builds the programs as they are shipped, and runs some tests of the payload level with them.
    ///
    /// # Errors
    /// They do not compile, there is no such test, or the program with the tests does not run.
    pub fn shipped(&self, filters: &[String], tally: &mut Tally) -> Result<()> {
        let all = self.list("payload", &[])?;
        let mut names = SHIPPED.map(str::to_owned).to_vec();
        for name in &names {
            ensure!(all.contains(name), "there is no test {name}");
        }
        names.retain(|name| super::selected(filters, &format!("shipped::{name}")));
        if names.is_empty() {
            return Ok(());
        }
        let dir = build::programs(Arch::native(), Profile::Release, &[VMM, BLKD, NETD])?;
        self.here(Pending::new("shipped", "payload", names), &dir, tally)
    }

    /// Runs tests with the payload guest on this machine, and the programs in `dir`.
    fn here(&self, mut pending: Pending, dir: &Path, tally: &mut Tally) -> Result<()> {
        let images = tempfile::tempdir()?;
        fs::copy(&self.payload, images.path().join(PAYLOAD)).context("cannot copy the payload guest")?;
        if pending.names.is_empty() {
            return Ok(());
        }
        for daemon in daemons::of_tests(&pending.names.iter().collect::<Vec<_>>()) {
            if let Err(error) = daemon.provide(images.path()) {
                // Tests that want it are skipped.
                tally.show(&format!("there is no {}: {error:#}\n", daemon.name));
            }
        }
        packages::require(&packages::PAYLOAD_TESTS)?;
        let mut command = Command::new(self.dir.join(SUITES));
        if pending.names.iter().any(|name| name.contains("schemathesis")) {
            // Without it the test says why it is skipped.
            let found = schemathesis::get().map_err(|error| format!("schemathesis cannot be installed: {error:#}"));
            command.env("TRIARCH_SCHEMATHESIS", found.unwrap_or_else(PathBuf::from));
        }
        let mut child = command
            .args(pending.arguments())
            .env("TRIARCH_BIN", dir.join(VMM))
            .env("TRIARCH_IMAGES", images.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {SUITES}"))?;
        if let Some(output) = child.stdout.take() {
            for line in BufReader::new(output).lines() {
                pending.line(&line?, tally);
            }
        }
        pending.finish(&child.wait()?.to_string(), tally);
        Ok(())
    }

    /// Makes what the tests at `place` need; nothing when none is wanted there, and twice that when it is much.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn prepare(&self, place: Place, filters: &[String], tally: &mut Tally) -> Result<Vec<Nested>> {
        let mut names = self.list("nested", &[])?;
        if place.has_payload() {
            let payload = self.list("payload", &[])?.into_iter();
            let here = payload.filter(|name| !name.starts_with(FRAMEWORK));
            names.extend(here.map(|name| format!("{PAYLOAD_TESTS}{name}")));
        }
        let mut names = place.select(names)?;
        names.retain(|name| super::selected(filters, &format!("nested::{name}")));
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let (payload, linux): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.starts_with(PAYLOAD_TESTS));
        let payload = payload.iter().map(|name| name.replacen(PAYLOAD_TESTS, "", 1)).collect();
        let halves = match place.kind {
            // It is there once.
            Kind::Native => vec![(payload, linux)],
            Kind::Amd | Kind::Hygon | Kind::Arm => halves(payload, linux),
        };
        let mut files = self.files(place.kind.arch())?;
        let tests: Vec<&String> = halves
            .iter()
            .flat_map(|(payload, linux)| payload.iter().chain(linux))
            .collect();
        for daemon in daemons::of_tests(&tests) {
            match daemon.files(place.kind.arch()) {
                Ok(more) => files.extend(more),
                // Tests that want it are skipped.
                Err(error) => tally.show(&format!("there is no {}: {error:#}\n", daemon.name)),
            }
        }
        let options = Options {
            memory_mib: HOST_MIB,
            files,
            ..place.options()
        };
        let nested = halves.into_iter().map(|(payload, linux)| Nested {
            pending: [
                Pending::new(&format!("{place}::payload"), "payload", payload),
                Pending::new(&place.to_string(), "nested", linux),
            ],
            place: place.clone(),
            options: options.clone(),
        });
        Ok(nested.collect())
    }

    /// The tests of a level, without running them. They are the same for every architecture.
    ///
    /// # Errors
    /// The program with the tests does not run.
    pub fn list(&self, level: &str, filters: &[String]) -> Result<Vec<String>> {
        let mut command = Command::new(self.dir.join(SUITES));
        let listed = tools::output(command.args(["--list", "--level", level]))?;
        let names = listed.lines().filter_map(|line| line.split_whitespace().nth(1));
        let wanted = |name: &&str| super::selected(filters, &format!("{level}::{name}"));
        Ok(names.filter(wanted).map(str::to_owned).collect())
    }

    /// What tests without Linux guests need on a host: name, permission bits, source.
    ///
    /// # Errors
    /// A program does not compile.
    pub fn without_linux(&self, arch: Arch) -> Result<Vec<(String, u32, PathBuf)>> {
        let dir = if arch == Arch::native() {
            self.dir.clone()
        } else {
            programs(arch)?
        };
        let program = |name: &str| (name.to_owned(), 0o755, dir.join(name));
        let mut files = vec![
            program(VMM),
            program(BLKD),
            program(NETD),
            program(TRICTL),
            program(SUITES),
        ];
        let payload = if arch == Arch::native() {
            self.payload.clone()
        } else {
            payload::build(arch)?
        };
        files.push((PAYLOAD.to_owned(), 0o644, payload));
        Ok(files)
    }

    /// What all tests need on a host.
    ///
    /// # Errors
    /// A program does not compile, or an image cannot be made.
    pub fn files(&self, arch: Arch) -> Result<Vec<(String, u32, PathBuf)>> {
        let rig = Rig::get(arch)?;
        let mut files = self.without_linux(arch)?;
        for version in [Version::V6_1, Version::V6_12] {
            let kernel = Kernel::get(version, arch, &rig.root)?;
            let mut add = |name: String, source: &Path| files.push((name, 0o644, source.to_path_buf()));
            add(format!("vmlinuz-{version}"), &kernel.vmlinuz);
            add(format!("vmlinux-{version}"), &kernel.vmlinux);
            add(format!("initramfs-{version}.cpio"), &images::guest(&kernel, &rig)?);
        }
        Ok(files)
    }
}

/// Tests with the payload guest and with Linux guests, as they are done on one host.
fn halves(payload: Vec<String>, mut linux: Vec<String>) -> Vec<(Vec<String>, Vec<String>)> {
    if linux.len() <= MANY {
        return vec![(payload, linux)];
    }
    let at = if payload.is_empty() { linux.len() / 2 } else { 0 };
    let rest = linux.split_off(at);
    vec![(payload, linux), (Vec::new(), rest)]
}

/// The tests on a host, and all that they need.
pub struct Nested {
    place: Place,
    options: Options,
    pending: [Pending; 2],
}

impl Nested {
    /// Runs them. When the host itself fails, it is started once more, for the tests that have no result yet.
    ///
    /// # Errors
    /// The host cannot be made, or failed twice.
    fn run(&mut self, tally: &mut Tally) -> Result<()> {
        let Self {
            place,
            options,
            pending,
        } = self;
        host::with_host(place.kind, options, |host| {
            pending.iter_mut().try_for_each(|level| run_on(host, level, &[], tally))
        })
    }

    /// Runs those of all hosts, as many at once as there are processors: an emulated host with one CPU keeps one busy.
    pub fn run_all(all: Vec<Self>, tally: &mut Tally) {
        let at_once = thread::available_parallelism().map_or(1, NonZero::get).min(all.len());
        let queue = Mutex::new(all.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            let mut tally = Tally::new(io::stdout());
            while let Some(mut nested) = next() {
                tally.guard(&nested.place.to_string(), |tally| nested.run(tally));
            }
            tally
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                match worker.join() {
                    Ok(counted) => tally.merge(counted),
                    Err(panic) => resume_unwind(panic),
                }
            }
        });
    }
}

fn programs(arch: Arch) -> Result<PathBuf> {
    build::programs(arch, Profile::Dev, &[VMM, BLKD, NETD, CLIENT, SUITES])
}

/// Runs what is pending on a host, with these variables in its environment.
pub fn run_on(host: &Host, pending: &mut Pending, environment: &[(&str, &str)], tally: &mut Tally) -> Result<()> {
    if pending.names.is_empty() {
        return Ok(());
    }
    let argv = [host.path(SUITES)].into_iter().chain(pending.arguments());
    let figures = host.path("figures.txt");
    let soak: Vec<_> = [suite::KILLS, suite::ROUNDS, suite::MOVES, suite::SECONDS]
        .into_iter()
        .filter_map(|variable| Some((variable, env::var(variable).ok()?)))
        .collect();
    let mut exec = Exec::new(argv)
        .cwd(&host.path(""))
        .timeout(if soak.is_empty() { LIMIT } else { SOAK_LIMIT })
        .env(suite::PATIENCE, PATIENCE);
    for (name, value) in environment {
        exec = exec.env(name, value);
    }
    for (variable, value) in &soak {
        exec = exec.env(variable, value);
    }
    let wanted = env::var_os(suite::FIGURES);
    if wanted.is_some() {
        exec = exec.env(suite::FIGURES, &figures);
    }
    let mut lines = Lines::default();
    let mut errors = Vec::new();
    let exit = host.exec(&exec, |stream, data| match stream {
        Stream::Stdout => lines.take(data, |line| pending.line(line, tally)),
        Stream::Stderr => {
            let _ = data.take(1 << 20).read_to_end(&mut errors);
        }
    })?;
    let said = tools::tail(&String::from_utf8_lossy(&errors), 30);
    pending.finish(&format!("exit code {:?}\n{said}", exit.code), tally);
    if let Some(file) = wanted {
        let lines = host.shell(&format!("touch {figures}; cat {figures}; rm {figures}"))?;
        let mut file = File::options().create(true).append(true).open(file)?;
        for line in lines.lines() {
            writeln!(file, "{}: {line}", pending.place)?;
        }
    }
    Ok(())
}

/// Puts lines together that come in pieces.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn take(&mut self, data: &[u8], mut each: impl FnMut(&str)) {
        self.rest.extend_from_slice(data);
        while let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            each(String::from_utf8_lossy(&line).trim_end());
        }
    }
}

/// Tests that have no result yet.
#[derive(Debug)]
pub struct Pending {
    place: String,
    level: &'static str,
    names: Vec<String>,
}

impl Pending {
    /// Those of a level at a place.
    pub fn new(place: &str, level: &'static str, names: Vec<String>) -> Self {
        Self {
            place: place.to_owned(),
            level,
            names,
        }
    }

    fn arguments(&self) -> Vec<String> {
        let options = ["--json", "--exact", "--level", self.level].map(str::to_owned);
        [options.to_vec(), self.names.clone()].concat()
    }

    /// Takes a line of output; one that is no result is passed on.
    fn line(&mut self, line: &str, tally: &mut Tally) {
        let report = serde_json::from_str::<Report>(line).ok();
        let Some(report) = report.filter(|r| self.names.contains(&r.name)) else {
            return tally.show(&format!("{line}\n"));
        };
        self.names.retain(|name| *name != report.name);
        let verdict = match report.verdict {
            suite::Verdict::Passed => Verdict::Passed,
            suite::Verdict::Skipped { why } => Verdict::Skipped(why),
            suite::Verdict::Failed { why } => Verdict::Failed(why),
        };
        let name = format!("{}::{}", self.place, report.name);
        tally.add(&name, verdict, Some(Duration::from_millis(report.millis)));
    }

    /// What has no result when the program has ended has failed.
    fn finish(&mut self, how: &str, tally: &mut Tally) {
        for name in self.names.drain(..) {
            let why = format!("no result; the program with the tests ended: {how}");
            tally.add(&format!("{}::{name}", self.place), Verdict::Failed(why), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_tests_are_done_by_two_hosts() {
        let names = |count| (0..count).map(|n: usize| n.to_string()).collect::<Vec<_>>();
        assert_eq!(halves(names(300), names(MANY)), [(names(300), names(MANY))]);
        assert_eq!(
            halves(names(3), names(MANY + 1)),
            [(names(3), names(0)), (names(0), names(MANY + 1))]
        );
        let parts = halves(names(0), names(100));
        let linux: Vec<_> = parts.iter().map(|(_, linux)| linux.len()).collect();
        assert_eq!(linux, [50, 50]);
        assert_eq!(
            parts.into_iter().flat_map(|(_, linux)| linux).collect::<Vec<_>>(),
            names(100)
        );
    }

    #[test]
    fn lines_come_whole() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for piece in ["on", "e\ntwo\nth", "ree"] {
            lines.take(piece.as_bytes(), |line| seen.push(line.to_owned()));
        }
        assert_eq!(seen, ["one", "two"]);
    }

    #[test]
    fn a_test_without_result_has_failed() {
        let names = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        let mut pending = Pending::new("nested::amd", "nested", names);
        let mut tally = Tally::new(std::io::sink());
        pending.line(
            r#"{"name":"b","level":"nested","verdict":"passed","millis":20}"#,
            &mut tally,
        );
        pending.line(
            r#"{"name":"c","level":"nested","verdict":"skipped","why":"no","millis":2}"#,
            &mut tally,
        );
        pending.line(
            r#"{"name":"x","level":"nested","verdict":"passed","millis":20}"#,
            &mut tally,
        );
        let expected = ["--json", "--exact", "--level", "nested", "a", "d"];
        assert_eq!(pending.arguments(), expected);
        pending.line(
            r#"{"name":"d","level":"nested","verdict":"failed","why":"e","millis":2}"#,
            &mut tally,
        );
        assert_eq!(tally.counts(), "1 passed, 1 failed, 1 skipped");
        pending.finish("killed", &mut tally);
        assert_eq!(tally.counts(), "1 passed, 2 failed, 1 skipped");
    }
}
