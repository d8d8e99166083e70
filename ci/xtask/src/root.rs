//! The trixie root: Debian programs newer than the machine's, unpacked under the checkout and run
//! through the root's own dynamic loader, so neither chroot nor installation is needed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::cache::{self, Recipe};
use crate::{mend, packages, tools};

/// Changes whenever this file makes another root from the same packages.
const SCRIPT: &str = "3";
/// The suite whose versions are preferred: it has QEMU 11.1 and newer.
pub const SUITE: &str = "trixie-backports";
/// Shell and tools for guests and hosts (static), and what unpacks kernels and their modules.
const TOOLS: [&str; 4] = ["busybox-static/trixie", "xz-utils", "zstd", "lz4"];
/// The first QEMU whose emulated AMD host runs firmware in its guests without aborting.
const QEMU_WANTED: (u32, u32) = (11, 1);
/// The static busybox of an architecture that is not the machine's.
const BUSYBOX: &str = "busybox-static";
const BUSYBOX_SUITE: &str = "trixie";
const BUSYBOX_FILE: &str = "usr/bin/busybox";

/// Debian's package of the emulator of hosts of this architecture.
fn qemu_package(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "qemu-system-x86",
        Arch::Aarch64 => "qemu-system-arm",
    }
}

/// The emulator's name.
fn qemu_program(arch: Arch) -> String {
    format!("qemu-system-{arch}")
}

/// An unpacked set of Debian packages.
#[derive(Debug, Clone)]
pub struct Root {
    dir: PathBuf,
}

impl Root {
    /// The root called `name` with `extra` packages beside the tools.
    ///
    /// # Errors
    /// The packages cannot be downloaded or unpacked.
    pub fn get(name: &str, extra: &[&str]) -> Result<Self> {
        let names: Vec<&str> = TOOLS.iter().chain(extra).copied().collect();
        let recipe = Recipe::new(name)
            .with("script", SCRIPT)
            .with("suite", SUITE)
            .with("packages", &names.join(" "));
        let dir = cache::ensure(&recipe, |dir| unpack_into(Arch::native(), dir, &names))?;
        Ok(Self { dir })
    }

    /// A program of the root, or one elsewhere that was made from it, run with the root's libraries.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(self.dir.join(Arch::native().loader()));
        let libraries = [Arch::native().libraries(), "usr/lib"].map(|l| self.dir.join(l));
        command
            .arg("--library-path")
            .arg(libraries.map(|l| l.display().to_string()).join(":"))
            .arg(self.dir.join(program));
        command
    }

    /// The static busybox.
    pub fn busybox(&self) -> PathBuf {
        self.dir.join(BUSYBOX_FILE)
    }
}

/// The static busybox that runs on hosts and guests of `arch`.
fn busybox(arch: Arch, root: &Root) -> Result<PathBuf> {
    if arch == Arch::native() {
        return Ok(root.busybox());
    }
    let recipe = Recipe::new(&format!("busybox-{}", arch.debian()))
        .with("script", SCRIPT)
        .with("package", BUSYBOX)
        .with("suite", BUSYBOX_SUITE);
    let dir = cache::ensure(&recipe, |dir| {
        packages::with_apt(arch, |apt| {
            let what = format!("downloading {BUSYBOX} for {}", arch.debian());
            let file = tools::step(&what, || apt.download_of(BUSYBOX, BUSYBOX_SUITE))?;
            packages::unpack(&file, dir)?;
            packages::record(&[file], dir)
        })
    })?;
    Ok(dir.join(BUSYBOX_FILE))
}

/// Debian's emulator of hosts of `arch`, without the fault of that of AMD hosts.
fn debians_qemu(arch: Arch, root: &Root) -> Result<PathBuf> {
    let program = root.dir.join("usr/bin").join(qemu_program(arch));
    match arch {
        Arch::X86_64 => mend::emulator(&program, &root.dir.join("packages.txt")),
        Arch::Aarch64 => Ok(program),
    }
}

/// Unpacks packages (NAME, NAME/SUITE or NAME=VERSION) for `arch` and all they depend on into `dir`, as a root file system.
///
/// # Errors
/// They cannot be downloaded or unpacked.
pub fn unpack_into(arch: Arch, dir: &Path, names: &[&str]) -> Result<()> {
    for sub in ["bin", "sbin", "lib", "lib64"] {
        std::fs::create_dir_all(dir.join("usr").join(sub))?;
        std::os::unix::fs::symlink(format!("usr/{sub}"), dir.join(sub))?;
    }
    packages::with_apt(arch, |apt| {
        let what = match names {
            [first, rest @ ..] if rest.len() > 4 => format!("{first} and {} more", rest.len()),
            _ => names.join(", "),
        };
        let files = tools::step(&format!("downloading {what}"), || {
            apt.download_with_dependencies(SUITE, names)
        })?;
        tools::step(&format!("unpacking {} packages", files.len()), || {
            files.iter().try_for_each(|f| packages::unpack(f, dir))
        })?;
        packages::record(&files, dir)
    })?;
    // Left by packages for services that never run here.
    let _ = std::fs::remove_dir_all(dir.join("etc"));
    Ok(())
}

/// The QEMU that emulates hosts, and the tools that come with it.
#[derive(Debug, Clone)]
pub struct Rig {
    /// The architecture of its hosts.
    pub arch: Arch,
    /// Where the tools come from.
    pub root: Root,
    /// The static busybox for its hosts and guests.
    pub busybox: PathBuf,
    qemu: Qemu,
}

/// The emulator's program.
#[derive(Debug, Clone)]
enum Qemu {
    /// The machine's own.
    Own(PathBuf),
    /// Debian's, which runs by the root's loader.
    Debian(PathBuf),
}

impl Rig {
    /// What emulates hosts of `arch`: the machine's own QEMU where it is new enough, else Debian's in the root.
    ///
    /// # Errors
    /// The root cannot be made.
    pub fn get(arch: Arch) -> Result<Self> {
        let own = tools::find(&qemu_program(arch)).filter(|path| {
            let said = tools::output(Command::new(path).arg("--version"));
            said.ok()
                .and_then(|text| version(&text))
                .is_some_and(|v| v >= QEMU_WANTED)
        });
        let package = [qemu_package(arch)];
        let extra: &[&str] = if own.is_some() { &[] } else { &package };
        let root = Root::get(&format!("root-{arch}"), extra)?;
        let qemu = match own {
            Some(own) => Qemu::Own(own),
            None => Qemu::Debian(debians_qemu(arch, &root)?),
        };
        Ok(Self {
            arch,
            busybox: busybox(arch, &root)?,
            root,
            qemu,
        })
    }

    /// The emulator, ready for its arguments.
    pub fn qemu(&self) -> Command {
        let mut command = match &self.qemu {
            Qemu::Own(own) => return Command::new(own),
            Qemu::Debian(program) => self.root.command(program),
        };
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.root.dir.join(data));
        }
        command
    }

    /// The emulator's program file.
    pub fn qemu_binary(&self) -> &Path {
        match &self.qemu {
            Qemu::Own(path) | Qemu::Debian(path) => path,
        }
    }

    /// The emulator's version, as it prints it, e.g. `11.1.3`.
    ///
    /// # Errors
    /// The emulator does not run or is older than the rig needs.
    pub fn qemu_version(&self) -> Result<String> {
        let text = tools::output(self.qemu().arg("--version"))?;
        let found = version(&text).context("QEMU prints no version")?;
        if found < QEMU_WANTED {
            bail!(
                "QEMU {}.{} is older than {}.{}, which the emulated hosts need",
                found.0,
                found.1,
                QEMU_WANTED.0,
                QEMU_WANTED.1
            );
        }
        let word = text.split_whitespace().nth(3).unwrap_or_default();
        Ok(word.to_owned())
    }
}

/// Major and minor number in `QEMU emulator version 11.1.3 (...)`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(['.', ' ']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let v = |s: &str| version(&format!("QEMU emulator version {s} (Debian x)"));
        assert_eq!(v("11.1.3"), Some((11, 1)));
        assert!(v("7.2.22") < Some(QEMU_WANTED));
        assert!(v("11.0.0") < Some(QEMU_WANTED));
        assert!(v("11.10.0") > Some(QEMU_WANTED));
        assert_eq!(version("nothing"), None);
    }
}
