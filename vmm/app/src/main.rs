//! `triarch`: one guest, one process.

mod api;
mod audit;
mod cli;
mod flags;
mod heap;
mod keyvalue;
mod limits;
mod logging;
mod monitor;
mod outlet;

use std::process::ExitCode;
use std::sync::Arc;

use triarch_api::audit::{AuditSink, NoAudit};
use triarch_api::{Handler, VmConfig};
use triarch_device_core::{NoSandbox, Sandbox, ThreadClass};
use triarch_machine::{Controller, OLDER_SYSCALLS};
use triarch_sandbox::Seccomp;

use api::Api;
use audit::Audit;
use cli::Cli;

fn main() -> ExitCode {
    heap::one_arena();
    limits::raise_descriptors();
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
    // Before there is another thread.
    triarch_machine::hold_signals()?;
    let seccomp = cli.seccomp.map(|mode| Arc::new(Seccomp::new(mode, OLDER_SYSCALLS)));
    let sandbox: Arc<dyn Sandbox> = match &seccomp {
        Some(seccomp) => seccomp.clone(),
        None => Arc::new(NoSandbox),
    };
    let controller = Controller::new(sandbox.clone())?;
    let inbox = controller.inbox();
    let monitor = match &cli.event_monitor {
        Some(target) => Some(monitor::start(target, inbox.events(), &sandbox)?),
        None => None,
    };
    let audit = match &cli.audit_log {
        Some(log) => Some(Audit::start(log, &sandbox)?),
        None => None,
    };
    // Clients are answered from here on, also while the guest is built.
    let api = match &cli.api_socket {
        Some(socket) => {
            let sink = audit
                .as_ref()
                .map_or_else(|| Arc::new(NoAudit) as Arc<dyn AuditSink>, Audit::sink);
            Some(Api::start(socket, inbox, sink, &sandbox)?)
        }
        None => None,
    };
    if let Some(seccomp) = &seccomp {
        seccomp.apply(ThreadClass::Control)?;
    }
    let result = control(controller, cli.config, seccomp.as_deref());
    // The controller is gone, and with it every request that was not answered: now the answers can be sent.
    drop(api);
    // What happened until now, and who asked for it, is written down.
    drop((monitor, audit));
    result
}

fn control(mut controller: Controller, config: Option<VmConfig>, seccomp: Option<&Seccomp>) -> anyhow::Result<()> {
    if let Some(config) = config {
        controller.create(config)?;
        controller.boot()?;
    }
    if let Some(seccomp) = seccomp {
        seccomp.start_spawner()?;
    }
    controller.run()?;
    Ok(())
}
