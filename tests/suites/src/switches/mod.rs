//! Switches between guests that are another process: DPDK's testpmd, Open vSwitch with DPDK, and triarch-netd.

pub mod netd;
mod ovs;

pub use ovs::BRIDGE;

use crate::storage::soon;
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::net;
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome};

const TESTPMD: &str = "dpdk-testpmd";
/// How much less than others testpmd wants of a CPU that it shares: its thread that forwards never sleeps.
const NICE: i32 = 10;

/// Which switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// dpdk-testpmd, which copies what comes at one port to the other.
    Testpmd,
    /// triarch-netd.
    Netd,
    /// Open vSwitch with DPDK.
    OpenVswitch,
}

impl Program {
    /// Whether it connects to the VMM, which listens.
    pub fn connects(self) -> bool {
        self == Self::OpenVswitch
    }

    /// How often it is killed. Open vSwitch takes seconds to start.
    pub fn kills(self) -> u64 {
        if self == Self::OpenVswitch { 2 } else { 5 }
    }
}

/// A switch with two ports.
pub struct Switch {
    kind: Program,
    program: PathBuf,
    /// Open vSwitch's.
    database: Option<ovs::Database>,
    sockets: [PathBuf; 2],
    pairs: u16,
    is_nice: bool,
    process: Option<Process>,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

/// What a test says where the switch is missing.
pub fn skipped() -> Result<Outcome> {
    Ok(Outcome::Skipped("the switch is missing".into()))
}

impl Switch {
    /// One that is not started yet, whose ports have so many pairs of queues; `None` where the program is missing. Open vSwitch, whose
    /// bridge is an interface of the host, comes with a network namespace for this thread.
    ///
    /// # Errors
    /// There is no place for its sockets.
    pub fn find(kind: Program, context: &Context, pairs: u16) -> Result<Option<Self>> {
        let program = match kind {
            Program::Testpmd => context.images.path(TESTPMD).ok(),
            Program::Netd => Some(netd::program(context)).filter(|path| path.exists()),
            Program::OpenVswitch => context.images.path(ovs::PROGRAM).ok(),
        };
        let Some(program) = program else { return Ok(None) };
        let dir = tempfile::Builder::new().prefix("switch").tempdir_in(&context.dir)?;
        let sockets = ["one.sock", "two.sock"].map(|name| dir.path().join(name));
        let database = match kind {
            Program::OpenVswitch => {
                net::enter_namespace()?;
                Some(ovs::Database::start(&program, dir.path(), &sockets)?)
            }
            _ => None,
        };
        Ok(Some(Self {
            kind,
            program,
            database,
            sockets,
            pairs,
            is_nice: false,
            process: None,
            _dir: dir,
        }))
    }

    /// The same, for a host whose CPU the guests need more than it does.
    #[must_use]
    pub fn nice(mut self) -> Self {
        self.is_nice = self.kind == Program::Testpmd;
        self
    }

    /// The socket of port `index`.
    pub fn socket(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    /// Starts it, in the place of one that runs, and waits until it listens, or has the ports it was told of.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self) -> Result<()> {
        self.kill();
        if let Some(database) = &mut self.database {
            let process = self.process.insert(Process::start(&mut database.switch())?);
            return database
                .wait()
                .with_context(|| format!("last words of the switch:{}", process.last_words()));
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        let mut command = Command::new(&self.program);
        match self.kind {
            Program::Netd => self.netd(&mut command),
            _ => self.testpmd(&mut command),
        }
        self.process = Some(match self.is_nice {
            true => Process::start_nice(&mut command, NICE)?,
            false => Process::start(&mut command)?,
        });
        let deadline = Instant::now() + 2 * soon();
        while !self.sockets.iter().all(|socket| socket.exists()) {
            ensure!(
                Instant::now() < deadline,
                "the switch does not listen{}",
                self.last_words()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// What it printed last.
    pub fn last_words(&self) -> String {
        self.process.as_ref().map(Process::last_words).unwrap_or_default()
    }

    /// Without huge pages, PCI or files of its own; its two threads share a CPU.
    fn testpmd(&self, command: &mut Command) {
        command.args([
            "--lcores",
            "0@0,1@0",
            "--no-pci",
            "--no-huge",
            "--no-shconf",
            "--no-telemetry",
        ]);
        command.args(["-m", "256"]);
        for plugin in ["librte_mempool_ring.so.25", "librte_net_vhost.so.25"] {
            command.arg("-d").arg(self.program.with_extension("d").join(plugin));
        }
        let pairs = self.pairs;
        for (n, socket) in self.sockets.iter().enumerate() {
            let port = format!("net_vhost{n},iface={},queues={pairs}", socket.display());
            command.arg("--vdev").arg(port);
        }
        command.args(["--", "--forward-mode=io", "--auto-start", "--total-num-mbufs=4096"]);
        // Else it touches all of each guest's memory when it is told where that is, which takes an emulated host seconds.
        command.arg("--no-mlockall");
        command.arg(format!("--rxq={pairs}")).arg(format!("--txq={pairs}"));
        // Without a terminal it ends at once unless it has something to print now and then.
        command.arg("--stats-period=60");
    }

    fn netd(&self, command: &mut Command) {
        for (n, socket) in self.sockets.iter().enumerate() {
            let port = format!("name=port{n},socket={}", socket.display());
            command.arg("--port").arg(port);
        }
    }
}
