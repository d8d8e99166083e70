//! Building the bare-metal guest of the payload tests (tests/payload).
//!
//! It is a workspace of its own with its own link flags, so nothing that another build puts in the environment may
//! reach it. The stable toolchain's compiled `core` and `alloc` are all it needs: no sources of the standard library,
//! no C compiler, no linker but the one rustc brings.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::lint::Outcome;
use crate::{packages, tools};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const NAME: &str = "triarch-payload";
/// Where a PVH loader enters (Xen's public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Whether there is a payload for guests of this architecture.
pub fn exists_for(arch: Arch) -> bool {
    arch == Arch::X86_64
}

fn source() -> PathBuf {
    tools::top().join("tests/payload")
}

/// Beside the other build results: cargo keys what is in it.
fn target_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    tools::top().join(target).join("payload")
}

fn cargo(verb: &str) -> Command {
    let mut command = tools::cargo();
    command.current_dir(source()).arg(verb);
    tools::without_flags(&mut command).env("CARGO_TARGET_DIR", target_directory());
    command
}

/// Builds the payload and returns its file: a static ELF image with a PVH entry.
///
/// # Errors
/// The code does not compile, or the result has no PVH entry.
pub fn build() -> Result<PathBuf> {
    let mut command = cargo("build");
    command.args(["--quiet", "--release", "--locked", "--target", TARGET]);
    packages::require(&packages::LINK)?;
    tools::step("building the payload guest", || tools::run(&mut command))?;
    let file = target_directory().join(TARGET).join("release").join(NAME);
    check(&file)?;
    Ok(file)
}

/// Format and compiler's advice for the payload, which the workspace's own checks do not reach.
///
/// # Errors
/// What is wrong.
pub fn lint() -> Result<Outcome> {
    tools::output(cargo("fmt").args(["--", "--check", "-l"]))?;
    let mut clippy = cargo("clippy");
    clippy.args([
        "--quiet",
        "--release",
        "--locked",
        "--target",
        TARGET,
        "--",
        "-D",
        "warnings",
    ]);
    tools::output(&mut clippy)?;
    Ok(Outcome::Passed)
}

fn check(file: &Path) -> Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    if pvh_entry(&bytes).is_none() {
        bail!("{} has no PVH entry note", file.display());
    }
    Ok(())
}

/// The entry point a PVH loader takes from an ELF file's notes.
fn pvh_entry(elf: &[u8]) -> Option<u64> {
    const PT_NOTE: u64 = 4;
    let number = |at: usize, len: usize| {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    let place = |at: usize| usize::try_from(number(at, 8)?).ok();
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (place(32)?, number(54, 2)? as usize, number(56, 2)? as usize);
    let headers = (0..count).map(|n| table.checked_add(n * size));
    let notes = headers.flatten().find(|at| number(*at, 4) == Some(PT_NOTE))?;
    let (mut at, end) = (place(notes + 8)?, place(notes + 8)?.checked_add(place(notes + 32)?)?);
    while at < end {
        let (name, len) = (number(at, 4)? as usize, number(at + 4, 4)? as usize);
        let desc = at + 12 + name.next_multiple_of(4);
        if number(at + 8, 4)? == u64::from(XEN_ELFNOTE_PHYS32_ENTRY) && elf.get(at + 12..at + 16)? == b"Xen\0" {
            return number(desc, len.min(8));
        }
        at = desc.checked_add(len.next_multiple_of(4))?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kind: u32, name: &[u8; 4]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (file[32], file[54], file[56]) = (64, 56, 1);
        (file[64], file[72], file[96]) = (4, 120, 44);
        // Another note first, with a name and a descriptor that need padding.
        file.extend([4, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]);
        file.extend(*b"GNU\0\x55\0\0\0");
        file.extend([4, 0, 0, 0, 8, 0, 0, 0]);
        file.extend(kind.to_le_bytes());
        file.extend(*name);
        file.extend(0x10_0000u64.to_le_bytes());
        file
    }

    #[test]
    fn the_entry_is_found_among_the_notes() {
        assert_eq!(pvh_entry(&elf(18, b"Xen\0")), Some(0x10_0000));
        assert_eq!(pvh_entry(&elf(17, b"Xen\0")), None);
        assert_eq!(pvh_entry(&elf(18, b"Zen\0")), None);
        assert_eq!(pvh_entry(b"#!/bin/sh"), None);
    }

    #[test]
    fn a_cut_file_has_no_entry() {
        let whole = elf(18, b"Xen\0");
        for len in 0..whole.len() {
            assert_eq!(pvh_entry(&whole[..len]), None, "{len} bytes");
        }
    }
}
