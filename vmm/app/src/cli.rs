//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Parser};
use triarch_api::{ConsoleConfig, ConsoleMode, PayloadConfig, VmConfig};
use triarch_sandbox::Mode;

use crate::flags;

const EXAMPLE: &str = "\
Example:
  triarch --kernel vmlinuz --initramfs initrd.img --cmdline console=ttyS0 \\
          --cpus boot=4 --memory size=2G --disk path=root.img --net tap=tap0 \\
          --serial tty --console off

Exit status: 0 when the guest powered off or the VMM was told to end, 1 on error.";

/// One virtual machine on KVM.
#[derive(Parser)]
#[command(name = "triarch", version, after_help = EXAMPLE, disable_help_subcommand = true)]
struct Args {
    /// Kernel: a bzImage or an ELF with a PVH note
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Firmware to start instead of a kernel
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    firmware: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", alias = "initrd")]
    initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// boot=N[,max=N][,topology=THREADS:CORES:DIES:PACKAGES]
    #[arg(long, value_name = "CPUS", default_value = "boot=1")]
    cpus: String,
    /// size=SIZE[,shared=on][,hugepages=on[,hugepage_size=SIZE]][,prefault=on][,thp=off][,mergeable=on]
    #[arg(long, value_name = "MEMORY", default_value = "size=512M")]
    memory: String,
    /// path=FILE[,readonly=on][,direct=on][,num_queues=N][,queue_size=N][,serial=TEXT][,io_uring=off][,id=ID]
    #[arg(long, value_name = "DISK", num_args = 1.., action = ArgAction::Append)]
    disk: Vec<String>,
    /// [tap=NAME|fd=[N,...]][,mac=MAC][,ip=IP,mask=MASK][,mtu=N][,num_queues=N][,queue_size=N][,id=ID]
    #[arg(long, value_name = "NET", num_args = 1.., action = ArgAction::Append)]
    net: Vec<String>,
    /// cid=N,socket=PATH
    #[arg(long, value_name = "VSOCK")]
    vsock: Option<String>,
    /// src=FILE
    #[arg(long, value_name = "RNG", default_value = "src=/dev/urandom")]
    rng: String,
    /// Serial port: tty, pty, null, off, file=PATH or socket=PATH
    #[arg(long, value_name = "CONSOLE", default_value = "null")]
    serial: String,
    /// virtio console: the same choices
    #[arg(long, value_name = "CONSOLE", default_value = "tty")]
    console: String,
    /// Debug port 0x402: tty, null, off or file=PATH
    #[arg(long, value_name = "CONSOLE", default_value = "off")]
    debug_console: String,
    /// [uuid=UUID][,serial_number=TEXT][,oem_strings=[TEXT,...]][,dtb=on]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// API socket: PATH, path=PATH or fd=N
    #[arg(long, value_name = "SOCKET")]
    api_socket: Option<String>,
    /// Events, one JSON object a line: path=FILE or fd=N
    #[arg(long, value_name = "EVENTS")]
    event_monitor: Option<String>,
    /// A line for each call that changes something: file=PATH, syslog[=SOCKET] or journald[=SOCKET]
    #[arg(long, value_name = "LOG")]
    audit_log: Option<String>,
    /// System calls outside of the filters: true kills, log reports, false has no filters
    #[arg(long, value_name = "MODE", default_value = "true", value_parser = ["true", "false", "log"])]
    seccomp: String,
    /// Log to FILE instead of stderr
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// More log lines; twice and three times for still more
    #[arg(short = 'v', action = ArgAction::Count)]
    verbosity: u8,
}

/// Where the API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ApiSocket {
    /// A socket to make at this path.
    Path(PathBuf),
    /// A listening socket inherited as this descriptor.
    Fd(i32),
}

/// Where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A file or a named pipe.
    Path(PathBuf),
    /// An inherited descriptor.
    Fd(i32),
}

/// Where audit lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AuditLog {
    /// A file.
    File(PathBuf),
    /// The syslog daemon that listens on this socket.
    Syslog(PathBuf),
    /// The journal that listens on this socket.
    Journal(PathBuf),
}

/// The command line, understood.
pub(crate) struct Cli {
    /// The VM, if one was described.
    pub(crate) config: Option<VmConfig>,
    /// Where the API listens, if anywhere.
    pub(crate) api_socket: Option<ApiSocket>,
    /// Where events go, if anywhere.
    pub(crate) event_monitor: Option<Target>,
    /// Where audit lines go, if anywhere.
    pub(crate) audit_log: Option<AuditLog>,
    /// The system call filters; `None`: none.
    pub(crate) seccomp: Option<Mode>,
    /// Log file.
    pub(crate) log_file: Option<PathBuf>,
    /// How often `-v` was given.
    pub(crate) verbosity: u8,
}

impl Cli {
    /// Reads the process's arguments; prints help and version, and syntax errors with the usage, by itself.
    pub(crate) fn from_args() -> anyhow::Result<Self> {
        match Args::try_parse() {
            Ok(args) => Self::from_parsed(args),
            Err(error) if error.use_stderr() => {
                // One sentence, like every other error; the rest of clap's text is in --help.
                let text = error.render().to_string();
                let text = text
                    .trim_start_matches("error: ")
                    .split("\n\n")
                    .next()
                    .unwrap_or_default();
                anyhow::bail!("{}; see --help", text.split_whitespace().collect::<Vec<_>>().join(" "))
            }
            Err(help) => help.exit(),
        }
    }

    fn from_parsed(args: Args) -> anyhow::Result<Self> {
        let api_socket = args.api_socket.as_deref().map(api_socket).transpose()?;
        let event_monitor = args.event_monitor.as_deref().map(event_monitor).transpose()?;
        let audit_log = args.audit_log.as_deref().map(audit_log).transpose()?;
        if audit_log.is_some() && api_socket.is_none() {
            anyhow::bail!("--audit-log records calls of the API, which is off; give --api-socket PATH beside it");
        }
        let seccomp = match args.seccomp.as_str() {
            "false" => None,
            "log" => Some(Mode::Log),
            _ => Some(Mode::Enforce),
        };
        let (log_file, verbosity) = (args.log_file.clone(), args.verbosity);
        let described = args.kernel.is_some() || args.firmware.is_some();
        if !described && api_socket.is_none() {
            anyhow::bail!(
                "there is nothing to do; give --kernel FILE to boot or --api-socket PATH to be driven, or see --help"
            );
        }
        if !described && let Some(flag) = without_kernel(&args) {
            anyhow::bail!("{flag} describes a VM that has nothing to boot; give --kernel FILE beside it");
        }
        let config = if described { Some(config(args)?) } else { None };
        Ok(Self {
            config,
            api_socket,
            event_monitor,
            audit_log,
            seccomp,
            log_file,
            verbosity,
        })
    }
}

/// A flag that would go unheard because there is no kernel: who drives the VMM by its API describes the VM there.
fn without_kernel(args: &Args) -> Option<&'static str> {
    let given = [
        ("--initramfs", args.initramfs.is_some()),
        ("--cmdline", args.cmdline.is_some()),
        ("--disk", !args.disk.is_empty()),
        ("--net", !args.net.is_empty()),
        ("--vsock", args.vsock.is_some()),
        ("--platform", args.platform.is_some()),
    ];
    given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
}

fn api_socket(text: &str) -> anyhow::Result<ApiSocket> {
    if matches!(text, "" | "path=") {
        anyhow::bail!("--api-socket: the path is empty; write path=FILE");
    }
    match text.split_once('=') {
        Some(("fd", fd)) => match fd.parse() {
            Ok(fd) if fd >= 0 => Ok(ApiSocket::Fd(fd)),
            _ => anyhow::bail!("--api-socket: fd={fd} is no descriptor number; write fd=3 for an inherited socket"),
        },
        Some(("path", path)) => Ok(ApiSocket::Path(path.into())),
        _ => Ok(ApiSocket::Path(text.into())),
    }
}

fn event_monitor(text: &str) -> anyhow::Result<Target> {
    match text.split_once('=') {
        Some(("path", path)) if !path.is_empty() => Ok(Target::Path(path.into())),
        Some(("fd", fd)) => match fd.parse() {
            Ok(fd) if fd >= 0 => Ok(Target::Fd(fd)),
            _ => anyhow::bail!("--event-monitor: fd={fd} is no descriptor number; write fd=3 for an inherited pipe"),
        },
        _ => anyhow::bail!("--event-monitor: '{text}' is neither path=FILE nor fd=N"),
    }
}

fn audit_log(text: &str) -> anyhow::Result<AuditLog> {
    let (kind, path) = text.split_once('=').unwrap_or((text, ""));
    let or = |standard: &str| PathBuf::from(if path.is_empty() { standard } else { path });
    match kind {
        "file" if !path.is_empty() => Ok(AuditLog::File(path.into())),
        "syslog" => Ok(AuditLog::Syslog(or("/dev/log"))),
        "journald" => Ok(AuditLog::Journal(or("/run/systemd/journal/socket"))),
        _ => anyhow::bail!("--audit-log: '{text}' is none of file=PATH, syslog[=SOCKET] and journald[=SOCKET]"),
    }
}

fn config(args: Args) -> anyhow::Result<VmConfig> {
    let list = |items: Vec<_>| if items.is_empty() { None } else { Some(items) };
    let disks: Result<Vec<_>, _> = args.disk.iter().map(|d| flags::disk(d)).collect();
    let nets: Result<Vec<_>, _> = args.net.iter().map(|n| flags::net(n)).collect();
    let net = nets?;
    let serial = flags::console("--serial", &args.serial)?;
    Ok(VmConfig {
        cpus: flags::cpus(&args.cpus)?,
        memory: flags::memory(&args.memory)?,
        payload: Some(PayloadConfig {
            kernel: args.kernel,
            cmdline: args.cmdline,
            initramfs: args.initramfs,
            firmware: args.firmware,
        }),
        disks: list(disks?),
        net: if net.is_empty() { None } else { Some(net) },
        rng: flags::rng(&args.rng)?,
        console: console(&args.console, &serial)?,
        serial,
        debug_console: flags::debug_console(&args.debug_console)?,
        vsock: args.vsock.as_deref().map(flags::vsock).transpose()?,
        platform: args.platform.as_deref().map(flags::platform).transpose()?,
    })
}

/// The virtio console has the terminal by default; a serial port that asks for it gets it instead.
fn console(text: &str, serial: &ConsoleConfig) -> anyhow::Result<ConsoleConfig> {
    let console = flags::console("--console", text)?;
    let given = std::env::args().any(|a| a == "--console" || a.starts_with("--console="));
    if !given && console.mode == serial.mode {
        return Ok(ConsoleConfig {
            mode: ConsoleMode::Off,
            ..ConsoleConfig::default()
        });
    }
    Ok(console)
}

#[cfg(test)]
mod report_tests {
    use super::*;

    #[test]
    fn places_of_events_and_audit_lines_are_understood_or_refused() {
        assert_eq!(event_monitor("path=/a=b").expect("a path"), Target::Path("/a=b".into()));
        assert_eq!(event_monitor("fd=3").expect("a number"), Target::Fd(3));
        for bad in ["", "path=", "fd=", "fd=-1", "fd=x", "/a", "file=/a"] {
            assert!(event_monitor(bad).is_err(), "{bad}");
        }
        assert_eq!(audit_log("file=/a").expect("a file"), AuditLog::File("/a".into()));
        assert_eq!(
            audit_log("syslog").expect("syslog"),
            AuditLog::Syslog("/dev/log".into())
        );
        assert_eq!(audit_log("syslog=/s").expect("a socket"), AuditLog::Syslog("/s".into()));
        assert_eq!(
            audit_log("journald").expect("the journal"),
            AuditLog::Journal("/run/systemd/journal/socket".into())
        );
        for bad in ["", "file=", "file", "/a", "journal"] {
            assert!(audit_log(bad).is_err(), "{bad}");
        }
    }
}
