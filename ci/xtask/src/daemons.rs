//! The daemons of others that tests start: Debian's, unpacked and run without being installed.
//!
//! Of each, only its program and the libraries that it names are kept, in one directory, so that it can be put on an emulated host, which
//! has none of its own. A script beside that directory becomes the daemon when it is run.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use triarch_guest_init::modules;

use crate::arch::Arch;
use crate::cache::{self, Recipe};
use crate::root::{self, Root};

/// Changes whenever this file makes something else from the same packages.
const SCRIPT: &str = "1";
/// Entries of the dynamic section (System V gABI, chapter 5): a library that is needed, by the offset of its name.
const DT_NEEDED: u64 = 1;

/// A daemon of Debian's.
struct Daemon {
    /// What tests call it.
    name: &'static str,
    /// The package, and its suite where that is not the newest one.
    package: &'static str,
    /// The program in it.
    program: &'static str,
}

/// What serves disks over vhost-user.
const STORAGE: Daemon = Daemon {
    name: "qemu-storage-daemon",
    package: "qemu-utils",
    program: "usr/bin/qemu-storage-daemon",
};

/// All of them.
const ALL: [Daemon; 1] = [STORAGE];

/// QEMU's storage daemon and the tools beside it, with all of their packages.
///
/// # Errors
/// A package cannot be downloaded or unpacked.
pub fn root() -> Result<Root> {
    Root::get("root-daemons", &[STORAGE.package])
}

/// Puts a script for each daemon into `dir`, where tests on this machine find it.
///
/// # Errors
/// A package cannot be downloaded or unpacked.
pub fn provide(dir: &Path) -> Result<()> {
    for daemon in &ALL {
        let made = daemon.get(Arch::native())?;
        fs::copy(made.join(daemon.name), dir.join(daemon.name))?;
        let parts = daemon.parts();
        symlink(made.join(&parts), dir.join(&parts))?;
    }
    Ok(())
}

/// What makes the daemons run on a host of `arch`: name, permission bits, source.
///
/// # Errors
/// As [`provide`].
pub fn files(arch: Arch) -> Result<Vec<(String, u32, PathBuf)>> {
    let mut files = Vec::new();
    for daemon in &ALL {
        let made = daemon.get(arch)?;
        files.push((daemon.name.to_owned(), 0o755, made.join(daemon.name)));
        let parts = daemon.parts();
        for item in fs::read_dir(made.join(&parts))? {
            let path = item?.path();
            let file = path
                .file_name()
                .and_then(|n| n.to_str())
                .context("a name is not UTF-8")?;
            files.push((format!("{parts}/{file}"), 0o755, path));
        }
    }
    Ok(files)
}

impl Daemon {
    /// The directory with its program and libraries, beside its script.
    fn parts(&self) -> String {
        format!("{}.d", self.name)
    }

    /// Where its script and its parts are, made once.
    fn get(&self, arch: Arch) -> Result<PathBuf> {
        let recipe = Recipe::new(&format!("daemon-{}-{}", self.name, arch.debian()))
            .with("script", SCRIPT)
            .with("suite", root::SUITE)
            .with("package", self.package)
            .with("program", self.program);
        cache::ensure(&recipe, |dir| self.make(arch, dir))
    }

    fn make(&self, arch: Arch, dir: &Path) -> Result<()> {
        let scratch = tempfile::tempdir_in(cache::base()?)?;
        root::unpack_into(arch, scratch.path(), &[self.package])?;
        fs::copy(scratch.path().join("packages.txt"), dir.join("packages.txt"))?;
        let parts = dir.join(self.parts());
        fs::create_dir(&parts)?;
        let loader = Path::new(arch.loader()).file_name().and_then(|n| n.to_str());
        let loader = loader.context("the loader has no name")?;
        for (name, source) in closure(scratch.path(), arch, self.program)? {
            let place = parts.join(name);
            fs::copy(&source, &place).with_context(|| format!("cannot copy {}", source.display()))?;
        }
        let program = Path::new(self.program).file_name().and_then(|n| n.to_str());
        let program = program.context("the program has no name")?;
        let script = dir.join(self.name);
        let parts = self.parts();
        let text = format!(
            "#!/bin/sh\nhere=${{0%/*}}/{parts}\nexec \"$here/{loader}\" --library-path \"$here\" \"$here/{program}\" \"$@\"\n"
        );
        fs::write(&script, text)?;
        Ok(fs::set_permissions(script, Permissions::from_mode(0o755))?)
    }
}

/// The program, its loader and all libraries that they name, by the name under which they are looked for.
fn closure(root: &Path, arch: Arch, program: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.join(program)];
    while let Some(path) = pending.pop() {
        let name = path.file_name().and_then(|n| n.to_str());
        let name = name.context("a library's name is not UTF-8")?.to_owned();
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let needed = needed(&bytes).with_context(|| format!("{} names no libraries", path.display()))?;
        found.insert(name, path);
        for library in needed.into_iter().filter(|library| !found.contains_key(library)) {
            let places = [arch.libraries(), "usr/lib"].map(|dir| root.join(dir).join(&library));
            match places.into_iter().find(|place| place.exists()) {
                Some(place) => pending.push(place),
                None => bail!("{library} is in none of the packages"),
            }
        }
    }
    let loader = root.join(arch.loader());
    let name = loader
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default()
        .to_owned();
    found.entry(name).or_insert(loader);
    Ok(found)
}

/// The libraries that an ELF file names; none for one that is linked statically.
fn needed(elf: &[u8]) -> Option<Vec<String>> {
    let Some(dynamic) = modules::section(elf, ".dynamic") else {
        return modules::section(elf, ".shstrtab").map(|_| Vec::new());
    };
    let strings = modules::section(elf, ".dynstr")?;
    let word = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
    let mut names = Vec::new();
    for entry in dynamic.chunks_exact(16) {
        if word(&entry[..8])? == DT_NEEDED {
            let name = strings.get(usize::try_from(word(&entry[8..])?).ok()?..)?;
            let name = name.split(|b| *b == 0).next()?;
            names.push(String::from_utf8(name.to_vec()).ok()?);
        }
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_names_its_libraries() {
        // Programs of tests are linked dynamically.
        let us = fs::read(std::env::current_exe().unwrap()).unwrap();
        let names = needed(&us).unwrap();
        assert!(names.iter().any(|name| name.starts_with("libc.so")), "{names:?}");
        assert_eq!(needed(b"#!/bin/sh\n"), None);
    }

    #[test]
    fn a_missing_library_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::copy(std::env::current_exe().unwrap(), root.path().join("program")).unwrap();
        let error = closure(root.path(), Arch::native(), "program").unwrap_err().to_string();
        assert!(
            error.contains(".so") && error.contains("none of the packages"),
            "{error}"
        );
    }
}
