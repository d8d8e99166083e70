//! Rust's standard library for another architecture than the machine's.
//!
//! Where the toolchain has it (`rustup target add`), nothing is done. Else it is compiled once from the sources that
//! Debian packages, in exactly the compiler's own version, into a directory that rustc takes as its sysroot. The
//! toolchain itself is not touched, and after that every build is an ordinary one, with a stable compiler.
//!
//! Debian keeps the sources of some versions only. Where the compiler's is not among them, Debian's own compiler and
//! its compiled library for the other architecture are unpacked and used instead.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::cache::{self, Recipe};
use crate::{packages, root, tools};

/// Changes whenever this file makes something else from the same sources.
const SCRIPT: &str = "3";
const PACKAGE: &str = "rust-src";
/// What programs and their tests link.
const CRATES: &str = "-Zbuild-std=std,panic_abort,panic_unwind,proc_macro,test";

/// Debian's compiler, and its library for one architecture.
const COMPILER: &str = "rustc";
const COMPILED: &str = "libstd-rust-dev";
/// In the result: what starts Debian's compiler.
const STARTER: &str = "rustc";

/// Where the library for an architecture is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Library {
    /// In the toolchain.
    Installed,
    /// In this directory, to be given to rustc as `--sysroot`.
    Sysroot(PathBuf),
    /// Beside another compiler, this one.
    Compiler(PathBuf),
}

/// Finds or makes the library for `arch`.
///
/// # Errors
/// What it takes is not on the mirror, or does not compile.
pub fn get(arch: Arch) -> Result<Library> {
    if arch == Arch::native() || installed(arch)? {
        return Ok(Library::Installed);
    }
    let compiler = tools::output(rustc().arg("-vV"))?;
    let recipe = Recipe::new(&format!("std-{arch}"))
        .with("script", SCRIPT)
        .with("compiler", &compiler.trim().replace('\n', ", "))
        .with("crates", CRATES);
    let dir = cache::ensure(&recipe, |dir| make(dir, arch, &compiler))?;
    let starter = dir.join(STARTER);
    if starter.exists() {
        return Ok(Library::Compiler(starter));
    }
    Ok(Library::Sysroot(dir))
}

fn rustc() -> Command {
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.current_dir(tools::top());
    command
}

/// Whether the toolchain comes with the library for `arch`.
fn installed(arch: Arch) -> Result<bool> {
    let said = tools::output(rustc().args(["--print", "target-libdir", "--target", arch.target()]))?;
    let items = fs::read_dir(said.trim()).into_iter().flatten().flatten();
    let is_std = |name: &str| name.starts_with("libstd-") && name.ends_with(".rlib");
    Ok(items.into_iter().any(|i| is_std(&i.file_name().to_string_lossy())))
}

fn make(dir: &Path, arch: Arch, compiler: &str) -> Result<()> {
    let release = release(compiler).context("rustc does not say its version")?;
    let scratch = tempfile::tempdir_in(cache::base()?)?;
    let Some(library) = sources(release, scratch.path(), dir)? else {
        return debians_compiler(dir, arch);
    };
    let what = format!("compiling the standard library {release} for {arch}");
    let deps = tools::step(&what, || compile(arch, &library, scratch.path()))?;
    let place = dir.join("lib/rustlib").join(arch.target()).join("lib");
    fs::create_dir_all(&place)?;
    for item in fs::read_dir(&deps)? {
        let path = item?.path();
        let name = path.file_name().unwrap_or_default();
        let ours = name.to_string_lossy().starts_with(&format!("lib{EMPTY}-"));
        if path.extension().is_some_and(|e| e == "rlib") && !ours {
            fs::copy(&path, place.join(name))?;
        }
    }
    Ok(())
}

/// `1.95.0` in what `rustc -vV` says.
fn release(compiler: &str) -> Option<&str> {
    packages::field(compiler, "release").filter(|number| !number.is_empty())
}

/// Unpacks the library's sources of that release; returns their directory, or nothing when the mirror has no such
/// sources.
fn sources(release: &str, scratch: &Path, dir: &Path) -> Result<Option<PathBuf>> {
    let top = format!("usr/src/rustc-{release}/library");
    packages::with_apt(Arch::native(), |apt| {
        let records = apt.versions(PACKAGE)?;
        let Some(number) = matching(release, &records) else {
            eprintln!("  {}", absent(release, &records));
            return Ok(None);
        };
        let what = format!("downloading {PACKAGE} {number}");
        let file = tools::step(&what, || apt.download_alone(PACKAGE, &number))?;
        tools::step(&format!("unpacking {PACKAGE}"), || {
            packages::unpack_part(&file, scratch, &top)
        })?;
        packages::record(&[file], dir)?;
        Ok(Some(scratch.join(&top)))
    })
}

/// The package's version that has the sources of `release`.
fn matching(release: &str, records: &[(String, String)]) -> Option<String> {
    let start = format!("{release}+");
    let mut numbers = records.iter().map(|(number, _)| number);
    numbers.find(|number| number.starts_with(&start)).cloned()
}

fn absent(release: &str, records: &[(String, String)]) -> String {
    let mut there: Vec<&str> = records.iter().filter_map(|(n, _)| n.split('+').next()).collect();
    there.dedup();
    format!(
        "this machine's rustc is {release}, and the mirror has sources of the standard library only for {}: \
         Debian's own compiler is used instead",
        there.join(", ")
    )
}

/// Unpacks Debian's compiler with its library for this machine and for `arch`, and a script that starts it from
/// wherever `dir` will lie.
fn debians_compiler(dir: &Path, arch: Arch) -> Result<()> {
    let root = dir.join("root");
    fs::create_dir(&root)?;
    let newest = packages::with_apt(Arch::native(), |apt| Ok(apt.versions(COMPILER)?.into_iter().next()))?;
    let (number, _) = newest.context("the mirror has no rustc")?;
    // What the compiler itself loads comes with the library for this machine. What it depends on beyond that is a
    // linker, which the machine has.
    root::unpack_into(Arch::native(), &root, &[&format!("{COMPILED}={number}")])?;
    packages::with_apt(Arch::native(), |apt| {
        let what = format!("downloading {COMPILER} {number}");
        let file = tools::step(&what, || apt.download_alone(COMPILER, &number))?;
        packages::unpack(&file, &root)
    })?;
    packages::with_apt(arch, |apt| {
        let what = format!("downloading {COMPILED} {number} for {}", arch.debian());
        let file = tools::step(&what, || apt.download_alone(COMPILED, &number))?;
        packages::unpack_part(&file, &root, "usr/lib/rustlib")
    })?;
    let native = Arch::native();
    let script = format!(
        "#!/bin/sh\nroot=${{0%/*}}/root\n\
         exec \"$root/{}\" --library-path \"$root/{}\" \"$root/usr/bin/rustc\" \"$@\"\n",
        native.loader(),
        native.libraries()
    );
    write_program(&dir.join(STARTER), &script)
}

fn write_program(file: &Path, script: &str) -> Result<()> {
    fs::write(file, script)?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}

/// Name of a crate with nothing in it, which makes cargo build the library for it.
const EMPTY: &str = "empty";

/// Goes before the compiler: that one crate, with which programs end at a panic, has to do so itself. Rust's own
/// build does the same.
const WRAPPER: &str = r#"#!/bin/sh
case " $* " in
*" --crate-name panic_abort "*) exec "$@" -Cpanic=abort ;;
*) exec "$@" ;;
esac
"#;

/// Compiles the library; returns the directory with its parts.
fn compile(arch: Arch, library: &Path, scratch: &Path) -> Result<PathBuf> {
    let package = scratch.join(EMPTY);
    fs::create_dir_all(package.join("src"))?;
    let manifest = format!("[package]\nname = \"{EMPTY}\"\nedition = \"2024\"\n[workspace]\n");
    fs::write(package.join("Cargo.toml"), manifest)?;
    fs::write(package.join("src/lib.rs"), "")?;
    let wrapper = scratch.join("rustc");
    write_program(&wrapper, WRAPPER)?;
    let target = scratch.join("target");
    let mut cargo = tools::cargo();
    tools::without_flags(&mut cargo).current_dir(&package);
    cargo
        .args(["build", "--release", CRATES, "--target", arch.target()])
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTC_WRAPPER", &wrapper)
        // Cargo's own way to compile its library with a stable compiler, and from sources elsewhere.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", library)
        // What the library has beside its stable interface stays closed, and fat LTO can look into it.
        .env("RUSTFLAGS", "-Zforce-unstable-if-unmarked -Cembed-bitcode=yes");
    tools::output(&mut cargo)?;
    Ok(target.join(arch.target()).join("release/deps"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(numbers: &[&str]) -> Vec<(String, String)> {
        numbers.iter().map(|n| ((*n).to_owned(), String::new())).collect()
    }

    #[test]
    fn only_the_compiler_s_own_version_will_do() {
        let there = records(&["1.96.1+dfsg1-2~bpo13+1", "1.95.0+dfsg1-2~bpo13+1", "1.85.1+dfsg1-1"]);
        assert_eq!(matching("1.95.0", &there).as_deref(), Some("1.95.0+dfsg1-2~bpo13+1"));
        for other in ["1.95", "1.95.1", "1.97.0-nightly"] {
            assert_eq!(matching(other, &there), None, "{other}");
        }
        let said = absent("1.95.1", &there);
        assert!(
            said.contains("1.95.1") && said.contains("only for 1.96.1, 1.95.0, 1.85.1"),
            "{said}"
        );
    }

    #[test]
    fn the_release_is_read() {
        assert_eq!(release("rustc 1.95.0 (x)\nrelease: 1.95.0\n"), Some("1.95.0"));
        assert_eq!(release("release:\n"), None);
        assert_eq!(release(""), None);
    }

    #[test]
    fn the_machine_s_own_architecture_needs_nothing() {
        assert!(installed(Arch::native()).unwrap());
        assert_eq!(get(Arch::native()).unwrap(), Library::Installed);
    }
}
