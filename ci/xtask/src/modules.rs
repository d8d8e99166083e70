//! Kernel modules: which one needs which, and in what order they load.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use triarch_guest_init::modules as guest;

use crate::root::Root;
use crate::tools;

const BUILTIN: &str = "modules.builtin";

/// The modules of one kernel, by name.
#[derive(Debug)]
pub struct Set {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// The module's name in `kernel/drivers/char/hw_random/virtio-rng.ko.xz`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".xz").unwrap_or(file).strip_suffix(".ko")?;
    Some(guest::normal(stem))
}

impl Set {
    /// What [`flatten`] wrote to `dir`.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn flat(dir: &Path) -> Result<Self> {
        Self::read(dir)
    }

    /// All modules below `dir`.
    fn read(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut pending = vec![dir.to_path_buf()];
        while let Some(next) = pending.pop() {
            let items = fs::read_dir(&next);
            for item in items.with_context(|| format!("cannot read {}", next.display()))? {
                let path = item?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = name_of(&path) {
                    files.insert(name, path);
                }
            }
        }
        let builtin = fs::read_to_string(dir.join(BUILTIN)).context("no list of built-in modules")?;
        let builtin = builtin.lines().filter_map(|l| name_of(Path::new(l))).collect();
        Ok(Self { files, builtin })
    }

    /// The files of `names` and their dependencies, each after those it needs.
    ///
    /// # Errors
    /// A module is neither there nor built in.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        self.order(names, &|path| Ok(fs::read(path)?))
    }

    fn order(&self, names: &[&str], read: &dyn Fn(&Path) -> Result<Vec<u8>>) -> Result<Vec<PathBuf>> {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let needs = |name: &str| {
            let Some(path) = self.files.get(name) else {
                return Ok(None);
            };
            let bytes = read(path).map_err(|e| io::Error::other(format!("{}: {e:#}", path.display())))?;
            guest::needs(&bytes)
                .map(Some)
                .ok_or_else(|| io::Error::other(format!("{} is no module", path.display())))
        };
        let (ordered, absent) = guest::order(&names, needs)?;
        if let Some(name) = absent.iter().find(|n| !self.builtin.contains(*n)) {
            bail!("this kernel has no module {name}");
        }
        Ok(ordered.iter().filter_map(|n| self.files.get(n).cloned()).collect())
    }
}

/// Copies the modules `wanted` that the kernel under `from` has, with all they depend on,
/// uncompressed into the one directory `to`, and the list of what is built in.
///
/// # Errors
/// A module that another one depends on is missing, or files cannot be read or written.
pub fn flatten(from: &Path, wanted: &[&str], to: &Path, root: &Root) -> Result<()> {
    let set = Set::read(from)?;
    let read = |path: &Path| {
        if path.extension().is_some_and(|e| e == "xz") {
            let mut xz = root.command("usr/bin/xz");
            return tools::output_bytes(xz.args(["-d", "-c"]).arg(path));
        }
        Ok(fs::read(path)?)
    };
    // Not every kernel has every module; who asks for it later is told.
    let there = |n: &&&str| set.files.contains_key(&guest::normal(n));
    let wanted: Vec<&str> = wanted.iter().filter(there).copied().collect();
    let order = set.order(&wanted, &read)?;
    fs::create_dir(to)?;
    fs::copy(from.join(BUILTIN), to.join(BUILTIN))?;
    for path in order {
        let name = name_of(&path).context("a module without a name")?;
        fs::write(to.join(format!("{name}.ko")), read(&path)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least that counts as a module: ELF header, three section headers, names, `.modinfo`.
    fn module(depends: &str) -> Vec<u8> {
        let names = b"\0.shstrtab\0.modinfo\0";
        let info = format!("license=GPL\0depends={depends}\0");
        let mut elf = vec![0; 256];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x28] = 64;
        elf[0x3c] = 3;
        elf[0x3e] = 1;
        let mut at = 256_usize;
        for (n, (name, size)) in [(1, names.len()), (11, info.len())].into_iter().enumerate() {
            let header = 128 + n * 64;
            elf[header] = name;
            elf[header + 0x18..header + 0x20].copy_from_slice(&at.to_le_bytes());
            elf[header + 0x20..header + 0x28].copy_from_slice(&size.to_le_bytes());
            at += size;
        }
        [elf.as_slice(), names, info.as_bytes()].concat()
    }

    fn set(modules: &[(&str, &str)]) -> (tempfile::TempDir, Set) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(BUILTIN), "kernel/fs/ext4/ext4.ko\n").unwrap();
        for (name, needs) in modules {
            fs::write(dir.path().join(format!("{name}.ko")), module(needs)).unwrap();
        }
        let set = Set::flat(dir.path()).unwrap();
        (dir, set)
    }

    fn names(paths: &[PathBuf]) -> Vec<String> {
        paths.iter().filter_map(|p| name_of(p)).collect()
    }

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let (_dir, set) = set(&[
            ("kvm-amd", "kvm,ccp"),
            ("kvm", "irqbypass"),
            ("irqbypass", ""),
            ("ccp", ""),
            ("tun", ""),
        ]);
        let order = names(&set.closure(&["kvm_amd", "kvm", "ext4"]).unwrap());
        assert_eq!(order, ["ccp", "irqbypass", "kvm", "kvm_amd"]);
    }

    #[test]
    fn an_unknown_module_is_an_error() {
        let (_dir, set) = set(&[("a", "gone")]);
        let error = |n| set.closure(&[n]).unwrap_err().to_string();
        assert_eq!(error("nothing"), "this kernel has no module nothing");
        assert_eq!(error("a"), "this kernel has no module gone");
    }

    #[test]
    fn names_ignore_directory_dash_and_compression() {
        let name = |p: &str| name_of(Path::new(p));
        assert_eq!(name("kernel/x/virtio-rng.ko.xz"), Some("virtio_rng".into()));
        assert_eq!(name("kernel/x/tun.ko"), Some("tun".into()));
        assert_eq!(name("modules.order"), None);
    }
}
