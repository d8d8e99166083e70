//! The storage daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use anyhow::Context;
use clap::Parser;
use triarch_api::server::Listener;
use triarch_blkd::{ControlService, Daemon, End, ExportOptions, Taken, obey};
use triarch_daemon::{Confinement, Control, LogOptions, SeccompMode, Signals, drop_privileges};
use triarch_device_core::{Sandbox, ThreadClass};

const TAKE_OVER: &str = "cannot take over";

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
    /// [,poll_us=N][,iops=N[,iops_burst=N]][,bw=BYTES[,bw_burst=BYTES]]
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
    triarch_daemon::exit_code("triarch-blkd", run(Cli::parse()))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    cli.log.start();
    triarch_daemon::raise_descriptors();
    // Before there is another thread.
    let signals = Signals::hold().context("cannot hold signals back")?;
    let confinement = Confinement::new(cli.seccomp);
    let sandbox = confinement.sandbox();
    let daemon = Daemon::new(sandbox.clone()).context("cannot make an event descriptor")?;
    for export in cli.exports {
        let name = export.name.clone();
        daemon.add(export).with_context(|| format!("export {name}"))?;
    }
    let mut listener = cli.control_socket.as_deref().map(triarch_daemon::listen).transpose()?;
    let mut taken = cli
        .take_over
        .as_deref()
        .map(Taken::ask)
        .transpose()
        .context(TAKE_OVER)?;
    if let Some(taken) = &mut taken {
        listener = taken.take_control();
    }
    drop_privileges()?;
    let (end, ended) = channel();
    wait_for_signals(signals, &sandbox, end.clone()).context("cannot start a thread")?;
    let control = listener.map(|listener| prepare_control(listener, &daemon, &sandbox, end));
    let mut control = control.transpose()?;
    let (begin, begun) = channel();
    let accept = daemon.prepare(begun).context("cannot start a thread")?;
    if let Some(taken) = taken {
        // As late as possible: what failed after this would leave guests without a daemon.
        taken.confirm(&daemon).context(TAKE_OVER)?;
    }
    // The thread waits for it.
    let _ = begin.send(());
    if let Some(control) = &mut control {
        control.begin();
    }
    triarch_daemon::ready(&confinement)?;
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

/// Tells `end` when a signal does.
fn wait_for_signals(signals: Signals, sandbox: &Arc<dyn Sandbox>, end: Sender<End>) -> std::io::Result<()> {
    let confine = sandbox.clone();
    let wait = move || {
        if let Err(error) = confine.enter(ThreadClass::Control) {
            tracing::error!("cannot confine a thread: {error}");
            std::process::abort();
        }
        signals.wait();
        let _ = end.send(End::Told);
    };
    sandbox.spawn("signals".to_owned(), Box::new(wait)).map(drop)
}

/// Prepares to serve the control socket, with a thread for what takes longer than an answer may.
fn prepare_control(
    listener: Listener,
    daemon: &Arc<Daemon>,
    sandbox: &Arc<dyn Sandbox>,
    end: Sender<End>,
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
    Ok(Control::prepare(listener, Box::new(service), sandbox)?)
}
