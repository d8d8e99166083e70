//! Daemons that serve disks over vhost-user: QEMU's and ours.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, patient};
use triarch_harness::vm::Vm;

/// QEMU's.
const PROGRAM: &str = "qemu-storage-daemon";
/// Ours, which lies beside the VMM.
const BLKD: &str = "triarch-blkd";

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// qemu-storage-daemon.
    Qemu,
    /// triarch-blkd.
    Blkd,
}

impl Program {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => PROGRAM,
            Self::Blkd => BLKD,
        }
    }
}

/// How long a daemon or a change may take on a busy machine.
pub fn soon() -> Duration {
    patient(Duration::from_secs(5))
}

/// Why a test that wants the daemon is skipped.
pub fn missing() -> String {
    format!("there is no {PROGRAM} among the images")
}

/// How the disk called `served` stands with its daemon.
///
/// # Errors
/// The VMM does not tell.
pub fn link(vm: &Vm) -> Result<Value> {
    let info = vm.api()?.request("GET", "vm.info", None)?.body;
    let info: Value = serde_json::from_str(&info)?;
    Ok(info["links"]["served"].clone())
}

/// Waits until it stands so that `is_it`.
///
/// # Errors
/// It does not; the error says what was waited for.
pub fn wait_link(vm: &Vm, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = Instant::now() + soon();
    loop {
        let link = link(vm)?;
        if is_it(&link) {
            return Ok(link);
        }
        ensure!(Instant::now() < deadline, "the link is {link}, not {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until its state is `state`.
///
/// # Errors
/// As [`wait_link`].
pub fn wait_state(vm: &Vm, state: &str) -> Result<Value> {
    wait_link(vm, state, |link| link["state"] == state)
}

/// Whether a test that kills a daemon under load goes on with `round`, counted from 0: it kills `kills` times, and then, since requests
/// are not in flight all the time, until one of them was, 50 times more at most.
///
/// # Errors
/// As [`wait_state`], and if nothing was in flight ever.
pub fn kills_again(vm: &Vm, kills: u64, round: u64) -> Result<bool> {
    if round < kills {
        return Ok(true);
    }
    let link = wait_state(vm, "Connected")?;
    let hit = link["resubmitted"].as_u64() > Some(0);
    ensure!(hit || round < kills + 50, "nothing was in flight in any round: {link}");
    Ok(!hit)
}

/// Waits until the reason it gives contains `text`.
///
/// # Errors
/// As [`wait_link`].
pub fn wait_reason(vm: &Vm, text: &str) -> Result<Value> {
    wait_link(vm, text, |link| {
        link["reason"].as_str().is_some_and(|reason| reason.contains(text))
    })
}

/// The daemon with one export.
pub struct Daemon {
    kind: Program,
    program: PathBuf,
    socket: PathBuf,
    /// Queues of the export, from its next start on.
    pub queues: u16,
    /// Further options of an export of ours, beginning with a comma, from its next start on.
    pub options: &'static str,
    process: Option<Process>,
}

impl Daemon {
    /// One that serves on a socket in `dir`; `None` where the program is missing.
    pub fn find(kind: Program, context: &Context, dir: &Path, queues: u16) -> Option<Self> {
        let program = match kind {
            Program::Qemu => context.images.path(PROGRAM).ok()?,
            Program::Blkd => context.triarch.with_file_name(BLKD),
        };
        Some(Self {
            kind,
            program,
            socket: dir.join("disk.sock"),
            queues,
            options: "",
            process: None,
        })
    }

    /// Starts it with the image at `disk` and waits until it listens.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self, disk: &Path) -> Result<()> {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
        let mut command = Command::new(&self.program);
        match self.kind {
            Program::Qemu => self.qemu(&mut command, disk),
            Program::Blkd => self.blkd(&mut command, disk),
        }
        self.process = Some(Process::start(&mut command)?);
        let deadline = Instant::now() + soon();
        while !self.socket.exists() {
            let words = self.process.as_ref().map(Process::last_words).unwrap_or_default();
            ensure!(Instant::now() < deadline, "the daemon does not listen{words}");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn qemu(&self, command: &mut Command, disk: &Path) {
        let (disk, socket, queues) = (disk.display(), self.socket.display(), self.queues);
        let monitor = self.socket.with_extension("qmp");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=f0,filename={disk},locking=off"))
            .args(["--blockdev", "driver=raw,node-name=d0,file=f0"])
            .arg("--chardev")
            .arg(format!("socket,id=m0,path={},server=on,wait=off", monitor.display()))
            .args(["--monitor", "chardev=m0"])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={socket},writable=on,num-queues={queues}"
            ));
    }

    fn blkd(&self, command: &mut Command, disk: &Path) {
        let (disk, socket, queues) = (disk.display(), self.socket.display(), self.queues);
        let options = self.options;
        command
            .arg("--export")
            .arg(format!(
                "name=served,path={disk},socket={socket},num_queues={queues}{options}"
            ))
            .args(["--log-level", "debug"])
            .arg("--control-socket")
            .arg(self.control_socket());
    }

    fn control_socket(&self) -> PathBuf {
        self.socket.with_extension("ctl")
    }

    /// The control socket of our daemon.
    pub fn control(&self) -> Api {
        Api::new(self.control_socket())
    }

    /// Lets another process of our daemon go on in this one's place; the old one has to end by itself.
    ///
    /// # Errors
    /// The new one does not start, or the old one does not end.
    pub fn hand_over(&mut self) -> Result<()> {
        let mut old = self.process.take().context("no daemon runs")?;
        self.process = Some(Process::start(&mut self.successor(&self.program))?);
        let status = old.wait(soon())?;
        let words = self.process.as_ref().map(Process::last_words).unwrap_or_default();
        ensure!(
            status.success(),
            "the old daemon: {status}{}; the new one{words}",
            old.last_words()
        );
        Ok(())
    }

    /// What would let `program` go on in its place.
    pub fn successor(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .args(["--log-level", "debug", "--take-over"])
            .arg(self.control_socket());
        command
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The program's file.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Sends it a signal, such as `STOP`.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, name: &str) -> Result<()> {
        let process = self.process.as_ref().context("no daemon runs")?;
        let status = Command::new("kill")
            .args([&format!("-{name}"), &process.pid().to_string()])
            .status()?;
        ensure!(status.success(), "kill: {status}");
        Ok(())
    }

    /// Its process id.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("no daemon runs")?.pid())
    }

    /// What it said last and how it ended, if it did: for messages.
    pub fn last_words(&mut self) -> String {
        self.process
            .as_mut()
            .map_or_else(String::new, |process| match process.wait(Duration::ZERO) {
                Ok(status) => format!(" {status}{}", process.last_words()),
                Err(_) => format!(" it runs{}", process.last_words()),
            })
    }

    /// Does what a service manager does for QEMU's daemon: starts it again if it ends within `limit`. The daemon
    /// aborts (`vhost_user_server_inc_in_flight`, `!server->wait_idle`) when it finds a kick and the end of its
    /// connection at once. Ours must not end: it is left alone.
    ///
    /// # Errors
    /// It does not start.
    pub fn tend(&mut self, disk: &Path, limit: Duration) -> Result<()> {
        let process = self.process.as_mut().context("no daemon runs")?;
        if self.kind == Program::Qemu && process.wait(limit).is_ok() {
            self.start(disk)?;
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end, or with an error.
    pub fn expect_end(&mut self) -> Result<()> {
        let mut process = self.process.take().context("no daemon runs")?;
        let status = process.wait(soon())?;
        ensure!(status.success(), "the daemon: {status}{}", process.last_words());
        Ok(())
    }

    /// Makes the disk larger, or smaller.
    ///
    /// # Errors
    /// The daemon does not do it.
    pub fn resize(&self, size: u64) -> Result<()> {
        if self.kind == Program::Blkd {
            let body = format!(r#"{{"name":"served","size":{size}}}"#);
            return self.control().put("export.resize", Some(&body)).map(drop);
        }
        self.command(&format!(
            r#"{{"execute":"block_resize","arguments":{{"node-name":"d0","size":{size}}}}}"#
        ))
    }

    /// Gives a command to its monitor.
    fn command(&self, text: &str) -> Result<()> {
        let mut stream = UnixStream::connect(self.socket.with_extension("qmp"))?;
        stream.set_read_timeout(Some(soon()))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        lines.next().context("no greeting")??;
        for command in [r#"{"execute":"qmp_capabilities"}"#, text] {
            writeln!(stream, "{command}")?;
            loop {
                let line = lines.next().context("no answer")??;
                if line.contains("\"return\"") {
                    break;
                }
                ensure!(!line.contains("\"error\""), "{line}");
            }
        }
        Ok(())
    }

    /// The value of `--disk` for its disk, which is called `served`; `options` begin with a comma.
    pub fn flag(&self, options: &str) -> String {
        let socket = self.socket.display();
        format!("vhost_user=on,vhost_socket={socket},id=served{options}")
    }
}
