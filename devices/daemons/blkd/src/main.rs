//! The storage daemon.

use std::io::{Write, stderr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::Context;
use clap::Parser;
use triarch_api::server::Listener;
use triarch_blkd::{ControlService, Daemon, End, ExportOptions, Taken, obey};
use triarch_daemon::{Confinement, Control, LogOptions, SeccompMode, Signals, drop_privileges};
use triarch_device_core::{Sandbox, ServiceManager, ThreadClass};

/// Serves disks to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Each --export is a raw image or a block device, and a socket at which one VM at a time can have it.\n\
                  More can be added, changed and removed on the control socket, which speaks HTTP:\n  \
                  curl --unix-socket blkd.sock http://localhost/api/v1/blkd.info"
)]
struct Cli {
    /// A disk: name=NAME,path=FILE,socket=PATH[,readonly=on][,num_queues=N][,queue_size=N][,direct=on][,io_uring=off][,serial=TEXT]
    /// [,iops=N[,iops_burst=N]][,bw=BYTES[,bw_burst=BYTES]]
    #[arg(long = "export", value_name = "KEY=VALUE,...", required_unless_present_any = ["control_socket", "take_over"])]
    exports: Vec<ExportOptions>,
    /// Where to listen for questions and orders: a path, or fd=N
    #[arg(long, value_name = "PATH", conflicts_with = "take_over")]
    control_socket: Option<String>,
    /// Go on in the place of the process with this control socket: with its exports, its sockets and its disks
    #[arg(long, value_name = "PATH")]
    take_over: Option<PathBuf>,
    /// What happens to a thread that calls the system in a way it need not
    #[arg(long, value_enum, default_value = "true")]
    seccomp: SeccompMode,
    #[command(flatten)]
    log: LogOptions,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever should read it may be gone.
            let _ = writeln!(stderr(), "triarch-blkd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    cli.log.start();
    // Before there is another thread.
    let signals = Signals::hold().context("cannot hold signals back")?;
    let confinement = Confinement::new(cli.seccomp);
    let sandbox = confinement.sandbox();
    let daemon = Daemon::new(sandbox.clone()).context("cannot make an event descriptor")?;
    for export in cli.exports {
        let name = export.name.clone();
        daemon.add(export).with_context(|| format!("export {name}"))?;
    }
    let mut control = cli.control_socket.as_deref().map(triarch_daemon::listen).transpose()?;
    if let Some(socket) = &cli.take_over {
        let (exports, listener) = Taken::ask(socket)
            .and_then(Taken::confirm)
            .context("cannot take over")?;
        exports.into_iter().for_each(|export| daemon.put(export));
        control = Some(listener);
    }
    drop_privileges()?;
    let (end, ended) = channel();
    let control = control.map(|listener| serve_control(listener, &daemon, &sandbox, end.clone()));
    let control = control.transpose()?;
    let accept = daemon.start().context("cannot start a thread")?;
    let confine = sandbox.clone();
    let wait = move || {
        if let Err(error) = confine.enter(ThreadClass::Control) {
            tracing::error!("cannot confine a thread: {error}");
            std::process::abort();
        }
        signals.wait();
        let _ = end.send(End::Told);
    };
    let waiting = sandbox.spawn("signals".to_owned(), Box::new(wait));
    waiting.context("cannot start a thread")?;
    if let Some(manager) = ServiceManager::from_env() {
        manager.send("READY=1");
    }
    confinement.enter()?;
    let how = ended.recv().context("nobody is left to end the process")?;
    daemon.end();
    let _ = accept.join();
    // What was asked last is answered.
    drop(control);
    if how == End::HandedOver {
        tracing::info!("another process goes on");
    }
    Ok(())
}

/// Serves the control socket, with a thread for what takes longer than an answer may.
fn serve_control(
    listener: Listener,
    daemon: &Arc<Daemon>,
    sandbox: &Arc<dyn Sandbox>,
    end: std::sync::mpsc::Sender<End>,
) -> anyhow::Result<Control> {
    daemon.set_control(listener.passage().context("cannot share the control socket")?);
    let (orders, received) = channel();
    let (confine, obeying) = (sandbox.clone(), daemon.clone());
    let body = move || {
        if let Err(error) = confine.enter(ThreadClass::Control) {
            tracing::error!("cannot confine a thread: {error}");
            std::process::abort();
        }
        obey(&obeying, received, &end);
    };
    sandbox
        .spawn("orders".to_owned(), Box::new(body))
        .context("cannot start a thread")?;
    let service = ControlService::new(daemon.clone(), orders);
    Ok(Control::start(listener, Box::new(service), sandbox)?)
}
