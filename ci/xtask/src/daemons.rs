//! The daemons of others that tests start: Debian's, unpacked and run without being installed.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Result;

use crate::root::Root;
use crate::tools;

/// What serves disks over vhost-user, and its package.
const STORAGE: (&str, &str) = ("qemu-storage-daemon", "qemu-utils");

/// Debian's daemons, unpacked.
///
/// # Errors
/// A package cannot be downloaded or unpacked.
pub fn root() -> Result<Root> {
    Root::get("root-daemons", &[STORAGE.1])
}

/// Puts a script for each daemon into `dir`, which becomes the daemon itself when it is run.
///
/// # Errors
/// A package cannot be downloaded or unpacked.
pub fn provide(dir: &Path) -> Result<()> {
    let program = STORAGE.0;
    let root = root()?;
    let command = tools::shown(&root.command(&format!("usr/bin/{program}")));
    let script = dir.join(program);
    fs::write(&script, format!("#!/bin/sh\nexec {command} \"$@\"\n"))?;
    Ok(fs::set_permissions(script, Permissions::from_mode(0o755))?)
}
