//! `triarch-netd`: a switch between guests over vhost-user, taps and network cards.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use triarch_daemon::{Confinement, Control, LogOptions, SeccompMode, Signals, drop_privileges, listen};
use triarch_netd::control::Steward;
use triarch_netd::plane::{PlaneHandle, PlaneOptions};
use triarch_netd::switch::table::TableLimits;
use triarch_netd::{Opened, PortOptions, Registry};

/// A learning switch between guests over vhost-user, taps and network cards of the host.
#[derive(Debug, Parser)]
#[command(name = "triarch-netd", version)]
struct Cli {
    /// A port: a guest's with socket=PATH, a tap's with tap=IFNAME, a network card's with interface=IFNAME.
    ///
    /// name=NAME,socket=PATH|fd=N[,mode=client][,num_queues=N], name=NAME,tap=IFNAME[,num_queues=N] or name=NAME,interface=IFNAME, and for all
    /// [,mac=MAC][,vlan=ID|trunk=1+2+10-20[,native=ID]][,ip=A+B][,anti_spoof=on][,rate=BYTES][,rate_burst=BYTES][,pps=N][,pps_burst=N]
    /// [,rx_rate=BYTES][,rx_rate_burst=BYTES][,rx_pps=N][,rx_pps_burst=N][,mtu=N][,max_macs=N]
    #[arg(long = "port", value_name = "KEY=VALUE,...")]
    ports: Vec<PortOptions>,
    /// Serve JSON over HTTP, and metrics, on this unix socket (a path, or fd=N)
    #[arg(long, value_name = "PATH")]
    control_socket: Option<String>,
    /// Seconds after which an address that is silent is forgotten
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    age: u64,
    /// Addresses that are learnt, of all ports together
    #[arg(long, value_name = "N", default_value_t = 16384)]
    table_size: usize,
    /// Microseconds for which a queue that became empty is looked at before the thread sleeps; costs a CPU while packets come
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll: u64,
    /// Restrict the system calls of each thread to what its work needs
    #[arg(long, value_enum, default_value = "true")]
    seccomp: SeccompMode,
    #[command(flatten)]
    log: LogOptions,
}

fn main() -> ExitCode {
    triarch_daemon::exit_code("triarch-netd", run(Cli::parse()))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    cli.log.start();
    // Before there is another thread.
    let signals = Signals::hold().context("cannot hold signals back")?;
    let confinement = Confinement::new(cli.seccomp);
    let sandbox = confinement.sandbox();
    let options = PlaneOptions {
        table: TableLimits {
            total: cli.table_size,
            age: cli.age * 1_000_000_000,
        },
        poll: Duration::from_micros(cli.poll),
    };
    let open = |port: PortOptions| {
        let name = port.name.clone();
        Opened::open(port, Vec::new()).with_context(|| format!("port {name}"))
    };
    let ports: Vec<_> = cli.ports.into_iter().map(open).collect::<anyhow::Result<_>>()?;
    // Who reaches it finds the sockets of all ports.
    let control = cli
        .control_socket
        .as_deref()
        .map(listen)
        .transpose()
        .context("--control-socket")?;
    drop_privileges()?;
    let (plane, thread) = PlaneHandle::start(options, &sandbox).context("cannot start the switch")?;
    let mut registry = Registry::new(plane, sandbox.clone());
    for port in ports {
        let name = port.name().to_owned();
        registry.add(port).with_context(|| format!("port {name}"))?;
    }
    let steward = Steward::start(registry, &sandbox).context("cannot start a thread")?;
    let control = control
        .map(|listener| Control::start(listener, Box::new(steward.service()), &sandbox))
        .transpose()?;
    triarch_daemon::ready(&confinement)?;
    tracing::info!("the switch runs");
    signals.wait();
    tracing::info!("the switch ends");
    drop(control);
    drop(steward);
    let _ = thread.join();
    Ok(())
}
