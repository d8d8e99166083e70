//! Building the project's own programs, static, so that they run on any host.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::stdlib::{self, Library};
use crate::{packages, payload, tools};

/// The packages whose programs are shipped or put on hosts.
const PACKAGES: [&str; 6] = [
    "triarch",
    "triarch-blkd",
    "triarch-client",
    "triarch-guest-init",
    "triarch-netd",
    "triarch-suites",
];

/// What to build.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// For which architecture; by default that of this machine
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// How to compile
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
}

/// Cargo, told to carry out `words` for static programs of `arch`. The compiler, libc and library they need are
/// there when this returns.
///
/// # Errors
/// Something is missing and cannot be installed or made.
pub fn cargo(arch: Arch, words: &[&str]) -> Result<Command> {
    packages::require(arch.link_needs())?;
    let target = arch.target();
    let mut command = tools::cargo();
    command.args(words).args(["--target", target]);
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    match stdlib::get(arch)? {
        Library::Installed => {}
        Library::Sysroot(dir) => {
            let dir = dir.to_str().context("the checkout's path is not UTF-8")?;
            flags.push(format!("--sysroot={dir}"));
        }
        Library::Compiler(rustc) => {
            command.env("RUSTC", rustc);
        }
    }
    // Rust's and TOML's notations of such strings are the same.
    command.args(["--config", &format!("target.{target}.rustflags={flags:?}")]);
    if arch != Arch::native() {
        command.args(["--config", &format!("target.{target}.linker={:?}", arch.linker())]);
    }
    Ok(command)
}

/// How programs are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// Quick to build.
    Dev,
    /// As shipped.
    Release,
}

impl Profile {
    /// Cargo's name of the profile.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Release => "release",
        }
    }

    fn directory(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// Builds the programs of `packages` and returns the directory they are in.
///
/// # Errors
/// The compiler or libc is missing, or the code does not compile.
pub fn programs(arch: Arch, profile: Profile, names: &[&str]) -> Result<PathBuf> {
    let mut command = cargo(arch, &["build", "--quiet", "--bins"])?;
    command.args(["--profile", profile.name()]);
    for name in names {
        command.args(["--package", name]);
    }
    let what = format!("building {} for {arch} ({})", names.join(", "), profile.name());
    // The compiler's words come on lines of their own.
    tools::step(&what, || tools::run(&mut command))?;
    Ok(directory(arch, profile))
}

/// Builds one program and returns its file.
///
/// # Errors
/// As [`programs`], or the package has no program of that name.
pub fn program(arch: Arch, profile: Profile, package: &str, binary: &str) -> Result<PathBuf> {
    let file = programs(arch, profile, &[package])?.join(binary);
    check_static(&file)?;
    Ok(file)
}

/// Builds everything that is shipped or put on a host, and lists it.
///
/// # Errors
/// As [`programs`].
pub fn everything(args: &Args) -> Result<()> {
    let arch = args.arch.unwrap_or_else(Arch::native);
    let dir = programs(arch, args.profile, &PACKAGES)?;
    for item in std::fs::read_dir(&dir)? {
        let file = item?.path();
        let is_program = file.is_file() && file.extension().is_none() && check_static(&file).is_ok();
        if is_program {
            println!("{:>8} KiB  {}", std::fs::metadata(&file)?.len() / 1024, file.display());
        }
    }
    let file = payload::build(arch)?;
    println!("{:>8} KiB  {}", std::fs::metadata(&file)?.len() / 1024, file.display());
    Ok(())
}

/// Builds the first process of hosts and guests, small.
///
/// # Errors
/// As [`programs`].
pub fn guest_init(arch: Arch) -> Result<PathBuf> {
    const NAME: &str = "triarch-guest-init";
    program(arch, Profile::Release, NAME, NAME)
}

fn directory(arch: Arch, profile: Profile) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| tools::top().join("target"), |d| tools::top().join(PathBuf::from(d)));
    target.join(arch.target()).join(profile.directory())
}

/// A program that asks for a dynamic loader would not start on a host that has none.
fn check_static(file: &Path) -> Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    match interpreter(&bytes) {
        Some(false) => Ok(()),
        Some(true) => bail!("{} is not static: it asks for a dynamic loader", file.display()),
        None => bail!("{} is no 64-bit ELF file", file.display()),
    }
}

/// Whether an ELF file has a PT_INTERP segment (System V ABI, chapter 5, "Program Header").
fn interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    for entry in 0..count {
        if u32_at(table.checked_add(entry * size)?)? == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kinds: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56 * kinds.len()];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        file[54] = 56;
        file[56] = u8::try_from(kinds.len()).unwrap();
        for (n, kind) in kinds.iter().enumerate() {
            file[64 + 56 * n] = *kind;
        }
        file
    }

    #[test]
    fn a_dynamic_program_is_known_by_its_interpreter() {
        assert_eq!(interpreter(&elf(&[1, 1, 2])), Some(false));
        assert_eq!(interpreter(&elf(&[6, 3, 1])), Some(true));
        assert_eq!(interpreter(b"#!/bin/sh"), None);
        let mut cut = elf(&[1]);
        cut.truncate(60);
        assert_eq!(interpreter(&cut), None);
    }
}
