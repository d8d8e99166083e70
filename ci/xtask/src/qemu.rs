//! One run of the emulator that plays a host.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::root::Rig;
use crate::{cache, passthrough, tools};

/// The emulator's file descriptor of the agent's channel.
const AGENT_FD: &str = "3";
/// Queues of a disk that a daemon serves.
pub const DISK_QUEUES: u32 = 2;
/// Emulators that this process has started: several hosts of one kind may run at once.
static STARTED: AtomicUsize = AtomicUsize::new(0);
/// How long the logs of a failure stay.
const KEEP_LOGS: Duration = Duration::from_secs(24 * 3600);
/// Lines of each log that a failure shows.
const TAIL: usize = 12;

/// What QEMU says of each feature of the CPU model that it cannot emulate, and of a wire that ends in the host itself; nothing is wrong.
const HARMLESS: [&str; 2] = [
    "TCG doesn't support requested feature",
    "is not connected to host network",
];

/// What the machine is made of.
#[derive(Debug)]
pub struct Hardware<'a> {
    /// The architecture.
    pub arch: Arch,
    /// QEMU's name of the CPU model, with its properties if any.
    pub cpu: &'a str,
    /// Number of CPUs.
    pub smp: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The bzImage, or ARM's Image.
    pub kernel: &'a Path,
    /// The initramfs; any path that this process may open, of /proc/self/fd too.
    pub initramfs: &'a Path,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Name of the virtio-serial port the agent listens on.
    pub port: &'a str,
    /// Whether /dev/hvc0 is this process's terminal.
    pub terminal: bool,
    /// Socket of a daemon that serves it a disk over vhost-user.
    pub vhost_disk: Option<&'a Path>,
    /// What its guests may get.
    pub spare: &'a passthrough::Devices,
    /// What leads to another machine.
    pub pair: Option<&'a Paired>,
    /// Starts the log files' names.
    pub name: &'a str,
}

/// What a machine has in common with another one.
#[derive(Debug, Clone)]
pub struct Paired {
    /// The socket that stands for the wire between their network cards.
    pub wire: PathBuf,
    /// Whether this one makes the socket.
    pub is_server: bool,
    /// The image of the disk that both have.
    pub disk: PathBuf,
}

/// The running emulator. It is killed when this is dropped, and by the kernel when the thread that
/// started it ends.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    logs: Logs,
    keep_logs: bool,
}

/// Where its words go.
#[derive(Debug)]
struct Logs {
    console: PathBuf,
    resets: PathBuf,
    errors: PathBuf,
}

impl Qemu {
    /// Starts the machine; returns it with the stream that leads to the agent's port.
    ///
    /// # Errors
    /// The emulator cannot be started.
    pub fn start(rig: &Rig, hardware: &Hardware<'_>) -> Result<(Self, UnixStream)> {
        let logs = Logs::new(hardware.name)?;
        let (ours, theirs) = UnixStream::pair()?;
        let mut emulator = rig.qemu();
        arguments(&mut emulator, hardware, &logs);
        // The channel arrives as standard input and is moved to its own number, so that neither
        // a socket's file nor its removal is needed. setpriv lets the kernel end the emulator with us.
        let input = if hardware.terminal { "/dev/tty" } else { "/dev/null" };
        let script = format!("exec {AGENT_FD}<&0 <{input} \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh", "setpriv", "--pdeathsig", "KILL", "--"]);
        command.arg(emulator.get_program()).args(emulator.get_args());
        command
            .stdin(OwnedFd::from(theirs))
            .stderr(fs::File::create(&logs.errors)?);
        if !hardware.terminal {
            command.stdout(Stdio::null());
        }
        let child = command.spawn().context("cannot start the emulator")?;
        let qemu = Self {
            child,
            logs,
            keep_logs: false,
        };
        Ok((qemu, ours))
    }

    /// The emulator's exit status, if it ended; waits for at most `limit`.
    pub fn ended(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                _ => return None,
            }
        }
    }

    /// How the emulator stands and what it and its kernel said last. The logs stay.
    pub fn post_mortem(&mut self) -> String {
        self.keep_logs = true;
        let state = match self.ended(Duration::from_millis(500)) {
            Some(status) => format!("QEMU ended: {status}"),
            None => format!("QEMU runs (process {})", self.child.id()),
        };
        let last = |name: &str, file: &Path, telling: fn(&str) -> bool| {
            let text = fs::read(file).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).replace('\r', "");
            let lines: Vec<&str> = text.lines().filter(|l| telling(l)).collect();
            let words = tools::tail(&lines.join("\n"), TAIL);
            let path = file.display();
            if words.is_empty() {
                String::new()
            } else {
                format!("\n  {name} ({path}):\n{words}")
            }
        };
        [
            state,
            last("the host's console", &self.logs.console, |_| true),
            last("QEMU's words", &self.logs.errors, |l| {
                !HARMLESS.iter().any(|words| l.contains(words))
            }),
            last("CPU resets", &self.logs.resets, |l| {
                l.starts_with("CPU Reset") || l.contains("ault") || l.contains("RIP=") || l.contains("PC=")
            }),
        ]
        .concat()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !self.keep_logs {
            for log in [&self.logs.console, &self.logs.resets, &self.logs.errors] {
                let _ = fs::remove_file(log);
            }
        }
    }
}

impl Logs {
    fn new(name: &str) -> Result<Self> {
        let dir = cache::base()?.join("log");
        fs::create_dir_all(&dir)?;
        forget_old(&dir);
        let (process, number) = (std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        let file = |what: &str| dir.join(format!("{name}-{process}-{number}.{what}"));
        Ok(Self {
            console: file("console"),
            resets: file("cpu_reset"),
            errors: file("qemu"),
        })
    }
}

/// Removes logs that failures left long ago. One that stays is no harm.
fn forget_old(dir: &Path) {
    for item in fs::read_dir(dir).into_iter().flatten().flatten() {
        let written = item.metadata().and_then(|m| m.modified());
        let age = written.ok().and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age > KEEP_LOGS) {
            let _ = fs::remove_file(item.path());
        }
    }
}

/// QEMU's machine on which the host's kernel finds all that KVM uses.
fn machine(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "q35",
        Arch::Aarch64 => "virt,virtualization=on,gic-version=3,its=on,iommu=smmuv3",
    }
}

fn arguments(command: &mut Command, hardware: &Hardware<'_>, logs: &Logs) {
    let file = |path: &Path| path.display().to_string();
    // A comma in a value is doubled (qemu(1)).
    let console = file(&logs.console).replace(',', ",,");
    let port = format!("virtserialport,chardev=agent,name={}", hardware.port);
    let pairs = [
        ("-accel", "tcg,thread=multi".to_owned()),
        ("-machine", machine(hardware.arch).to_owned()),
        ("-cpu", hardware.cpu.to_owned()),
        ("-smp", hardware.smp.to_string()),
        ("-m", format!("{}M", hardware.memory_mib)),
        ("-kernel", file(hardware.kernel)),
        ("-initrd", file(hardware.initramfs)),
        ("-append", hardware.cmdline.to_owned()),
        ("-display", "none".to_owned()),
        ("-monitor", "none".to_owned()),
        ("-chardev", format!("file,id=log,path={console}")),
        ("-serial", "chardev:log".to_owned()),
        ("-device", "virtio-serial-pci".to_owned()),
        ("-chardev", format!("socket,id=agent,fd={AGENT_FD}")),
        ("-device", port),
        ("-d", "cpu_reset".to_owned()),
        ("-D", file(&logs.resets)),
    ];
    for (flag, value) in pairs {
        command.arg(flag).arg(value);
    }
    if let Some(socket) = hardware.vhost_disk {
        let memory = format!("memory-backend-memfd,id=ram,size={}M,share=on", hardware.memory_mib);
        let socket = file(socket).replace(',', ",,");
        command.args(["-object", &memory, "-machine", "memory-backend=ram"]);
        command.args(["-chardev", &format!("socket,id=disk,path={socket},reconnect-ms=20")]);
        command.args([
            "-device",
            &format!("vhost-user-blk-pci,chardev=disk,num-queues={DISK_QUEUES}"),
        ]);
    }
    command.args(hardware.spare.arguments(hardware.arch));
    if let Some(pair) = hardware.pair {
        pair_up(command, pair);
    }
    if hardware.terminal {
        command.args(["-chardev", "stdio,id=terminal,signal=off"]);
        command.args(["-device", "virtconsole,chardev=terminal"]);
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
}

/// A network card with a wire to the other machine's, and a disk that both write to: what one has written the other one reads, since
/// both emulators have it in this machine's page cache.
fn pair_up(command: &mut Command, pair: &Paired) {
    let path = |path: &Path| path.display().to_string().replace(',', ",,");
    let role = match pair.is_server {
        true => "server=on",
        // The server may not be there yet.
        false => "server=off,reconnect-ms=100",
    };
    let mac = if pair.is_server { "01" } else { "02" };
    let (wire, disk) = (path(&pair.wire), path(&pair.disk));
    let pairs = [
        (
            "-netdev",
            format!("stream,id=wire,{role},addr.type=unix,addr.path={wire}"),
        ),
        (
            "-device",
            format!("virtio-net-pci,netdev=wire,mac=52:54:00:00:0b:{mac}"),
        ),
        (
            "-blockdev",
            format!("driver=file,node-name=image,filename={disk},locking=off"),
        ),
        ("-blockdev", "driver=raw,node-name=both,file=image".to_owned()),
        ("-device", "virtio-blk-pci,drive=both,share-rw=on".to_owned()),
    ];
    for (flag, value) in pairs {
        command.arg(flag).arg(value);
    }
}
