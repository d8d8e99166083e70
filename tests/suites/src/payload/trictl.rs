//! A VM whose whole life is led by `trictl`, as a person or a script would.

use super::data::pattern;
use super::guest::Guest;
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use triarch_harness::capture::Capture;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::terminal::Terminal;
use triarch_harness::vm::{Vm, VmBuilder};

payload_tests!("trictl":
    leads_a_vm_through_its_life,
    tells_refusals_from_silence,
    shows_the_vm_at_work_and_gives_the_terminal_back,
);

const SIZE: u64 = 1 << 20;
/// Less than the time of a test, so that what did not happen is named.
const SOON: Duration = Duration::from_secs(4);

/// The program, and the VMM it drives.
struct Trictl {
    program: PathBuf,
    socket: PathBuf,
}

/// What it left.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Trictl {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--api-socket").arg(&self.socket).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Result<Ran> {
        let mut command = self.command(words);
        let output = command.stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("{} is built beside the VMM", self.program.display()))?;
        Ok(Ran {
            code: output.status.code(),
            out: String::from_utf8(output.stdout)?,
            err: String::from_utf8(output.stderr)?,
        })
    }

    /// What it prints; it must succeed without a complaint.
    fn done(&self, words: &[&str]) -> Result<String> {
        let ran = self.run(words)?;
        ensure!(ran.code == Some(0) && ran.err.is_empty(), "{words:?}: {ran:?}");
        Ok(ran.out)
    }

    /// It must fail with `code` and one sentence that has `part`.
    fn fails(&self, words: &[&str], code: i32, part: &str) -> Result<()> {
        let ran = self.run(words)?;
        let one_sentence = ran.err.lines().count() == 1 && ran.err.starts_with("trictl: ");
        ensure!(
            ran.code == Some(code) && ran.out.is_empty() && one_sentence && ran.err.contains(part),
            "{words:?}: {ran:?}"
        );
        Ok(())
    }
}

/// A VMM without a VM, its client, the file with a configuration, and the path of the guest's serial line.
fn start(context: &Context) -> Result<(Vm, Trictl, PathBuf, PathBuf)> {
    let vm = VmBuilder::new(context)?.api().start()?;
    let trictl = Trictl {
        program: context.triarch.with_file_name("trictl"),
        socket: vm.api()?.socket().to_owned(),
    };
    // The API answers as soon as the VMM listens.
    vm.api()?.request("GET", "vmm.ping", None)?;
    let (file, serial) = (vm.dir().join("vm.json"), vm.dir().join("serial.sock"));
    let config = json!({
        "memory": { "size": 64 << 20 },
        "payload": { "kernel": context.images.path("triarch-payload")? },
        "serial": { "mode": "Socket", "socket": serial },
    });
    fs::write(&file, config.to_string())?;
    Ok((vm, trictl, file, serial))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path of UTF-8")
}

fn leads_a_vm_through_its_life(context: &Context) -> Result<Outcome> {
    let (vm, trictl, file, serial) = start(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let version = trictl.done(&["ping"])?;
    ensure!(version.contains(&format!("Process   {}\n", vm.pid())), "{version}");
    trictl.done(&["create", text(&file)?])?;
    trictl.done(&["add-disk", &format!("path={},num_queues=1", disk.path().display())])?;
    trictl.done(&["boot"])?;
    let mut guest = Guest::attach(vm, &serial)?;
    guest.ask("blk 0 verify 0 100 1")?;
    guest.ask("blk 0 write 7 9 3")?;
    let info = trictl.done(&["info"])?;
    ensure!(
        info.starts_with("State    Running\nvCPUs    1 of 1 at most\nMemory   64 MiB\n"),
        "{info}"
    );
    ensure!(info.contains("\n_disk0  disk  0000:00:"), "{info}");
    trictl.done(&["pause"])?;
    let paused: Value = serde_json::from_str(&trictl.done(&["info", "--json"])?)?;
    ensure!(paused["state"] == "Paused", "{paused}");
    trictl.done(&["resume"])?;
    guest.ask("hello")?;
    counted(&trictl)?;
    let top = trictl.done(&["top", "--once", "--interval", "100"])?;
    for part in [
        "Running  1 vCPU at ",
        "memory [",
        "\nVCPU ",
        "\n   0 ",
        "\nDISK ",
        "\n_disk0 ",
    ] {
        ensure!(top.contains(part), "no {part:?} in:\n{top}");
    }
    happened(&trictl)?;
    trictl.done(&["shutdown"])?;
    trictl.done(&["boot"])?;
    guest.wait_ready()?;
    trictl.done(&["delete"])?;
    trictl.done(&["vmm-shutdown"])?;
    guest.expect_end(0)?;
    trictl.fails(&["info"], 3, "there is no such socket")?;
    Ok(Outcome::Passed)
}

/// The disk's counters are those of what the guest did.
fn counted(trictl: &Trictl) -> Result<()> {
    let counters: Value = serde_json::from_str(&trictl.done(&["counters", "--json"])?)?;
    ensure!(counters["_disk0"]["write_bytes"] == 9 * 512, "{counters}");
    let table = trictl.done(&["counters"])?;
    let row = |line: &&str| line.split_whitespace().take(3).eq(["_disk0", "write_bytes", "4608"]);
    ensure!(table.lines().any(|line| row(&line)), "{table}");
    let metrics = trictl.done(&["metrics"])?;
    ensure!(metrics.contains("triarch_disk_bytes_total{disk=\"_disk0\",queue=\"0\",operation=\"write\"} 4608\n"));
    Ok(())
}

/// Events and jobs tell what was asked for until now.
fn happened(trictl: &Trictl) -> Result<()> {
    let events = trictl.done(&["events", "--since", "0", "--no-follow"])?;
    let mut wanted = [
        "vmm starting",
        "vm created",
        "vm booting",
        "vm booted",
        "vm paused",
        "vm resumed",
    ]
    .into_iter();
    let mut next = wanted.next();
    for line in events.lines().skip(1) {
        let words: Vec<_> = line.split_whitespace().skip(2).take(2).collect();
        if Some(words.join(" ").as_str()) == next {
            next = wanted.next();
        }
    }
    ensure!(next.is_none(), "no {next:?} in its place in:\n{events}");
    let jobs = trictl.done(&["jobs"])?;
    ensure!(jobs.contains("vm.boot  done "), "{jobs}");
    Ok(())
}

fn tells_refusals_from_silence(context: &Context) -> Result<Outcome> {
    let (vm, trictl, file, _serial) = start(context)?;
    trictl.fails(&["boot"], 1, "vm.boot: there is no VM; create one with vm.create")?;
    trictl.done(&["create", text(&file)?])?;
    trictl.fails(&["pause"], 1, "vm.pause: the VM is Created, it must be Running")?;
    trictl.fails(&["create", text(&file)?], 1, "there is a VM already")?;
    trictl.fails(&["add-disk", "path=/nonexistent,num_queues=0"], 1, "num_queues")?;
    trictl.fails(&["add-disk", "path=/d,colour=red"], 2, "there is no key 'colour'")?;
    let socket = trictl.socket.clone();
    let wrong = Trictl {
        socket: vm.dir().join("other.sock"),
        ..trictl
    };
    wrong.fails(&["boot"], 3, "there is no such socket")?;
    // A VMM that was killed leaves its socket behind.
    let status = Command::new("kill").args(["-KILL", &vm.pid().to_string()]).status()?;
    ensure!(status.success(), "kill: {status}");
    let dead = Trictl { socket, ..wrong };
    let deadline = Instant::now() + SOON;
    while dead.run(&["ping"])?.code == Some(0) {
        ensure!(Instant::now() < deadline, "a killed VMM still answers");
    }
    dead.fails(&["ping"], 3, "the VMM has ended")?;
    Ok(Outcome::Passed)
}

fn shows_the_vm_at_work_and_gives_the_terminal_back(context: &Context) -> Result<Outcome> {
    let (vm, trictl, file, serial) = start(context)?;
    trictl.done(&["create", text(&file)?])?;
    trictl.done(&["boot"])?;
    let guest = Guest::attach(vm, &serial)?;
    for by in ["q", "TERM"] {
        let terminal = Terminal::new(80, 24)?;
        let before = terminal.settings()?;
        let (screen, _reader) = Capture::start(terminal.other_end()?)?;
        let slave = File::options().read(true).write(true).open(terminal.path())?;
        let mut top = trictl
            .command(&["top"])
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave)
            .spawn()?;
        screen.wait_for("%CPU", 0, SOON)?;
        ensure!(terminal.settings()? != before, "the terminal is not in raw mode");
        ensure!(screen.text().contains("\u{1b}[?1049h"), "it has no screen of its own");
        // The second page has figures of some time.
        screen.wait_for("[J", screen.len(), SOON)?;
        terminal.resize(30, 3)?;
        // The terminal is not the controlling one, so nobody else says so.
        let pid = top.id().to_string();
        ensure!(Command::new("kill").args(["-WINCH", &pid]).status()?.success());
        let deadline = Instant::now() + SOON;
        while !screen
            .text()
            .split("\u{1b}[H")
            .any(|frame| frame.matches("\r\n").count() == 2)
        {
            ensure!(Instant::now() < deadline, "no page is as small as the screen");
            std::thread::sleep(Duration::from_millis(5));
        }
        if by == "q" {
            use std::io::Write;
            terminal.other_end()?.write_all(b"q")?;
        } else {
            ensure!(Command::new("kill").args(["-TERM", &pid]).status()?.success());
        }
        let deadline = Instant::now() + SOON;
        let status = loop {
            match top.try_wait()? {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                None => {
                    top.kill()?;
                    anyhow::bail!("{by} does not end it");
                }
            }
        };
        ensure!(status.success(), "{by}: {status}");
        ensure!(terminal.settings()? == before, "{by}: the terminal has other settings");
        screen.wait_for("\u{1b}[?1049l", 0, SOON)?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}
