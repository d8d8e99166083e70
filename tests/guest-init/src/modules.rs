//! Kernel modules: which others they need, and loading them in that order.
//!
//! Debian ships no dependency list (`depmod` makes it at installation), but each module names what
//! it needs in its `.modinfo` section (Linux, scripts/mod/modpost.c).

use crate::sys;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// What a module needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Modules without which it cannot be loaded.
    pub hard: Vec<String>,
    /// Modules that should be loaded before it, if there are any such.
    pub soft: Vec<String>,
}

/// A module's name as the kernel knows it: `-` and `_` are the same.
pub fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads from an uncompressed module what it needs; `None` if this is no 64-bit little-endian
/// module.
pub fn needs(module: &[u8]) -> Option<Needs> {
    let mut needs = Needs::default();
    for item in section(module, ".modinfo")?.split(|b| *b == 0) {
        let Ok(item) = std::str::from_utf8(item) else {
            continue;
        };
        if let Some(list) = item.strip_prefix("depends=") {
            needs.hard.extend(list.split(',').filter(|n| !n.is_empty()).map(normal));
        } else if let Some(rule) = item.strip_prefix("softdep=") {
            let before = rule.split_whitespace().skip_while(|w| *w != "pre:").skip(1);
            needs.soft.extend(before.take_while(|w| *w != "post:").map(normal));
        }
    }
    Some(needs)
}

/// The content of a named section of an ELF64 little-endian file (System V gABI, chapter 4).
pub fn section<'a>(elf: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    const HEADER_SIZE: usize = 64;
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let headers = number(elf, 0x28, 8)?;
    let count = number(elf, 0x3c, 2)?;
    let names = number(elf, 0x3e, 2)?;
    let header = |i: usize| {
        let start = headers.checked_add(i.checked_mul(HEADER_SIZE)?)?;
        elf.get(start..start.checked_add(HEADER_SIZE)?)
    };
    let content = |h: &[u8]| {
        let start = number(h, 0x18, 8)?;
        elf.get(start..start.checked_add(number(h, 0x20, 8)?)?)
    };
    let names = content(header(names)?)?;
    (0..count).filter_map(header).find_map(|h| {
        let name = names.get(number(h, 0, 4)?..)?;
        let name = name.split(|b| *b == 0).next()?;
        (name == wanted.as_bytes()).then(|| content(h))?
    })
}

fn number(data: &[u8], at: usize, size: usize) -> Option<usize> {
    let bytes = data.get(at..at.checked_add(size)?)?;
    let value = bytes
        .iter()
        .rev()
        .fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
    usize::try_from(value).ok()
}

/// All uncompressed modules below `dir`, by normal name.
///
/// # Errors
/// A directory cannot be read.
pub fn find(dir: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                pending.push(path);
            } else if let Some(name) = entry.file_name().to_str().and_then(|n| n.strip_suffix(".ko")) {
                found.insert(normal(name), path);
            }
        }
    }
    Ok(found)
}

/// Puts `names` and all that they need into an order in which each module comes after those that it
/// needs. `lookup` tells what a module needs, or `None` if there is no such module: then it is
/// built into the kernel, or missing, and stands in the second list.
///
/// # Errors
/// Those of `lookup`.
pub fn order(
    names: &[String],
    mut lookup: impl FnMut(&str) -> io::Result<Option<Needs>>,
) -> io::Result<(Vec<String>, Vec<String>)> {
    enum Step {
        Visit { name: String, soft: bool },
        Place(String),
    }
    let (mut ordered, mut absent, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    let visit = |soft| {
        move |name: &String| Step::Visit {
            name: normal(name),
            soft,
        }
    };
    let mut steps: Vec<_> = names.iter().rev().map(visit(false)).collect();
    while let Some(step) = steps.pop() {
        match step {
            Step::Place(name) => ordered.push(name),
            Step::Visit { name, .. } if seen.contains(&name) => {}
            Step::Visit { name, soft } => match lookup(&name)? {
                Some(needs) => {
                    seen.insert(name.clone());
                    steps.push(Step::Place(name));
                    steps.extend(needs.soft.iter().map(visit(true)));
                    steps.extend(needs.hard.iter().map(visit(false)));
                }
                // Said once, and only of modules that something cannot do without.
                None if !soft => {
                    seen.insert(name.clone());
                    absent.push(name);
                }
                None => {}
            },
        }
    }
    Ok((ordered, absent))
}

/// Loads `names` and what they need from the modules below `dir`. Gives one line for each that
/// could not be loaded; those that the kernel has already, or built in, count as loaded.
///
/// # Errors
/// The modules cannot be listed or read.
pub fn load(names: &[String], dir: &Path) -> io::Result<Vec<String>> {
    let found = find(dir)?;
    let (ordered, absent) = order(names, |name| match found.get(name) {
        Some(path) => fs::read(path).map(|data| Some(needs(&data).unwrap_or_default())),
        None => Ok(None),
    })?;
    let builtin = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
    let is_builtin = |name: &str| {
        let mut names = builtin
            .lines()
            .filter_map(|l| l.rsplit('/').next()?.strip_suffix(".ko"));
        names.any(|n| normal(n) == name) || Path::new("/sys/module").join(name).exists()
    };
    let missing = absent.iter().filter(|name| !is_builtin(name));
    let mut problems: Vec<_> = missing.map(|n| format!("there is no module {n}")).collect();
    for name in ordered {
        match File::open(&found[&name]).and_then(|file| sys::load_module(&file)) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => problems.push(format!("cannot load module {name}: {e}")),
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal module: ELF header, three section headers, names, `.modinfo`.
    fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.shstrtab\0.modinfo\0";
        let mut elf = vec![0; 64 + 3 * 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x28] = 64;
        elf[0x3c] = 3;
        elf[0x3e] = 1;
        let mut at = elf.len();
        for (i, (name, data)) in [(1, names.as_slice()), (11, modinfo)].into_iter().enumerate() {
            let header = 64 + (i + 1) * 64;
            elf[header] = name;
            elf[header + 0x18..header + 0x20].copy_from_slice(&(at as u64).to_le_bytes());
            elf[header + 0x20..header + 0x28].copy_from_slice(&(data.len() as u64).to_le_bytes());
            at += data.len();
        }
        [elf.as_slice(), names, modinfo].concat()
    }

    #[test]
    fn reads_dependencies() {
        let elf = module(b"license=GPL\0depends=virtio,virtio-ring\0softdep=pre: crc32c post: x\0");
        let expected = Needs {
            hard: vec!["virtio".into(), "virtio_ring".into()],
            soft: vec!["crc32c".into()],
        };
        assert_eq!(needs(&elf), Some(expected));
        assert_eq!(needs(&module(b"depends=\0")), Some(Needs::default()));
    }

    #[test]
    fn damaged_modules_are_none() {
        let elf = module(b"depends=a\0");
        for cut in 0..elf.len() {
            assert_eq!(needs(&elf[..cut]), None, "{cut}");
        }
        let mut elf = elf;
        elf[0x28..0x30].fill(0xff);
        assert_eq!(needs(&elf), None);
    }

    #[test]
    fn what_is_needed_comes_first() {
        let graph = |name: &str| {
            let needs = |hard: &[&str], soft: &[&str]| Needs {
                hard: hard.iter().map(|s| (*s).to_owned()).collect(),
                soft: soft.iter().map(|s| (*s).to_owned()).collect(),
            };
            Ok(Some(match name {
                "net" => needs(&["failover", "core"], &["absent_soft"]),
                "failover" => needs(&["core"], &["net"]),
                "blk" => needs(&["core", "absent"], &["net"]),
                "core" => needs(&[], &[]),
                _ => return Ok(None),
            }))
        };
        let names = ["blk".to_owned(), "net".to_owned()];
        let (ordered, absent) = order(&names, graph).unwrap();
        assert_eq!(ordered, ["core", "failover", "net", "blk"]);
        assert_eq!(absent, ["absent"]);
    }
}
