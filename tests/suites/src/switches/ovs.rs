//! Open vSwitch with DPDK: its database, its switch, and a bridge with the ports of one guest. It connects to the VMM.

use crate::storage::soon;
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::process::{Process, run};

/// Its bridge, and the interface of the host that is one of the bridge's ports.
pub const BRIDGE: &str = "br0";
/// The program among those of Open vSwitch that tests look for.
pub const PROGRAM: &str = "ovs-vswitchd-dpdk";
/// What DPDK is made of here: no huge pages, PCI or files of its own. With `--legacy-mem` Open vSwitch leaves `--in-memory` out.
const DPDK: &str = "--no-pci --no-huge --legacy-mem --no-shconf --no-telemetry -m 512";

/// The switch's database, which outlives the switch.
pub struct Database {
    programs: PathBuf,
    dir: PathBuf,
    /// How often the switch was waited for.
    starts: u32,
    _process: Process,
}

impl Database {
    /// One in `dir` that knows a bridge with a port for each of `sockets`; `switch` is the switch's program.
    ///
    /// # Errors
    /// It does not start, or the switch's configuration is refused.
    pub fn start(switch: &Path, dir: &Path, sockets: &[PathBuf]) -> Result<Self> {
        let programs = switch.parent().context("the switch is in no directory")?;
        let (file, socket) = (dir.join("conf.db"), dir.join("db.sock"));
        let parts = programs.join("openvswitch.d");
        let mut create = Command::new(programs.join("ovsdb-tool"));
        run(create.arg("create").arg(&file).arg(parts.join("vswitch.ovsschema")))?;
        let mut server = Command::new(programs.join("ovsdb-server"));
        environment(&mut server, dir)
            .arg(&file)
            .arg(format!("--remote=punix:{}", socket.display()))
            .arg(format!("--unixctl={}", dir.join("db.ctl").display()));
        let process = Process::start(&mut server)?;
        let deadline = Instant::now() + soon();
        while !socket.exists() {
            let words = process.last_words();
            ensure!(Instant::now() < deadline, "the database does not listen{words}");
            thread::sleep(Duration::from_millis(10));
        }
        let database = Self {
            programs: programs.to_owned(),
            dir: dir.to_owned(),
            starts: 0,
            _process: process,
        };
        database.configure(&parts, sockets)?;
        Ok(database)
    }

    /// One polling thread, which sleeps when it finds nothing.
    fn configure(&self, parts: &Path, sockets: &[PathBuf]) -> Result<()> {
        let plugin = parts.join("librte_mempool_ring.so.25");
        self.order(&["init"])?;
        self.order(&[
            "set",
            "Open_vSwitch",
            ".",
            "other_config:dpdk-init=true",
            "other_config:dpdk-lcore-mask=0x1",
            "other_config:pmd-cpu-mask=0x1",
            "other_config:pmd-sleep-max=10000",
            // Else it wants a pool of 262144 buffers, and another one whenever a port gets more queues.
            "other_config:per-port-memory=true",
            &format!("other_config:dpdk-extra=\"{DPDK} -d {}\"", plugin.display()),
        ])?;
        self.order(&["add-br", BRIDGE, "--", "set", "Bridge", BRIDGE, "datapath_type=netdev"])?;
        for (n, socket) in sockets.iter().enumerate() {
            let (port, path) = (format!("guest{n}"), socket.display());
            let path = format!("options:vhost-server-path={path}");
            self.order(&[
                "add-port",
                BRIDGE,
                &port,
                "--",
                "set",
                "Interface",
                &port,
                "type=dpdkvhostuserclient",
                &path,
            ])?;
        }
        Ok(())
    }

    /// Changes the database, which the switch need not have seen yet.
    fn order(&self, arguments: &[&str]) -> Result<()> {
        run(self.control().arg("--no-wait").args(arguments)).map(drop)
    }

    /// Waits until the switch, which runs, has done what the database says. Until then it may take its bridge's interface down again, to
    /// set its address.
    ///
    /// # Errors
    /// It does not in time.
    pub fn wait(&mut self) -> Result<()> {
        let limit = format!("--timeout={}", 4 * soon().as_secs());
        // It waits only for what it changes.
        self.starts += 1;
        let change = format!("external_ids:starts={}", self.starts);
        run(self.control().args([&limit, "set", "Open_vSwitch", ".", &change])).map(drop)
    }

    fn control(&self) -> Command {
        let mut command = Command::new(self.programs.join("ovs-vsctl"));
        let socket = format!("--db=unix:{}", self.dir.join("db.sock").display());
        environment(&mut command, &self.dir).arg(socket);
        command
    }

    /// What starts the switch.
    pub fn switch(&self) -> Command {
        let mut command = Command::new(self.programs.join(PROGRAM));
        environment(&mut command, &self.dir)
            // Else it tells at length how busy it was whenever it had to wait.
            .arg("--verbose=coverage:off")
            .arg(format!("unix:{}", self.dir.join("db.sock").display()))
            .arg(format!("--unixctl={}", self.dir.join("switch.ctl").display()));
        command
    }
}

/// Nothing of it is anywhere but in `dir`.
fn environment<'a>(command: &'a mut Command, dir: &Path) -> &'a mut Command {
    for name in [
        "OVS_RUNDIR",
        "OVS_LOGDIR",
        "OVS_DBDIR",
        "OVS_SYSCONFDIR",
        "XDG_RUNTIME_DIR",
    ] {
        command.env(name, dir);
    }
    command
}
