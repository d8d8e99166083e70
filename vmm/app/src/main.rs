//! `triarch`: one guest, one process.

mod cli;
mod flags;
mod keyvalue;
mod logging;

use std::process::ExitCode;
use std::sync::Arc;

use triarch_device_core::{NoSandbox, Sandbox, ThreadClass};
use triarch_machine::{Controller, OLDER_SYSCALLS};
use triarch_sandbox::Seccomp;

use cli::Cli;

fn main() -> ExitCode {
    match Cli::from_args().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            triarch_machine::restore_terminal();
            eprintln!("triarch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    logging::start(&cli)?;
    let seccomp = cli
        .seccomp
        .map(|mode| Seccomp::new(mode, OLDER_SYSCALLS))
        .transpose()?
        .map(Arc::new);
    let sandbox: Arc<dyn Sandbox> = match &seccomp {
        Some(seccomp) => seccomp.clone(),
        None => Arc::new(NoSandbox),
    };
    // Signals are taken before anything else runs in this process but the spawner, which waits for nothing they interrupt.
    let mut controller = Controller::new(sandbox)?;
    if let Some(seccomp) = &seccomp {
        seccomp.apply(ThreadClass::Control)?;
    }
    if let Some(config) = cli.config {
        controller.create(config)?;
        controller.boot()?;
    }
    controller.run()?;
    Ok(())
}
