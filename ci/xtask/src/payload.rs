//! Building the bare-metal guest of the payload tests (tests/payload).
//!
//! It is a workspace of its own with its own link flags, so nothing that another build puts in the environment may
//! reach it. Compiled `core` and `alloc` are all it needs: those of the stable toolchain, or for another architecture those of
//! [`stdlib`].

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::lint::Outcome;
use crate::stdlib::{self, Library};
use crate::{packages, tools};

const NAME: &str = "triarch-payload";
/// What an ARM guest boots, made from the ELF image.
const IMAGE: &str = "triarch-payload.img";
/// Where a PVH loader enters (Xen's public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// At byte 56 of what an ARM guest boots (Linux, Documentation/arch/arm64/booting.rst).
const ARM64_MAGIC: &[u8] = b"ARM\x64";

fn source() -> PathBuf {
    tools::top().join("tests/payload")
}

/// Beside the other build results: cargo keys what is in it.
fn target_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    tools::top().join(target).join("payload")
}

fn cargo(arch: Arch, verb: &str) -> Result<Command> {
    packages::require(arch.link_needs())?;
    let mut command = tools::cargo();
    command.current_dir(source()).arg(verb);
    command.args(["--quiet", "--release", "--locked", "--target", arch.target()]);
    tools::without_flags(&mut command).env("CARGO_TARGET_DIR", target_directory());
    match stdlib::get(arch)? {
        Library::Installed => {}
        Library::Sysroot(dir) => {
            let flag = format!(
                "--sysroot={}",
                dir.to_str().context("the checkout's path is not UTF-8")?
            );
            // Cargo adds these to the flags of the payload's own configuration.
            command.args(["--config", &format!("target.{}.rustflags={:?}", arch.target(), [flag])]);
        }
        Library::Compiler(rustc) => {
            command.env("RUSTC", rustc);
        }
    }
    Ok(command)
}

/// Builds the payload for guests of `arch` and returns its file: a static ELF image with a PVH entry, or the `Image` of an ARM
/// kernel.
///
/// # Errors
/// The code does not compile, or the result has no PVH entry or no header.
pub fn build(arch: Arch) -> Result<PathBuf> {
    let mut command = cargo(arch, "build")?;
    tools::step(&format!("building the payload guest for {arch}"), || {
        tools::run(&mut command)
    })?;
    let directory = target_directory().join(arch.target()).join("release");
    let file = directory.join(NAME);
    let elf = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    match arch {
        Arch::X86_64 if pvh_entry(&elf).is_some() => Ok(file),
        Arch::X86_64 => bail!("{} has no PVH entry note", file.display()),
        Arch::Aarch64 => write_image(&elf, &directory.join(IMAGE)),
    }
}

fn write_image(elf: &[u8], file: &Path) -> Result<PathBuf> {
    let image = loaded(elf).filter(|image| image.get(56..60) == Some(ARM64_MAGIC));
    let image = image.context("the payload guest does not begin with the header of an ARM kernel")?;
    std::fs::write(file, image).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file.to_path_buf())
}

/// Format and compiler's advice for the payload, which the workspace's own checks do not reach.
///
/// # Errors
/// What is wrong.
pub fn lint() -> Result<Outcome> {
    let mut format = tools::cargo();
    tools::output(format.current_dir(source()).args(["fmt", "--", "--check", "-l"]))?;
    for arch in [Arch::X86_64, Arch::Aarch64] {
        if matches!(stdlib::get(arch)?, Library::Compiler(_)) {
            let why = format!("clippy's own compiler has no library for {arch} here (docs/test-hosts.md)");
            return Ok(Outcome::Skipped(why));
        }
        let mut clippy = cargo(arch, "clippy")?;
        tools::output(clippy.args(["--", "-D", "warnings"]))?;
    }
    Ok(Outcome::Passed)
}

/// Some bytes of an ELF file as a little-endian number.
fn number(elf: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = elf.get(at..at.checked_add(len)?)?;
    Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// Where the program headers of a 64-bit, little-endian ELF file are that have this type.
fn segments(elf: &[u8], kind: u32) -> Option<Vec<usize>> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = usize::try_from(number(elf, 32, 8)?).ok()?;
    let (size, count) = (number(elf, 54, 2)? as usize, number(elf, 56, 2)? as usize);
    let headers = (0..count)
        .map(|n| table.checked_add(n * size))
        .collect::<Option<Vec<_>>>()?;
    let wanted = |at: &usize| number(elf, *at, 4) == Some(u64::from(kind));
    Some(headers.into_iter().filter(wanted).collect())
}

/// What of an ELF file with a single PT_LOAD segment is put into memory.
fn loaded(elf: &[u8]) -> Option<&[u8]> {
    const PT_LOAD: u32 = 1;
    let [header] = segments(elf, PT_LOAD)?[..] else {
        return None;
    };
    let place = |at: usize| usize::try_from(number(elf, at, 8)?).ok();
    let (start, size) = (place(header + 8)?, place(header + 32)?);
    elf.get(start..start.checked_add(size)?)
}

/// The entry point a PVH loader takes from an ELF file's notes.
fn pvh_entry(elf: &[u8]) -> Option<u64> {
    const PT_NOTE: u32 = 4;
    let number = |at: usize, len: usize| number(elf, at, len);
    let place = |at: usize| usize::try_from(number(at, 8)?).ok();
    let notes = *segments(elf, PT_NOTE)?.first()?;
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
    fn what_is_loaded_is_found() {
        let mut file = elf(18, b"Xen\0");
        assert_eq!(loaded(&file), None);
        file[64] = 1;
        assert_eq!(loaded(&file), Some(&file[120..164]));
        file.truncate(163);
        assert_eq!(loaded(&file), None);
    }

    #[test]
    fn a_cut_file_has_no_entry() {
        let whole = elf(18, b"Xen\0");
        for len in 0..whole.len() {
            assert_eq!(pvh_entry(&whole[..len]), None, "{len} bytes");
        }
    }
}
