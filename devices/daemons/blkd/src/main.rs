//! The storage daemon.

use std::io::{Write, stderr};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use triarch_blkd::{Daemon, ExportOptions};
use triarch_daemon::{Confinement, LogOptions, SeccompMode, Signals, drop_privileges};

/// Serves disks to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Each --export is a raw image or a block device, and a socket at which one VM at a time can have it."
)]
struct Cli {
    /// A disk: name=NAME,path=FILE,socket=PATH[,readonly=on][,num_queues=N][,queue_size=N][,direct=on][,io_uring=off][,serial=TEXT]
    #[arg(long = "export", value_name = "KEY=VALUE,...", required = true)]
    exports: Vec<ExportOptions>,
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
    let daemon = Daemon::new(confinement.sandbox()).context("cannot make an event descriptor")?;
    for export in cli.exports {
        let name = export.name.clone();
        daemon.add(export).with_context(|| format!("export {name}"))?;
    }
    drop_privileges()?;
    let accept = daemon.start().context("cannot start a thread")?;
    confinement.enter()?;
    signals.wait();
    daemon.end();
    let _ = accept.join();
    Ok(())
}
