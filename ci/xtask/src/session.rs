//! `cargo xtask host`: a command or a shell on a host.

use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use triarch_harness::agent::{Exec, Exit, Stream};

use crate::host::{Host, Kind, Options};
use crate::kernels::Version;
use crate::tools;

/// A shell may stay open for a day.
const SHELL_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// What `timeout(1)` answers, and we too.
const TIMED_OUT: u8 = 124;

/// Starts a host and runs a command on it, or a shell on this terminal. The exit code is the
/// command's; the host ends with it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which host
    #[arg(value_enum)]
    kind: Kind,
    /// QEMU's name of the CPU model of an emulated host, e.g. EPYC-Rome, cortex-a72 or max,sve=off
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Number of CPUs; an emulated host is steadiest with one
    #[arg(long, default_value_t = 1)]
    smp: u32,
    /// Memory in MiB
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// The host's kernel
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Version,
    /// A file to have on the host, in the directory where commands start; may be repeated
    #[arg(long, value_name = "FILE")]
    put: Vec<PathBuf>,
    /// Seconds after which the command is killed
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
    /// The command and its arguments; without it a shell
    #[arg(last = true)]
    command: Vec<String>,
}

/// Carries out the verb.
///
/// # Errors
/// The host cannot be started or failed, or the command cannot be.
pub fn run(args: Args) -> Result<ExitCode> {
    let shell = args.command.is_empty();
    if shell && !io::stdin().is_terminal() {
        bail!("standard input is no terminal: give a command after `--`");
    }
    let mut files = Vec::new();
    for source in args.put {
        let name = source.file_name().and_then(|n| n.to_str());
        let name = name.with_context(|| format!("{} has no usable name", source.display()))?;
        let meta = source
            .metadata()
            .with_context(|| format!("cannot read {}", source.display()))?;
        files.push((name.to_owned(), meta.permissions().mode() & 0o777, source));
    }
    let options = Options {
        cpu: args.cpu,
        smp: args.smp,
        memory_mib: args.memory,
        kernel: args.kernel,
        files,
        terminal: shell && args.kind != Kind::Native,
        vhost_disk: None,
        pair: None,
    };
    let host = Host::start(args.kind, &options)?;
    if shell {
        return shell_on(&host);
    }
    let exec = Exec::new(args.command)
        .cwd(&host.path(""))
        .timeout(Duration::from_secs(args.timeout));
    Ok(exit_code(host.exec(&exec, pass_on)?))
}

/// Writes a command's output where it belongs. A reader that went away is no reason to stop.
fn pass_on(stream: Stream, data: &[u8]) {
    let _ = match stream {
        Stream::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(data).and_then(|()| out.flush())
        }
        Stream::Stderr => io::stderr().lock().write_all(data),
    };
}

fn exit_code(exit: Exit) -> ExitCode {
    if exit.timed_out {
        eprintln!("the command took too long and was killed");
        return ExitCode::from(TIMED_OUT);
    }
    let code = exit.code.or(exit.signal.map(|s| 128 + s)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn shell_on(host: &Host) -> Result<ExitCode> {
    if host.kind() == Kind::Native {
        eprintln!("this machine is the host: the shell starts in {}", host.path(""));
        let status = Command::new("sh").current_dir(host.path("")).status()?;
        return Ok(exit_code(Exit {
            code: status.code(),
            signal: None,
            timed_out: false,
        }));
    }
    eprintln!("a shell on the host; it ends with `exit` or ^D");
    let size = tools::output(Command::new("sh").args(["-c", "stty size </dev/tty"])).unwrap_or_default();
    // A terminal that does not know its size says 0.
    let size = match size.trim().split_once(' ') {
        Some((rows, columns)) if rows != "0" => format!("rows {rows} cols {columns}"),
        _ => String::new(),
    };
    // The shell needs the terminal as its controlling one for job control and ^C.
    let script = format!("stty {size} </dev/hvc0\nsetsid -c sh -i </dev/hvc0 >/dev/hvc0 2>&1; exit $?");
    let term = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
    let exec = Exec::new(["/bin/sh", "-c", &script])
        .env("TERM", &term)
        .env("HOME", "/root");
    let exec = exec.env("PS1", &format!("{}:\\w# ", host.kind())).cwd(&host.path(""));
    Ok(exit_code(host.exec(&exec.timeout(SHELL_LIMIT), pass_on)?))
}
