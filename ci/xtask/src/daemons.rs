//! The daemons of others that tests start: Debian's, unpacked and run without being installed.
//!
//! Of each, only its programs and the libraries that they name are kept, in one directory, so that it can be put on an emulated host, which
//! has none of its own. A script beside that directory becomes the program when it is run.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use triarch_guest_init::modules;

use crate::arch::Arch;
use crate::cache::{self, Recipe};
use crate::packages;
use crate::root::{self, Root};

/// Changes whenever this file makes something else from the same packages.
const SCRIPT: &str = "2";
/// Entries of the dynamic section (System V gABI, chapter 5): a library that is needed, by the offset of its name.
const DT_NEEDED: u64 = 1;

/// A daemon of Debian's.
pub struct Daemon {
    /// What it is called, and the directory of its parts without `.d`.
    pub name: &'static str,
    /// Its packages, each with its suite where that is not the newest one.
    packages: &'static [&'static str],
    /// What else it is made of, beside the libraries that its packages want; without any, all that these depend on.
    others: &'static [&'static str],
    /// The programs in them: tests call each by the name of its file.
    programs: &'static [&'static str],
    /// Libraries that they load without naming them, below the directory of libraries.
    plugins: &'static [&'static str],
    /// Files that they read, which are put beside them.
    data: &'static [&'static str],
    /// What is in the names of tests that start it.
    tests: &'static str,
}

/// What serves disks over vhost-user.
const STORAGE: Daemon = Daemon {
    name: "qemu-storage-daemon",
    packages: &["qemu-utils"],
    others: &[],
    programs: &["usr/bin/qemu-storage-daemon"],
    plugins: &[],
    data: &[],
    tests: "vhost::",
};

/// What serves file systems.
const FILES: Daemon = Daemon {
    name: "virtiofsd",
    packages: &["virtiofsd/trixie"],
    others: &[],
    programs: &["usr/libexec/virtiofsd"],
    plugins: &[],
    data: &[],
    tests: "vhost_fs::",
};

/// What forwards packets from one guest to another. Its package depends on all of DPDK's headers: what has the libraries is enough.
const SWITCH: Daemon = Daemon {
    name: "dpdk-testpmd",
    packages: &["dpdk-dev/trixie"],
    others: &["librte-net-vhost25", "librte-mempool-ring25"],
    programs: &["usr/bin/dpdk-testpmd"],
    plugins: &[
        "dpdk/pmds-25.0/librte_net_vhost.so.25",
        "dpdk/pmds-25.0/librte_mempool_ring.so.25",
    ],
    data: &[],
    tests: "vhost_net::",
};

/// Open vSwitch with DPDK: its database, its switch, and what gives it orders. Its packages depend on Python and services.
const OPEN_VSWITCH: Daemon = Daemon {
    name: "openvswitch",
    packages: &[
        "openvswitch-switch-dpdk/trixie",
        "openvswitch-switch/trixie",
        "openvswitch-common/trixie",
    ],
    others: &["librte-mempool-ring25"],
    programs: &[
        "usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk",
        "usr/sbin/ovsdb-server",
        "usr/bin/ovsdb-tool",
        "usr/bin/ovs-vsctl",
    ],
    plugins: &["dpdk/pmds-25.0/librte_mempool_ring.so.25"],
    data: &["usr/share/openvswitch/vswitch.ovsschema"],
    tests: "ovs::",
};

/// What gives a guest the network that a program of the host has.
const SOCKETS: Daemon = Daemon {
    name: "passt",
    packages: &["passt"],
    others: &[],
    programs: &["usr/bin/passt"],
    plugins: &[],
    data: &[],
    tests: "passt::",
};

/// All of them.
const ALL: [&Daemon; 5] = [&STORAGE, &FILES, &SWITCH, &OPEN_VSWITCH, &SOCKETS];

/// QEMU's storage daemon and the tools beside it, with all of their packages.
///
/// # Errors
/// A package cannot be downloaded or unpacked.
pub fn root() -> Result<Root> {
    Root::get("root-daemons", STORAGE.packages)
}

/// A switch that looks for packets all the time, DPDK's, made to run from `dir`; its program.
///
/// # Errors
/// A package cannot be downloaded or unpacked.
pub fn testpmd(dir: &Path) -> Result<PathBuf> {
    SWITCH.provide(dir)?;
    Ok(dir.join(SWITCH.name))
}

/// The daemons that some of `tests` start.
pub fn of_tests(tests: &[&String]) -> impl Iterator<Item = &'static Daemon> {
    let is_for = |daemon: &&Daemon| tests.iter().any(|name| name.contains(daemon.tests));
    ALL.into_iter().filter(is_for)
}

impl Daemon {
    /// Puts its scripts into `dir`, where tests on this machine find them.
    ///
    /// # Errors
    /// A package cannot be downloaded or unpacked.
    pub fn provide(&self, dir: &Path) -> Result<()> {
        let made = self.get(Arch::native())?;
        for script in self.scripts()? {
            fs::copy(made.join(script), dir.join(script))?;
        }
        let parts = self.parts();
        Ok(symlink(made.join(&parts), dir.join(&parts))?)
    }

    /// What makes it run on a host of `arch`: name, permission bits, source.
    ///
    /// # Errors
    /// As [`Daemon::provide`].
    pub fn files(&self, arch: Arch) -> Result<Vec<(String, u32, PathBuf)>> {
        let made = self.get(arch)?;
        let scripts = self.scripts()?.into_iter();
        let mut files: Vec<_> = scripts
            .map(|script| (script.to_owned(), 0o755, made.join(script)))
            .collect();
        let parts = self.parts();
        for item in fs::read_dir(made.join(&parts))? {
            let path = item?.path();
            files.push((format!("{parts}/{}", file_name(&path)?), 0o755, path));
        }
        Ok(files)
    }

    /// The directory with its programs and libraries, beside its scripts.
    fn parts(&self) -> String {
        format!("{}.d", self.name)
    }

    /// The scripts: one for each program.
    fn scripts(&self) -> Result<Vec<&'static str>> {
        let names = self.programs.iter().map(|program| file_name(Path::new(*program)));
        names.collect()
    }

    /// Where its scripts and its parts are, made once.
    fn get(&self, arch: Arch) -> Result<PathBuf> {
        let recipe = Recipe::new(&format!("daemon-{}-{}", self.name, arch.debian()))
            .with("script", SCRIPT)
            .with("suite", root::SUITE)
            .with("package", &self.packages.join(" "))
            .with("others", &self.others.join(" "))
            .with("program", &self.programs.join(" "))
            .with("plugins", &self.plugins.join(" "))
            .with("data", &self.data.join(" "));
        cache::ensure(&recipe, |dir| self.make(arch, dir))
    }

    fn unpack(&self, arch: Arch, dir: &Path) -> Result<()> {
        if self.others.is_empty() {
            return root::unpack_into(arch, dir, self.packages);
        }
        let mut names: Vec<String> = self.others.iter().map(|&name| name.to_owned()).collect();
        let mut alone = Vec::new();
        for (n, package) in self.packages.iter().enumerate() {
            // The next download empties the directory.
            let kept = dir.join(format!("package{n}"));
            names.extend(package_alone(arch, package, &kept)?);
            alone.push(kept);
        }
        // What comes with the others, or is taken alone, is not to be had twice.
        let taken: Vec<&str> = self.packages.iter().map(|package| suite_of(package).0).collect();
        names.retain(|name| !taken.contains(&name.as_str()));
        names.sort();
        names.dedup();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        root::unpack_into(arch, dir, &names)?;
        alone.iter().try_for_each(|package| packages::unpack(package, dir))
    }

    fn make(&self, arch: Arch, dir: &Path) -> Result<()> {
        let scratch = tempfile::tempdir_in(cache::base()?)?;
        self.unpack(arch, scratch.path())?;
        fs::copy(scratch.path().join("packages.txt"), dir.join("packages.txt"))?;
        let parts = dir.join(self.parts());
        fs::create_dir(&parts)?;
        let plugins = self
            .plugins
            .iter()
            .map(|plugin| format!("{}/{plugin}", arch.libraries()));
        let programs = self.programs.iter().map(|&program| program.to_owned());
        let mut files = closure(scratch.path(), arch, &programs.chain(plugins).collect::<Vec<_>>())?;
        for data in self.data {
            files.insert(file_name(Path::new(*data))?.to_owned(), scratch.path().join(data));
        }
        for (name, source) in files {
            let place = parts.join(name);
            fs::copy(&source, &place).with_context(|| format!("cannot copy {}", source.display()))?;
        }
        let loader = file_name(Path::new(arch.loader()))?;
        for program in self.scripts()? {
            let script = dir.join(program);
            let parts = self.parts();
            let text = format!(
                "#!/bin/sh\nhere=${{0%/*}}/{parts}\nexec \"$here/{loader}\" --library-path \"$here\" \"$here/{program}\" \"$@\"\n"
            );
            fs::write(&script, text)?;
            fs::set_permissions(script, Permissions::from_mode(0o755))?;
        }
        Ok(())
    }
}

/// Downloads a package without what it depends on and keeps it at `place`; the libraries that it wants.
fn package_alone(arch: Arch, package: &str, place: &Path) -> Result<Vec<String>> {
    let (name, suite) = suite_of(package);
    packages::with_apt(arch, |apt| {
        let file = apt.download_of(name, suite)?;
        fs::copy(&file, place)?;
        let versions = apt.versions(name)?;
        let version = file_name(&file)?.split('_').nth(1).unwrap_or_default();
        let version = version.replace("%3a", ":").replace("%2b", "+");
        let record = versions.iter().find(|(v, _)| *v == version);
        let record = record.with_context(|| format!("no record of {name} {version}"))?;
        Ok(libraries(packages::field(&record.1, "Depends").unwrap_or_default()))
    })
}

/// A package's name and its suite.
fn suite_of(package: &str) -> (&str, &str) {
    package.split_once('/').unwrap_or((package, root::SUITE))
}

/// The last part of a path.
fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.with_context(|| format!("{} has no name", path.display()))
}

/// These files, their loader and all libraries that they name, by the name under which they are looked for.
fn closure(root: &Path, arch: Arch, files: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut pending: Vec<PathBuf> = files.iter().map(|file| root.join(file)).collect();
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

/// The packages with libraries in a list of dependencies (Debian policy, section 7.1): those whose names begin as libraries' do, and which
/// are not for compiling.
fn libraries(depends: &str) -> Vec<String> {
    let names = depends.split(',').filter_map(|item| item.split_whitespace().next());
    let is_library = |name: &&str| name.starts_with("lib") && !name.ends_with("-dev");
    names.filter(is_library).map(str::to_owned).collect()
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

    /// A program of every machine, which is linked dynamically. Tests themselves may be static.
    const DYNAMIC: &str = "/bin/sh";

    #[test]
    fn a_program_names_its_libraries() {
        let names = needed(&fs::read(DYNAMIC).unwrap()).unwrap();
        assert!(names.iter().any(|name| name.starts_with("libc.so")), "{names:?}");
        assert_eq!(needed(b"#!/bin/sh\n"), None);
    }

    #[test]
    fn libraries_are_told_from_what_compilers_need() {
        let depends = "libdpdk-dev (>= 24.11), python3, ibverbs-providers (>= 23~), libc6 (>= 2.38), librte-acl25";
        assert_eq!(libraries(depends), ["libc6", "librte-acl25"]);
    }

    #[test]
    fn a_missing_library_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::copy(DYNAMIC, root.path().join("program")).unwrap();
        let error = closure(root.path(), Arch::native(), &["program".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(".so") && error.contains("none of the packages"),
            "{error}"
        );
    }
}
