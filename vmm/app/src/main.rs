//! `triarch`: one guest, one process.

mod api;
mod audit;
mod cli;
mod compat;
mod config_file;
mod daemons;
mod exit;
mod heap;
mod launcher;
mod limits;
mod logging;
mod monitor;
mod notify;
mod outlet;
mod places;
mod restore;
mod sink;

use std::io::{Write, stderr};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use triarch_api::Handler;
use triarch_api::audit::{AuditSink, NoAudit};
use triarch_device_core::{NoSandbox, Sandbox, ThreadClass};
use triarch_machine::{Controller, OLDER_SYSCALLS, told_to_end};
use triarch_sandbox::Seccomp;

use api::Api;
use audit::Audit;
use cli::{Cli, Described, Guest};
use daemons::Nursery;
use exit::Exit;
use launcher::Launcher;
use places::AuditLog;

fn main() -> ExitCode {
    if daemons::is_nursery() {
        return daemons::run();
    }
    heap::one_arena();
    limits::raise_descriptors();
    let exit = match Cli::from_args().and_then(run) {
        Ok(()) => Exit::Ended,
        Err(error) => {
            triarch_machine::restore_terminal();
            // Whoever should read it may be gone.
            let _ = writeln!(stderr(), "triarch: {error:#}");
            Exit::of(&error)
        }
    };
    exit.into()
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let log = logging::start(&cli.log)?;
    let nursery = cli.daemons.then(Nursery::start).transpose()?.map(Arc::new);
    // Before there is another thread.
    let signals =
        triarch_machine::hold_signals(cli.log.file.is_some() || matches!(cli.audit_log, Some(AuditLog::File(_))))?;
    let seccomp = cli.seccomp.map(|mode| Arc::new(Seccomp::new(mode, OLDER_SYSCALLS)));
    let sandbox: Arc<dyn Sandbox> = match &seccomp {
        Some(seccomp) => seccomp.clone(),
        None => Arc::new(NoSandbox),
    };
    let audit = match &cli.audit_log {
        Some(log) => Some(Audit::start(log, &sandbox)?),
        None => None,
    };
    let launcher = Launcher::new(log, audit.as_ref().and_then(Audit::reopener));
    let mut controller = Controller::new(sandbox.clone(), &signals, Box::new(launcher))?;
    if let Some(nursery) = nursery {
        controller.set_daemons(nursery);
    }
    let inbox = controller.inbox();
    let monitor = match &cli.event_monitor {
        Some(target) => Some(monitor::start(target, inbox.events(), &sandbox)?),
        None => None,
    };
    // Clients are answered from here on, also while the guest is built.
    let api = match &cli.api_socket {
        Some(socket) => {
            let sink = audit
                .as_ref()
                .map_or_else(|| Arc::new(NoAudit) as Arc<dyn AuditSink>, Audit::sink);
            let identity = cli.personality.identity();
            Some(Api::start(socket, &identity, inbox, sink, &sandbox)?)
        }
        None => None,
    };
    if let Some(seccomp) = &seccomp {
        seccomp.apply(ThreadClass::Control)?;
    }
    let result = control(controller, cli.guest, seccomp.as_deref());
    // The controller is gone, and with it every request that was not answered: now the answers can be sent.
    drop(api);
    // What happened until now, and who asked for it, is written down.
    drop((monitor, audit));
    result
}

fn control(mut controller: Controller, guest: Option<Guest>, seccomp: Option<&Seccomp>) -> anyhow::Result<()> {
    let started = match guest {
        Some(Guest::Described(vm)) => start(&mut controller, *vm),
        Some(Guest::Saved(saved)) => restore::start(&mut controller, saved),
        None => Ok(()),
    };
    if let Err(error) = started {
        // A signal to end may well be the reason.
        return if told_to_end() { Ok(()) } else { Err(error) };
    }
    if let Some(seccomp) = seccomp {
        seccomp.start_spawner()?;
    }
    controller.run()?;
    Ok(())
}

fn start(controller: &mut Controller, vm: Described) -> anyhow::Result<()> {
    for field in &vm.ignored {
        tracing::warn!("{}: {field} is no field of a configuration, and was ignored", vm.by);
    }
    let created = controller.create_inherited(vm.config);
    if vm.by == cli::FLAGS {
        created?;
    } else {
        created.context(vm.by)?;
    }
    controller.boot()?;
    Ok(())
}
