//! schemathesis, which makes requests from the description of the API: a Python program, in an environment of its own.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::tools;

/// The version that the tests know the options of.
const VERSION: &str = "4.32.5";

/// Its program; it is installed from the Python package index if it is not there yet.
///
/// # Errors
/// There is no Python with venv, or the index cannot be reached.
pub fn get() -> Result<PathBuf> {
    let place = tools::top().join(format!("target/rig/schemathesis-{VERSION}"));
    let program = place.join("bin/st");
    if program.is_file() {
        return Ok(program);
    }
    tools::step("installing schemathesis", || {
        let partial = place.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        tools::output(Command::new("python3").args(["-m", "venv"]).arg(&partial)).context("python3-venv is needed")?;
        let pip = ["install", "--quiet", "--disable-pip-version-check"];
        let what = format!("schemathesis=={VERSION}");
        // By the module, since the programs of an environment name the directory it was made in.
        tools::output(
            Command::new(partial.join("bin/python"))
                .args(["-m", "pip"])
                .args(pip)
                .arg(&what),
        )?;
        fs::rename(&partial, &place)?;
        fs::write(
            &program,
            format!(
                "#!/bin/sh\nexec '{}' -m schemathesis.cli \"$@\"\n",
                place.join("bin/python").display()
            ),
        )?;
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(())
    })?;
    Ok(program)
}
