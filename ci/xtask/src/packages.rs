//! Debian packages: those the machine itself needs, and those that are only unpacked.
//!
//! The rig's QEMU and kernels come from other Debian releases than the machine's. They are found,
//! checked against the archive's signature and downloaded by the machine's own apt with its own
//! settings (proxy, credentials) but with separate lists and sources, and unpacked without being
//! installed: no maintainer script runs, nothing of the machine changes, no root is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::{cache, tools};

/// Names a mirror of the Debian archive where apt does not know one.
pub const MIRROR_VARIABLE: &str = "TRIARCH_DEBIAN_MIRROR";
/// The suites used: the second has QEMU 11.1 and newer, the third kernel 6.1.
const SUITES: [&str; 3] = ["trixie", "trixie-backports", "bookworm"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Something the machine must have.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// A program on the path, a file when it starts with a slash, or COMPILER:LIBRARY for a library that this
    /// compiler finds.
    pub file: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
    /// What it is used for.
    pub purpose: &'static str,
}

const fn need(file: &'static str, package: &'static str, purpose: &'static str) -> Need {
    Need { file, package, purpose }
}

/// What unpacking packages needs.
const UNPACK: [Need; 4] = [
    need("apt-get", "apt", "to download the host's QEMU and the kernels"),
    need("dpkg-deb", "dpkg", "to unpack them"),
    need("tar", "tar", "to unpack them"),
    need(KEYRING, "debian-archive-keyring", "to check their signatures"),
];

/// What unit tests check our work with.
pub const UNIT_TESTS: [Need; 2] = [
    need("iasl", "acpica-tools", "to take the ACPI tables apart in tests"),
    need(
        "/usr/lib/python3/dist-packages/prometheus_client/parser.py",
        "python3-prometheus-client",
        "to read the metrics in tests",
    ),
];

/// What tests of a whole VMM on this machine ask it with.
pub const PAYLOAD_TESTS: [Need; 1] = [need("curl", "curl", "to call the API in tests")];

/// What libFuzzer is compiled with.
pub const FUZZ: [Need; 1] = [need("c++", "g++", "to compile libFuzzer")];

/// What linking static programs needs.
pub const LINK: [Need; 2] = [
    need("cc", "gcc", "to link static programs"),
    need("cc:libc.a", "libc6-dev", "to link static programs"),
];

/// What linking for ARM on another machine needs.
pub const LINK_FOR_AARCH64: [Need; 2] = [
    need(
        "aarch64-linux-gnu-gcc",
        "gcc-aarch64-linux-gnu",
        "to link programs for ARM",
    ),
    need(
        "aarch64-linux-gnu-gcc:libc.a",
        "libc6-dev-arm64-cross",
        "to link programs for ARM",
    ),
];

/// The same for x86 on another machine.
pub const LINK_FOR_X86_64: [Need; 2] = [
    need(
        "x86_64-linux-gnu-gcc",
        "gcc-x86-64-linux-gnu",
        "to link programs for x86",
    ),
    need(
        "x86_64-linux-gnu-gcc:libc.a",
        "libc6-dev-amd64-cross",
        "to link programs for x86",
    ),
];

fn present(file: &str) -> bool {
    // Distributions have the static libc in different places; the compiler knows.
    if let Some((compiler, library)) = file.split_once(':') {
        let mut cc = Command::new(compiler);
        let said = tools::output(cc.arg(format!("-print-file-name={library}"))).unwrap_or_default();
        return Path::new(said.trim()).is_absolute();
    }
    match file {
        path if path.starts_with('/') => Path::new(path).exists(),
        program => tools::find(program).is_some(),
    }
}

/// Makes sure that the machine has everything in `needs`: as root on Debian missing packages are
/// installed.
///
/// # Errors
/// Something is missing and cannot be installed; the message lists each thing and why.
pub fn require(needs: &[Need]) -> Result<()> {
    let missing = |n: &&Need| !present(n.file);
    let lacking: Vec<&Need> = needs.iter().filter(missing).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    if is_root() && tools::find("apt-get").is_some() {
        install(&lacking)?;
    }
    let lacking: Vec<&Need> = needs.iter().filter(missing).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = lacking
        .iter()
        .map(|n| format!("  {} {} (Debian's package {})", n.file, n.purpose, n.package))
        .collect();
    bail!("this machine lacks:\n{}", list.join("\n"));
}

fn is_root() -> bool {
    tools::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

fn install(needs: &[&Need]) -> Result<()> {
    let mut names: Vec<&str> = needs.iter().map(|n| n.package).collect();
    names.dedup();
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["-qq", "-o", "DPkg::Lock::Timeout=120"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive");
        tools::output(&mut command).map(drop)
    };
    tools::step(&format!("installing {} with apt", names.join(", ")), || {
        apt(&["update"])?;
        let mut args = vec!["install", "-y", "--no-install-recommends"];
        args.extend(&names);
        apt(&args)
    })
}

/// The mirror of the Debian archive that this machine's apt uses.
///
/// # Errors
/// apt is not configured for a Debian archive and no mirror was named.
fn mirror() -> Result<String> {
    if let Ok(named) = std::env::var(MIRROR_VARIABLE) {
        return Ok(named.trim_end_matches('/').to_owned());
    }
    let ask = |args: &[&str]| -> Result<String> {
        let mut command = Command::new("apt-get");
        command.arg("indextargets").args(args);
        tools::output(command.args(["--format", "$(SITE) $(RELEASE) $(ORIGIN) $(LABEL)"]))
    };
    // Without downloaded lists apt knows no origin, and lists nothing unless told so.
    let (known, configured) = (ask(&[])?, ask(&["--no-release-info"])?);
    pick_mirror(&known, &configured).with_context(|| {
        format!(
            "apt on this machine has no source of the Debian archive: \
             set {MIRROR_VARIABLE} to the address of a mirror"
        )
    })
}

fn pick_mirror(known: &str, configured: &str) -> Option<String> {
    let site = |line: &str| line.split(' ').next().map(|s| s.trim_end_matches('/').to_owned());
    let by_origin = known.lines().find(|l| {
        let words: Vec<&str> = l.split(' ').collect();
        words[2..] == ["Debian", "Debian"]
    });
    let by_path = configured
        .lines()
        .find(|l| site(l).is_some_and(|s| s.ends_with("/debian")));
    by_origin.or(by_path).and_then(site)
}

/// apt with its own lists, sources and archives.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
    arch: Arch,
}

/// One apt a run and architecture, shared: its lists are fetched once.
static APT: Mutex<Vec<Apt>> = Mutex::new(Vec::new());

/// Calls `work` with an apt whose lists of packages for `arch` are fresh.
///
/// # Errors
/// The machine lacks apt, the lists cannot be fetched, or `work` failed.
pub fn with_apt<T>(arch: Arch, work: impl FnOnce(&Apt) -> Result<T>) -> Result<T> {
    let mut opened = APT.lock().unwrap_or_else(PoisonError::into_inner);
    let _one_process = cache::lock("apt")?;
    if let Some(apt) = opened.iter().find(|a| a.arch == arch) {
        return work(apt);
    }
    let apt = Apt::open(arch)?;
    let result = work(&apt);
    opened.push(apt);
    result
}

impl Apt {
    fn open(arch: Arch) -> Result<Self> {
        require(&UNPACK)?;
        let mirror = mirror()?;
        let apt = Self {
            dir: cache::base()?.join(format!("apt-{}", arch.debian())),
            arch,
        };
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(apt.dir.join(sub))?;
        }
        let source = |suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        fs::write(apt.dir.join("sources.list"), SUITES.map(source).concat())?;
        fs::write(apt.dir.join("status"), "")?;
        let what = format!(
            "reading the package lists of {} for {}",
            SUITES.join(", "),
            arch.debian()
        );
        tools::step(&what, || {
            tools::output(apt.command("apt-get").args(["-qq", "update"])).map(drop)
        })?;
        Ok(apt)
    }

    /// Settings go on the command line, where they win over the machine's own files.
    fn command(&self, program: &str) -> Command {
        let dir = |sub: &str| self.dir.join(sub).display().to_string();
        let mut command = Command::new(program);
        for (key, value) in [
            ("Dir::State", dir("state")),
            ("Dir::State::status", dir("status")),
            ("Dir::Cache", dir("cache")),
            ("Dir::Cache::archives", dir("cache/archives")),
            ("Dir::Etc::sourcelist", dir("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::Etc::preferences", "/dev/null".into()),
            ("Dir::Etc::preferencesparts", "/dev/null".into()),
            ("APT::Architecture", self.arch.debian().into()),
            ("APT::Architectures::", self.arch.debian().into()),
            ("APT::Sandbox::User", "root".into()),
            ("APT::Update::Post-Invoke::", "true".into()),
            ("Acquire::Languages", "none".into()),
            ("Acquire::Retries", "3".into()),
        ] {
            command.arg("-o").arg(format!("{key}={value}"));
        }
        command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command
    }

    /// Downloads `packages` (NAME or NAME/SUITE) with all they depend on, preferring versions of
    /// `suite`. Returns the package files.
    ///
    /// # Errors
    /// A package is not there, or the download failed.
    pub fn download_with_dependencies(&self, suite: &str, packages: &[&str]) -> Result<Vec<PathBuf>> {
        self.empty_archives()?;
        let mut command = self.command("apt-get");
        command.args(["-qq", "-y", "--no-install-recommends", "--download-only"]);
        command.args(["-t", suite, "install"]).args(packages);
        tools::output(&mut command)?;
        self.archives()
    }

    /// Downloads just `package`, in the version given.
    ///
    /// # Errors
    /// The package is not there, or the download failed.
    pub fn download_alone(&self, package: &str, version: &str) -> Result<PathBuf> {
        self.download_one(&format!("{package}={version}"))
    }

    fn download_one(&self, what: &str) -> Result<PathBuf> {
        self.empty_archives()?;
        let mut command = self.command("apt-get");
        command.args(["-qq", "download", what]);
        tools::output(command.current_dir(self.dir.join("cache/archives")))?;
        match self.archives()?.as_slice() {
            [one] => Ok(one.clone()),
            other => bail!("asked for one package, got {}", other.len()),
        }
    }

    /// Downloads just `package`, in the version of `suite`.
    ///
    /// # Errors
    /// As [`Self::download_alone`].
    pub fn download_of(&self, package: &str, suite: &str) -> Result<PathBuf> {
        self.download_one(&format!("{package}/{suite}"))
    }

    /// The records of all versions of a package, as (version, other fields' text).
    ///
    /// # Errors
    /// No such package.
    pub fn versions(&self, package: &str) -> Result<Vec<(String, String)>> {
        let mut command = self.command("apt-cache");
        let text = tools::output(command.args(["show", "--all-versions", package]))?;
        let record = |r: &str| Some((field(r, "Version")?.to_owned(), r.to_owned()));
        Ok(text.split("\n\n").filter_map(record).collect())
    }

    fn empty_archives(&self) -> Result<()> {
        for file in self.archives()? {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    fn archives(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for item in fs::read_dir(self.dir.join("cache/archives"))? {
            let path = item?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }
}

/// The one-line field `name` of a package record.
pub fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// Unpacks a package below `root`, without what no program reads. Links that stand for
/// directories (`lib -> usr/lib`) stay.
///
/// # Errors
/// The package is damaged or `root` cannot be written.
pub fn unpack(package: &Path, root: &Path) -> Result<()> {
    unpack_with(package, root, None)
}

/// Unpacks only the directory `part` of a package below `root`.
///
/// # Errors
/// As [`unpack`], or the package has no such directory.
pub fn unpack_part(package: &Path, root: &Path, part: &str) -> Result<()> {
    unpack_with(package, root, Some(&format!("./{part}")))
}

fn unpack_with(package: &Path, root: &Path, part: Option<&str>) -> Result<()> {
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb")?;
    let stream = reader.stdout.take().context("dpkg-deb has no output")?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"])
        .arg(root);
    for waste in ["doc", "man", "locale", "lintian", "info"] {
        tar.arg(format!("--exclude=./usr/share/{waste}/*"));
    }
    tar.args(part);
    let unpacked = tar.stdin(stream).status().context("cannot run tar")?;
    let read = reader.wait().context("cannot wait for dpkg-deb")?;
    if !unpacked.success() || !read.success() {
        bail!("cannot unpack {}: dpkg-deb {read}, tar {unpacked}", package.display());
    }
    Ok(())
}

/// Notes in `dir` which versions a result was made from: the mirror's newest, at that time.
///
/// # Errors
/// The note cannot be written.
pub fn record(packages: &[PathBuf], dir: &Path) -> Result<()> {
    let name = |p: &PathBuf| Some(format!("{}\n", p.file_name()?.to_string_lossy()));
    let names: String = packages.iter().filter_map(name).collect();
    Ok(fs::write(dir.join("packages.txt"), names)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_archive_not_another_source() {
        let known = "http://tools.example/apt stable Tools Tools\n\
                     http://m.example/debian-security bookworm-security Debian Debian-Security\n\
                     http://m.example/debian/ bookworm Debian Debian\n";
        assert_eq!(pick_mirror(known, ""), Some("http://m.example/debian".to_owned()));
    }

    #[test]
    fn before_the_first_update_the_address_decides() {
        let configured = "http://m.example/debian-security bookworm-security  \n\
                          http://m.example/debian bookworm  \n";
        assert_eq!(pick_mirror("", configured), Some("http://m.example/debian".to_owned()));
        assert_eq!(pick_mirror("", "http://a.example/ubuntu noble  \n"), None);
    }

    #[test]
    fn missing_things_are_named_with_their_package() {
        if is_root() {
            eprintln!("not asked as root: it would try to install the package");
            return;
        }
        let needs = [need("/nonexistent/tool", "some-package", "to do a thing")];
        let error = require(&needs).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/tool to do a thing"), "{error}");
        assert!(error.contains("some-package"), "{error}");
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let record = "Package: a\nPre-Depends: x\nDepends: y (= 1), z\n";
        assert_eq!(field(record, "Depends"), Some("y (= 1), z"));
        assert_eq!(field(record, "Version"), None);
    }

    #[test]
    fn what_is_there_needs_nothing() {
        require(&[need("sh", "dash", "to run"), need("/proc", "none", "to look")]).unwrap();
    }
}
