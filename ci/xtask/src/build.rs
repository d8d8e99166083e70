//! Building the project's own programs, static, so that they run on any host.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{packages, payload, tools};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const STATIC: &str = r#"target.x86_64-unknown-linux-gnu.rustflags=["-Ctarget-feature=+crt-static"]"#;

/// What makes cargo build static programs.
pub const STATIC_ARGS: [&str; 4] = ["--target", TARGET, "--config", STATIC];

/// The packages whose programs are shipped or put on hosts.
const PACKAGES: [&str; 2] = ["triarch", "triarch-guest-init"];

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
pub fn programs(profile: Profile, names: &[&str]) -> Result<PathBuf> {
    packages::require(&packages::LINK)?;
    let mut command = tools::cargo();
    command.args(["build", "--quiet", "--bins"]).args(STATIC_ARGS);
    command.args(["--profile", profile.name()]);
    for name in names {
        command.args(["--package", name]);
    }
    let what = format!("building {} ({})", names.join(", "), profile.name());
    // The compiler's words come on lines of their own.
    tools::step(&what, || tools::run(&mut command))?;
    Ok(directory(profile))
}

/// Builds one program and returns its file.
///
/// # Errors
/// As [`programs`], or the package has no program of that name.
pub fn program(profile: Profile, package: &str, binary: &str) -> Result<PathBuf> {
    let file = programs(profile, &[package])?.join(binary);
    check_static(&file)?;
    Ok(file)
}

/// Builds everything that is shipped or put on a host, and lists it.
///
/// # Errors
/// As [`programs`].
pub fn everything(profile: Profile) -> Result<()> {
    let dir = programs(profile, &PACKAGES)?;
    for item in std::fs::read_dir(&dir)? {
        let file = item?.path();
        let is_program = file.is_file() && file.extension().is_none() && check_static(&file).is_ok();
        if is_program {
            println!("{:>8} KiB  {}", std::fs::metadata(&file)?.len() / 1024, file.display());
        }
    }
    let file = payload::build()?;
    println!("{:>8} KiB  {}", std::fs::metadata(&file)?.len() / 1024, file.display());
    Ok(())
}

/// Builds the first process of hosts and guests, small.
///
/// # Errors
/// As [`programs`].
pub fn guest_init() -> Result<PathBuf> {
    const NAME: &str = "triarch-guest-init";
    program(Profile::Release, NAME, NAME)
}

fn directory(profile: Profile) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| tools::top().join("target"), |d| tools::top().join(PathBuf::from(d)));
    target.join(TARGET).join(profile.directory())
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
