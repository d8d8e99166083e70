//! Things made once and used many times: `target/rig/NAME-KEY`.
//!
//! The key is a hash of the recipe, so a changed recipe never finds the old result. A result is
//! made beside its place and renamed when it is whole, and carries a manifest of its files and
//! their sizes, so a half-made or damaged one is never used.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::tools;

const MANIFEST: &str = "manifest.txt";
const RECIPE: &str = "recipe.txt";
/// Results of other recipes under the same name are removed when they are older.
const KEEP: Duration = Duration::from_secs(24 * 3600);

/// What a result is made from. Everything that changes the result belongs in it.
#[derive(Debug, Clone)]
pub struct Recipe {
    name: String,
    lines: Vec<String>,
}

impl Recipe {
    /// A recipe for the result called `name`, which is part of its directory's name.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            lines: Vec::new(),
        }
    }

    /// Adds one ingredient: a package with its suite, a version of the script, ...
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.lines.push(format!("{key}: {value}"));
        self
    }

    /// Adds a file as an ingredient, by its content.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn with_file(self, key: &str, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.with(key, &format!("{} bytes {:016x}", bytes.len(), hash(&bytes))))
    }

    fn text(&self) -> String {
        self.lines.join("\n") + "\n"
    }

    fn directory(&self) -> String {
        format!("{}-{:016x}", self.name, hash(self.text().as_bytes()))
    }
}

/// FNV-1a with 64 bits: the keys guard against mistakes, not against an attacker.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The directory of all cached things; it is made when missing.
///
/// # Errors
/// It cannot be made.
pub fn base() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || tools::top().join("target"),
        |dir| tools::top().join(PathBuf::from(dir)),
    );
    let base = target.join("rig");
    fs::create_dir_all(&base).with_context(|| format!("cannot make {}", base.display()))?;
    Ok(base)
}

/// Waits for, and holds, the lock called `name` until the file is dropped.
///
/// # Errors
/// The lock file cannot be made or locked.
pub fn lock(name: &str) -> Result<File> {
    let path = base()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// The directory that holds the result of `recipe`. `make` is called with an empty directory when
/// there is no such result yet, or only a damaged one.
///
/// # Errors
/// `make` failed, or the directory cannot be written.
pub fn ensure(recipe: &Recipe, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    ensure_in(&base()?, recipe, make)
}

fn ensure_in(base: &Path, recipe: &Recipe, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let place = base.join(recipe.directory());
    let lock = base.join(format!("{}.lock", recipe.name));
    let lock = File::create(&lock).with_context(|| format!("cannot make {}", lock.display()))?;
    lock.lock().context("cannot lock the cache")?;
    if place.exists() {
        match check(&place, recipe) {
            Ok(()) => return Ok(place),
            Err(why) => eprintln!("  {} is made again: {why:#}", place.display()),
        }
        remove(&place)?;
    }
    let making = base.join(format!(".making-{}", recipe.name));
    remove(&making)?;
    fs::create_dir(&making).with_context(|| format!("cannot make {}", making.display()))?;
    make(&making)?;
    fs::write(making.join(RECIPE), recipe.text())?;
    fs::write(making.join(MANIFEST), manifest(&making)?)?;
    fs::rename(&making, &place)
        .with_context(|| format!("cannot rename {} to {}", making.display(), place.display()))?;
    prune(base, recipe, &place);
    Ok(place)
}

fn check(place: &Path, recipe: &Recipe) -> Result<()> {
    if fs::read_to_string(place.join(RECIPE)).unwrap_or_default() != recipe.text() {
        bail!("it was made from another recipe");
    }
    let wanted = fs::read_to_string(place.join(MANIFEST)).unwrap_or_default();
    if wanted.is_empty() || wanted != manifest(place)? {
        bail!("files are missing, added or of another size");
    }
    Ok(())
}

/// One line a file: its size and path; links carry their target.
fn manifest(dir: &Path) -> Result<String> {
    let mut files = BTreeMap::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(next) = pending.pop() {
        for item in fs::read_dir(&next).with_context(|| format!("cannot read {}", next.display()))? {
            let path = item?.path();
            let meta = fs::symlink_metadata(&path)?;
            let name = path.strip_prefix(dir).unwrap_or(&path).to_path_buf();
            if meta.is_dir() {
                pending.push(path);
            } else if meta.is_symlink() {
                files.insert(name, format!("-> {}", fs::read_link(&path)?.display()));
            } else if name.as_os_str() != MANIFEST {
                files.insert(name, meta.len().to_string());
            }
        }
    }
    let line = |(name, what): (&PathBuf, &String)| format!("{what} {}\n", name.display());
    Ok(files.iter().map(line).collect())
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes old results of other recipes under the same name. A failure only costs space.
fn prune(base: &Path, recipe: &Recipe, place: &Path) {
    let prefix = format!("{}-", recipe.name);
    for item in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = item.file_name().to_string_lossy().into_owned();
        let key = name.strip_prefix(&prefix).unwrap_or_default();
        let is_result = key.len() == 16 && key.bytes().all(|b| b.is_ascii_hexdigit());
        let age = item.metadata().and_then(|m| m.modified()).ok();
        let old = age.and_then(|t| SystemTime::now().duration_since(t).ok());
        if is_result && item.path() != place && old.is_some_and(|age| age > KEEP) {
            let _ = fs::remove_dir_all(item.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(version: &str) -> Recipe {
        Recipe::new("thing").with("version", version)
    }

    fn make(base: &Path, version: &str, content: &str) -> Result<PathBuf> {
        ensure_in(base, &recipe(version), |dir| {
            fs::create_dir(dir.join("sub"))?;
            fs::write(dir.join("sub/file"), content)?;
            std::os::unix::fs::symlink("sub/file", dir.join("link"))?;
            Ok(())
        })
    }

    #[test]
    fn a_result_is_made_once() {
        let base = tempfile::tempdir().unwrap();
        let first = make(base.path(), "1", "one").unwrap();
        let again = ensure_in(base.path(), &recipe("1"), |_| bail!("made twice")).unwrap();
        assert_eq!(first, again);
    }

    #[test]
    fn another_recipe_is_another_result() {
        let base = tempfile::tempdir().unwrap();
        let first = make(base.path(), "1", "one").unwrap();
        let second = make(base.path(), "2", "two").unwrap();
        assert_ne!(first, second);
        assert_eq!(fs::read_to_string(second.join("sub/file")).unwrap(), "two");
        assert!(first.exists(), "a young result of another recipe stays");
    }

    #[test]
    fn a_failed_recipe_leaves_no_result() {
        let base = tempfile::tempdir().unwrap();
        let error = ensure_in(base.path(), &recipe("1"), |dir| {
            fs::write(dir.join("half"), "half")?;
            bail!("the mirror went away")
        });
        assert_eq!(error.unwrap_err().to_string(), "the mirror went away");
        let place = make(base.path(), "1", "one").unwrap();
        assert!(!place.join("half").exists());
    }

    #[test]
    fn a_damaged_result_is_made_again() {
        for damage in [
            |p: &Path| fs::remove_file(p.join("sub/file")).unwrap(),
            |p: &Path| fs::write(p.join("sub/file"), "longer").unwrap(),
            |p: &Path| fs::write(p.join("more"), "").unwrap(),
            |p: &Path| fs::remove_file(p.join(MANIFEST)).unwrap(),
            |p: &Path| fs::write(p.join(RECIPE), "version: 0\n").unwrap(),
        ] {
            let base = tempfile::tempdir().unwrap();
            let place = make(base.path(), "1", "one").unwrap();
            damage(&place);
            make(base.path(), "1", "new").unwrap();
            assert_eq!(fs::read_to_string(place.join("sub/file")).unwrap(), "new");
        }
    }

    #[test]
    fn files_count_by_content() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "abc").unwrap();
        let first = Recipe::new("x").with_file("f", &file).unwrap().directory();
        fs::write(&file, "abd").unwrap();
        assert_ne!(first, Recipe::new("x").with_file("f", &file).unwrap().directory());
    }
}
