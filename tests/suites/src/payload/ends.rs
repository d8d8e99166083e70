//! The VMM's own end, and the standard streams and terminal it was given.

use super::guest::{Guest, builder};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::terminal::Terminal;

payload_tests!("ends":
    by_signals,
    while_paused_by_a_signal,
    a_guest_that_never_idles_by_a_signal,
    not_by_a_signal_that_is_ignored,
    not_with_closed_standard_streams,
    not_by_a_reader_that_does_not_read,
    and_gives_the_terminal_back,
    not_by_a_new_size_of_the_terminal,
);

const SOON: Duration = Duration::from_secs(5);

/// The context with a VMM that starts as `script` has it: shell that ends with what runs the rest of the line.
pub(super) fn started_by(context: &Context, script: &str, streams: &str) -> Result<Context> {
    let path = context.dir.join("start");
    let triarch = context.triarch.display();
    fs::write(&path, format!("#!/bin/sh -e\n{script} '{triarch}' \"$@\" {streams}\n"))?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
    Ok(Context {
        triarch: path,
        ..context.clone()
    })
}

pub(super) fn signal(guest: &Guest, name: &str) -> Result<()> {
    let status = Command::new("kill")
        .args(["-s", name, &guest.vm().pid().to_string()])
        .status()?;
    ensure!(status.success(), "kill: {status}");
    Ok(())
}

/// A guest on all kinds of host paths that must not stay behind.
fn guest_with_sockets(context: &Context) -> Result<Guest> {
    let vm = builder(context)?.api();
    let vsock = format!("cid=3,socket={}", vm.dir().join("vsock.sock").display());
    let console = format!("socket={}", vm.dir().join("console.sock").display());
    Guest::start(vm.flag("--vsock", vsock).set("--console", console))
}

fn by_signals(context: &Context) -> Result<Outcome> {
    for name in ["TERM", "INT"] {
        let guest = guest_with_sockets(context)?;
        signal(&guest, name)?;
        // Who kills a process and its group sends it twice.
        let _ = signal(&guest, name);
        let ended = guest.expect_end(0).context(name)?;
        ensure!(ended.files.is_empty(), "{name} left {:?}", ended.files);
        ensure!(ended.stderr.is_empty(), "{name}: {}", ended.stderr);
    }
    Ok(Outcome::Passed)
}

fn while_paused_by_a_signal(context: &Context) -> Result<Outcome> {
    let guest = guest_with_sockets(context)?;
    guest.vm().pause()?;
    signal(&guest, "TERM")?;
    guest.expect_end(0)?;
    Ok(Outcome::Passed)
}

fn a_guest_that_never_idles_by_a_signal(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    guest.send("dirty 1000 0 0")?;
    signal(&guest, "TERM")?;
    guest.expect_end(0)?;
    Ok(Outcome::Passed)
}

fn not_by_a_signal_that_is_ignored(context: &Context) -> Result<Outcome> {
    let started = started_by(context, "trap '' HUP; exec", "")?;
    let mut guest = Guest::start(builder(&started)?)?;
    signal(&guest, "HUP")?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn not_with_closed_standard_streams(context: &Context) -> Result<Outcome> {
    for streams in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let started = started_by(context, "exec", streams)?;
        let mut guest = Guest::start(builder(&started)?.set("--console", "tty").set("--rng", "src=/dev/zero"))?;
        guest.ask("console init")?;
        // What nobody can read must neither block nor go elsewhere: the descriptors of closed streams could be anybody's.
        guest.ask("console fill 60000 1")?;
        ensure!(
            guest.ask("rng 16")?.contains("ones=0 "),
            "{streams}: not from the source"
        );
        let ended = guest.power_off().context(streams)?;
        let open = !streams.contains(">&-") || streams == "2>&-";
        ensure!(
            ended.output.is_empty() != open,
            "{streams}: output of {} bytes",
            ended.output.len()
        );
    }
    Ok(Outcome::Passed)
}

fn not_by_a_reader_that_does_not_read(context: &Context) -> Result<Outcome> {
    let fifo = context.dir.join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status()?;
    ensure!(made.success(), "mkfifo: {made}");
    let started = started_by(context, "exec", &format!(">'{}'", fifo.display()))?;
    for stays in [true, false] {
        // Open for both, it waits for nobody.
        let mut reader = Some(File::options().read(true).write(true).open(&fifo)?);
        let mut guest = Guest::start(builder(&started)?.set("--console", "tty"))?;
        guest.ask("console init")?;
        reader = reader.filter(|_| stays);
        // More than the pipe and the VMM's own store hold together.
        for seed in 0..6 {
            guest.ask(&format!("console fill 60000 {seed}"))?;
        }
        guest
            .power_off()
            .with_context(|| format!("with a reader that reads nothing: {stays}"))?;
        drop(reader);
    }
    Ok(Outcome::Passed)
}

fn and_gives_the_terminal_back(context: &Context) -> Result<Outcome> {
    for by in ["power-off", "TERM", "HUP"] {
        let terminal = Terminal::new(80, 25)?;
        let before = terminal.settings()?;
        let path = terminal.path().display();
        let started = started_by(context, "exec", &format!("<'{path}' >'{path}'"))?;
        let mut guest = Guest::start(builder(&started)?.set("--console", "tty"))?;
        guest.ask("console init")?;
        ensure!(terminal.settings()? != before, "the terminal is not in raw mode");
        match by {
            "power-off" => guest.power_off()?,
            name => {
                signal(&guest, name)?;
                guest.expect_end(0)?
            }
        };
        ensure!(terminal.settings()? == before, "{by}: the terminal has other settings");
    }
    Ok(Outcome::Passed)
}

fn not_by_a_new_size_of_the_terminal(context: &Context) -> Result<Outcome> {
    let terminal = Terminal::new(80, 25)?;
    let path = terminal.path().display();
    let started = started_by(context, "exec", &format!("<'{path}' >'{path}'"))?;
    let mut guest = Guest::start(builder(&started)?.set("--console", "tty"))?;
    guest.ask("console init")?;
    let size = guest.ask("console size")?;
    ensure!(size == "columns=80 rows=25", "{size}");
    for (columns, rows) in [(132, 43), (1, 1), (300, 100)] {
        terminal.resize(columns, rows)?;
        signal(&guest, "WINCH")?;
        let expected = format!("columns={columns} rows={rows}");
        let deadline = std::time::Instant::now() + SOON;
        loop {
            let size = guest.ask("console size")?;
            if size == expected {
                break;
            }
            ensure!(std::time::Instant::now() < deadline, "still {size}, not {expected}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}
