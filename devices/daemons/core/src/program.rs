//! How a daemon's program begins to serve, and how it ends.

use std::fmt::Display;
use std::io::{Write, stderr};
use std::process::ExitCode;

use triarch_device_core::ServiceManager;
use triarch_sandbox::SandboxError;

use crate::Confinement;

/// Tells the service manager, if one started this process, that everything serves, and confines the main thread.
///
/// # Errors
/// The thread cannot be confined.
pub fn ready(confinement: &Confinement) -> Result<(), SandboxError> {
    if let Some(manager) = ServiceManager::from_env() {
        manager.send("READY=1");
    }
    confinement.enter()
}

/// What the process called `name` ends with. An error is told on standard error, with its causes if its alternate form has them.
pub fn exit_code(name: &str, done: Result<(), impl Display>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever should read it may be gone.
            let _ = writeln!(stderr(), "{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
