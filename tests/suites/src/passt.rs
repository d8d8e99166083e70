//! passt, which gives a guest the network that a program of the host has: its address by DHCP, its connections as sockets.

use crate::storage::soon;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::net::{self, Tap};
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome};

const PROGRAM: &str = "passt";
/// The mask of all of its addresses.
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The interface it takes the guest's network from.
const INTERFACE: &str = "tap9";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 8, 7, 9);
/// What it gives the guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 8, 7, 2);
/// The guest's router, which stands for the host's loopback interface.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 8, 7, 1);

/// passt, for one guest.
pub struct Passt {
    program: PathBuf,
    socket: PathBuf,
    process: Option<Process>,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

impl Passt {
    /// Where the guest finds it.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts it, in the place of one that runs, and waits until it listens.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self) -> Result<()> {
        self.kill();
        let _ = fs::remove_file(&self.socket);
        let mut command = Command::new(&self.program);
        command.args(["--vhost-user", "--foreground", "--runas", "0", "--ipv4-only"]);
        command.arg("--socket").arg(&self.socket);
        command.args(["--interface", INTERFACE, "--netmask", "24", "--dns", "none"]);
        command.arg("--address").arg(GUEST.to_string());
        command.arg("--gateway").arg(ROUTER.to_string());
        let process = self.process.insert(Process::start(&mut command)?);
        let deadline = Instant::now() + soon();
        while !self.socket.exists() {
            let words = process.last_words();
            ensure!(Instant::now() < deadline, "it does not listen{words}");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }
}

/// Runs `test` with a passt that listens, in a network namespace of its own.
///
/// # Errors
/// It does not start, or what the test says, with passt's last words.
pub fn with_passt(context: &Context, test: impl FnOnce(&mut Passt) -> Result<()>) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    let Ok(program) = context.images.path(PROGRAM) else {
        return Ok(Outcome::Skipped(format!("there is no {PROGRAM} among the images")));
    };
    net::enter_namespace()?;
    // Else nobody may send what passt makes of the guest's echo requests.
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    Tap::create(INTERFACE, HOST, MASK, false)?;
    let dir = tempfile::Builder::new().prefix("passt").tempdir_in(&context.dir)?;
    let mut passt = Passt {
        program,
        socket: dir.path().join("net.sock"),
        process: None,
        _dir: dir,
    };
    passt.start()?;
    test(&mut passt).with_context(|| {
        let words = passt.process.as_ref().map(Process::last_words).unwrap_or_default();
        format!("last words of passt:{words}")
    })?;
    Ok(Outcome::Passed)
}
