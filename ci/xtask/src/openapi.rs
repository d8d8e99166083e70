//! `cargo xtask openapi`: the description of the API that is checked in.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::lint::Outcome;
use crate::tools;

/// Among the documentation, since it is for whoever uses the API and not a part of the program.
fn file() -> PathBuf {
    tools::top().join("docs/openapi.json")
}

/// Writes the file.
///
/// # Errors
/// It cannot be written.
pub fn write() -> Result<()> {
    let file = file();
    fs::write(&file, triarch_api::openapi::text()).with_context(|| format!("cannot write {}", file.display()))?;
    println!("{}", file.display());
    Ok(())
}

/// Checks that the file is what the types and routes make.
///
/// # Errors
/// It is not.
pub fn lint() -> Result<Outcome> {
    if fs::read_to_string(file()).unwrap_or_default() != triarch_api::openapi::text() {
        bail!("docs/openapi.json is not what the types in api/ make; `cargo xtask openapi` writes it");
    }
    Ok(Outcome::Passed)
}
