//! Hosts that run Triarch: emulated AMD, Hygon and ARM machines, or this machine itself.
//!
//! An emulated host is QEMU without acceleration, a stock Debian kernel with KVM, and our own init
//! with its agent. It starts in seconds and serves any number of commands.

use std::fmt;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use triarch_harness::agent::{Agent, AgentError, Exec, Exit, Machine, Stream};

use crate::arch::Arch;
use crate::images;
use crate::kernels::{Kernel, Version};
use crate::local::{self, Local};
use crate::passthrough;
use crate::qemu::{Hardware, Paired, Qemu};
use crate::root::Rig;

/// Time an emulated host has to start. It takes 4 s on an idle machine.
const START: Duration = Duration::from_secs(60);
const PORT: &str = "triarch.agent";
/// Where files for tests lie on an emulated host.
const DIR: &str = "/rig";

/// Which host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// An emulated AMD EPYC.
    Amd,
    /// An emulated Hygon C86.
    Hygon,
    /// An emulated 64-bit ARM machine.
    Arm,
    /// This machine, with its own KVM.
    Native,
}

impl Kind {
    /// QEMU's CPU model, if the host is emulated.
    fn model(self) -> Option<&'static str> {
        match self {
            Self::Amd => Some("EPYC-Milan"),
            Self::Hygon => Some("Dhyana"),
            Self::Arm => Some("neoverse-n1"),
            Self::Native => None,
        }
    }

    /// The architecture of the host, and of its guests.
    pub fn arch(self) -> Arch {
        match self {
            Self::Amd | Self::Hygon => Arch::X86_64,
            Self::Arm => Arch::Aarch64,
            Self::Native => Arch::native(),
        }
    }

    /// The hosts used when none is named: this machine where it has hardware KVM, else the
    /// emulated ones.
    pub fn defaults() -> Vec<Self> {
        if local::hardware_kvm() {
            vec![Self::Native]
        } else {
            vec![Self::Amd, Self::Hygon, Self::Arm]
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd => "amd",
            Self::Hygon => "hygon",
            Self::Arm => "arm",
            Self::Native => "native",
        })
    }
}

/// How to make an emulated host.
#[derive(Debug, Clone)]
pub struct Options {
    /// QEMU's name of the CPU model, when it is not the usual one of an emulated host.
    pub cpu: Option<String>,
    /// Number of CPUs. With more than one an emulated host is less steady.
    pub smp: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Its kernel.
    pub kernel: Version,
    /// Files it has from the start under [`Host::path`]: name, permission bits, source.
    pub files: Vec<(String, u32, PathBuf)>,
    /// Whether its /dev/hvc0 is our terminal.
    pub terminal: bool,
    /// Socket of a daemon that serves an emulated host a disk, /dev/vda, over vhost-user.
    pub vhost_disk: Option<PathBuf>,
    /// What an emulated host has in common with another one: a network card leads there, and its disk /dev/vda is that one's as well.
    pub pair: Option<Paired>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cpu: None,
            smp: 1,
            memory_mib: 2048,
            kernel: Version::V6_1,
            files: Vec::new(),
            terminal: false,
            vhost_disk: None,
            pair: None,
        }
    }
}

/// The host itself failed, not what ran on it: it died, hung or never answered. Found in an error's
/// chain with `downcast_ref`; only such a failure may be retried.
#[derive(Debug)]
pub struct HostFailure {
    kind: Kind,
    what: String,
    post_mortem: String,
}

impl fmt::Display for HostFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the emulated host `{}` {}; {}",
            self.kind, self.what, self.post_mortem
        )
    }
}

impl std::error::Error for HostFailure {}

/// The parts of an emulated host.
struct Parts {
    rig: Rig,
    kernel: Kernel,
    initramfs: PathBuf,
}

impl Parts {
    fn get(arch: Arch, version: Version) -> Result<Self> {
        let rig = Rig::get(arch)?;
        rig.qemu_version()?;
        let kernel = Kernel::get(version, arch, &rig.root)?;
        let initramfs = images::host(&kernel, &rig)?;
        Ok(Self { rig, kernel, initramfs })
    }
}

/// A started host. Dropping it ends it and all that runs on it.
pub struct Host {
    kind: Kind,
    dir: String,
    // Before what runs it: the stream closes first.
    agent: Agent,
    backend: Mutex<Backend>,
}

enum Backend {
    Emulated(Qemu),
    Native(Local),
}

impl Host {
    /// Starts a host; an emulated one that fails to start is started once more. The host ends with
    /// the thread that started it.
    ///
    /// # Errors
    /// Its parts cannot be made, or it did not start twice.
    pub fn start(kind: Kind, options: &Options) -> Result<Self> {
        let Some(model) = kind.model() else {
            return Self::native(options);
        };
        let model = options.cpu.as_deref().unwrap_or(model);
        let parts = Parts::get(kind.arch(), options.kernel)?;
        let boot = || Self::boot(kind, model, options, &parts);
        boot().or_else(|error| again(error, boot))
    }

    fn native(options: &Options) -> Result<Self> {
        if let Some(model) = &options.cpu {
            bail!("this machine has the CPU it has: {model} is for emulated hosts");
        }
        let (local, stream) = Local::start()?;
        let host = Self {
            kind: Kind::Native,
            dir: local.dir().display().to_string(),
            agent: Agent::connect(stream, START)?,
            backend: Mutex::new(Backend::Native(local)),
        };
        for (name, mode, source) in &options.files {
            host.put_file(name, *mode, source)?;
        }
        Ok(host)
    }

    fn boot(kind: Kind, model: &str, options: &Options, parts: &Parts) -> Result<Self> {
        let start = Instant::now();
        let place = |(name, mode, source): &(String, u32, PathBuf)| (format!("{DIR}/{name}"), *mode, source.clone());
        let files: Vec<_> = options.files.iter().map(place).collect();
        let initramfs = images::appended(&parts.initramfs, DIR, &files)?;
        // The file has no name: the emulator reads it through our own descriptor.
        let path = format!("/proc/{}/fd/{}", std::process::id(), initramfs.as_raw_fd());
        let console = kind.arch().console();
        let spare = passthrough::Devices::new()?;
        let hardware = Hardware {
            arch: kind.arch(),
            cpu: model,
            smp: options.smp,
            memory_mib: options.memory_mib,
            kernel: parts.kernel.shipped(),
            initramfs: Path::new(&path),
            cmdline: &format!(
                "console={console} quiet panic=-1 {} {} triarch.agent=port:{PORT}",
                kind.arch().of_slow_hosts(),
                passthrough::cmdline(kind.arch())
            ),
            port: PORT,
            terminal: options.terminal,
            vhost_disk: options.vhost_disk.as_deref(),
            spare: &spare,
            pair: options.pair.as_ref(),
            name: &format!("host-{kind}"),
        };
        let (mut qemu, stream) = Qemu::start(&parts.rig, &hardware)?;
        let agent = Agent::connect(stream, START).map_err(|error| HostFailure {
            kind,
            what: format!("did not start: {error}"),
            post_mortem: qemu.post_mortem(),
        })?;
        let machine = agent.machine();
        eprintln!(
            "  host {kind}: {}, {} CPU(s), {} MiB, Linux {}, up in {:.1} s",
            machine.vendor,
            machine.cpus,
            machine.memory_mib,
            machine.kernel,
            start.elapsed().as_secs_f64()
        );
        Ok(Self {
            kind,
            dir: DIR.to_owned(),
            agent,
            backend: Mutex::new(Backend::Emulated(qemu)),
        })
    }

    /// Which host this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What the host's own kernel says about it.
    pub fn machine(&self) -> &Machine {
        self.agent.machine()
    }

    /// Where the file `name` lies on the host.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// Writes the file [`Self::path`]`(name)`.
    ///
    /// # Errors
    /// The host refuses or failed ([`HostFailure`]).
    pub fn put(&self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.judge(self.agent.put(&self.path(name), mode, content))
    }

    /// Copies a file of this machine to [`Self::path`]`(name)`.
    ///
    /// # Errors
    /// The file cannot be read, or as [`Self::put`].
    pub fn put_file(&self, name: &str, mode: u32, source: &Path) -> Result<()> {
        let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.put(name, mode, &content)
    }

    /// Reads the file `path`.
    ///
    /// # Errors
    /// The host refuses or failed ([`HostFailure`]).
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        self.judge(self.agent.get(path))
    }

    /// Runs a command to its end, handing over its output as it comes. Several threads may do so
    /// at once.
    ///
    /// # Errors
    /// The command cannot be started, or the host failed ([`HostFailure`]). A command that fails
    /// is no error: see [`Exit`].
    pub fn exec(&self, exec: &Exec, on_output: impl FnMut(Stream, &[u8])) -> Result<Exit> {
        self.judge(self.agent.exec(exec, on_output))
    }

    /// Runs a shell script that has to succeed; returns what it printed.
    ///
    /// # Errors
    /// The script failed, or the host did ([`HostFailure`]).
    pub fn shell(&self, script: &str) -> Result<String> {
        self.judge(self.agent.shell(script))
    }

    /// Tells failures of the host from those of what it was asked to do.
    fn judge<T>(&self, result: Result<T, AgentError>) -> Result<T> {
        result.map_err(|error| {
            let mut backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *backend {
                Backend::Emulated(qemu) if error.is_machine_failure() => anyhow!(HostFailure {
                    kind: self.kind,
                    what: format!("failed: {error}"),
                    post_mortem: qemu.post_mortem(),
                }),
                Backend::Native(local) if error.is_machine_failure() => {
                    anyhow!(error).context(format!("the agent on this machine failed ({})", local.state()))
                }
                _ => anyhow!(error),
            }
        })
    }
}

/// Starts a host and calls `work` with it. When the host itself fails, both are done once more.
///
/// # Errors
/// The host failed twice, or `work` failed.
pub fn with_host<T>(kind: Kind, options: &Options, mut work: impl FnMut(&Host) -> Result<T>) -> Result<T> {
    let mut once = || work(&Host::start(kind, options)?);
    once().or_else(|error| again(error, once))
}

fn again<T>(error: anyhow::Error, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    if error.downcast_ref::<HostFailure>().is_none() {
        return Err(error);
    }
    eprintln!("  {error:#}\n  once more:");
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> anyhow::Error {
        let failure = HostFailure {
            kind: Kind::Hygon,
            what: "failed: no answer".into(),
            post_mortem: "QEMU ended: signal 6".into(),
        };
        anyhow!(failure).context("running the tests")
    }

    #[test]
    fn only_a_failure_of_the_host_is_retried() {
        let mut calls = 0;
        let mut work = || {
            calls += 1;
            Ok(())
        };
        again(failure(), &mut work).unwrap();
        assert!(again(anyhow!("the guest did not boot"), &mut work).is_err());
        assert_eq!(calls, 1);
    }

    #[test]
    fn a_failure_says_which_host_and_how_qemu_ended() {
        let text = format!("{:#}", failure());
        for part in ["`hygon`", "no answer", "signal 6"] {
            assert!(text.contains(part), "{part:?} not in {text:?}");
        }
    }

    #[test]
    fn every_kind_has_its_own_vendor() {
        assert_ne!(Kind::Amd.model(), Kind::Hygon.model());
        assert_eq!(Kind::Native.model(), None);
    }
}
