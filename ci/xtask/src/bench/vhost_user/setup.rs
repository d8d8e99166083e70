//! What is compared: a VMM with a guest, and what serves its disk.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use triarch_harness::process::Process;

use super::GUEST_MIB;
use super::guest::Guest;
use crate::root::{Rig, Root};

/// Queues each disk has; a guest uses as many as it likes.
const QUEUES: u32 = 4;
/// A daemon listens after no more than this.
const SOON: Duration = Duration::from_secs(10);

/// The VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Front {
    /// This project's.
    Triarch,
    /// QEMU's q35.
    Qemu,
}

/// What serves the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Back {
    /// The VMM itself.
    Own,
    /// QEMU's daemon, over vhost-user.
    StorageDaemon,
    /// This project's daemon, over vhost-user.
    Blkd,
}

impl Back {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Own, Self::StorageDaemon, Self::Blkd];
}

impl fmt::Display for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Triarch => "triarch",
            Self::Qemu => "QEMU",
        })
    }
}

impl fmt::Display for Back {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "a disk of the VMM's own",
            Self::StorageDaemon => "qemu-storage-daemon",
            Self::Blkd => "triarch-blkd",
        })
    }
}

/// Where the programs are, and the disk they serve.
pub struct Programs {
    /// The VMM of this project.
    pub triarch: PathBuf,
    /// The daemon for disks of this project.
    pub blkd: PathBuf,
    /// The bare-metal guest.
    pub kernel: PathBuf,
    /// QEMU.
    pub rig: Rig,
    /// QEMU's daemons.
    pub daemons: Root,
    /// The daemon for networks of this project.
    pub netd: PathBuf,
    /// DPDK's.
    pub testpmd: PathBuf,
    /// The image.
    pub image: PathBuf,
    /// Around the host's page cache.
    pub direct: bool,
}

/// A VMM whose guest runs, with its daemon if it has one. Both end when this is dropped.
pub struct Setup {
    /// Which VMM.
    pub front: Front,
    /// Which daemon.
    pub back: Back,
    /// The VMM's process.
    pub vmm: Process,
    /// The daemon's.
    pub daemon: Option<Process>,
    /// The guest.
    pub guest: Guest,
    _dir: TempDir,
}

impl Setup {
    /// Starts all of it.
    ///
    /// # Errors
    /// A program does not start.
    pub fn start(programs: &Programs, front: Front, back: Back) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (disk, serial) = (dir.path().join("disk.sock"), dir.path().join("serial.sock"));
        let daemon = match back {
            Back::Own => None,
            Back::StorageDaemon => Some(programs.storage_daemon(&disk)),
            Back::Blkd => Some(programs.blkd(&disk)),
        };
        let mut daemon = daemon.map(|mut command| Process::start(&mut command)).transpose()?;
        if let Some(daemon) = &mut daemon {
            wait_for(daemon, &disk)?;
        }
        let socket = daemon.is_some().then_some(disk.as_path());
        let mut vmm = Process::start(&mut programs.with_disk(front, &serial, socket))?;
        let guest = Guest::attach(&mut vmm, &serial)?;
        Ok(Self {
            front,
            back,
            vmm,
            daemon,
            guest,
            _dir: dir,
        })
    }
}

fn on(direct: bool) -> &'static str {
    if direct { "on" } else { "off" }
}

impl Programs {
    /// The disk as QEMU's programs open it.
    fn blockdev(&self, command: &mut Command, flag: &str) {
        let (image, direct) = (self.image.display(), on(self.direct));
        let file = format!(
            "driver=file,node-name=file,filename={image},aio=io_uring,read-only=on,cache.direct={direct},locking=off"
        );
        command.args([flag, &file]);
        command.args([flag, "driver=raw,node-name=disk,file=file,read-only=on"]);
    }

    /// With an I/O thread, which polls as long as that pays.
    fn storage_daemon(&self, socket: &Path) -> Command {
        let mut command = self.daemons.command("usr/bin/qemu-storage-daemon");
        command.args(["--object", "iothread,id=io"]);
        self.blockdev(&mut command, "--blockdev");
        let socket = socket.display();
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,iothread=io,num-queues={QUEUES},writable=off,addr.type=unix,addr.path={socket}"
        );
        command.args(["--export", &export]);
        command
    }

    fn blkd(&self, socket: &Path) -> Command {
        let (image, direct) = (self.image.display(), on(self.direct));
        let export = format!(
            "name=disk,path={image},socket={},readonly=on,direct={direct},num_queues={QUEUES}",
            socket.display()
        );
        let mut command = Command::new(&self.blkd);
        command.args(["--export", &export]);
        command
    }

    /// A VMM with a guest, without devices yet.
    pub(super) fn vmm(&self, front: Front, serial: &Path) -> Command {
        let serial = serial.display();
        match front {
            Front::Triarch => {
                let mut command = Command::new(&self.triarch);
                command.arg("--kernel").arg(&self.kernel);
                command.args(["--cpus", "boot=1", "--memory", &format!("size={GUEST_MIB}M")]);
                command.args(["--console", "off", "--serial", &format!("socket={serial}")]);
                command
            }
            Front::Qemu => {
                let mut command = self.rig.qemu();
                command.args(["-name", "guest,debug-threads=on", "-accel", "kvm", "-machine", "q35"]);
                // KVM in software does not know the register behind this feature.
                command.args(["-cpu", "host,-arch-capabilities", "-m", &format!("{GUEST_MIB}M")]);
                command.arg("-kernel").arg(&self.kernel).args(["-append", ""]);
                command.args(["-display", "none", "-monitor", "none", "-nodefaults", "-no-user-config"]);
                let serial = format!("socket,id=serial,path={serial},server=on,wait=off");
                command.args(["-chardev", &serial, "-serial", "chardev:serial"]);
                command
            }
        }
    }

    /// A VMM with the disk, by way of the daemon at `socket` if there is one.
    fn with_disk(&self, front: Front, serial: &Path, socket: Option<&Path>) -> Command {
        let mut command = self.vmm(front, serial);
        match (front, socket) {
            (Front::Triarch, Some(socket)) => {
                let disk = format!("vhost_user=on,vhost_socket={},num_queues={QUEUES}", socket.display());
                command.args(["--disk", &format!("{disk},readonly=on")]);
            }
            (Front::Triarch, None) => {
                let (image, direct) = (self.image.display(), on(self.direct));
                let disk = format!("path={image},image_type=raw,direct={direct},num_queues={QUEUES}");
                command.args(["--disk", &format!("{disk},readonly=on")]);
            }
            (Front::Qemu, Some(socket)) => {
                share_memory(&mut command);
                command.args(["-chardev", &format!("socket,id=disk,path={}", socket.display())]);
                command.args([
                    "-device",
                    &format!("vhost-user-blk-pci,chardev=disk,num-queues={QUEUES}"),
                ]);
            }
            (Front::Qemu, None) => {
                command.args(["-object", "iothread,id=io"]);
                self.blockdev(&mut command, "-blockdev");
                let device = format!("virtio-blk-pci,drive=disk,iothread=io,num-queues={QUEUES}");
                command.args(["-device", &device]);
            }
        }
        command
    }
}

/// QEMU's way of letting a daemon reach the guest's memory.
pub(super) fn share_memory(command: &mut Command) {
    let memory = format!("memory-backend-memfd,id=ram,size={GUEST_MIB}M,share=on");
    command.args(["-object", &memory, "-machine", "memory-backend=ram"]);
}

/// Waits until a daemon listens at `socket`; a connection made to find out would be the one it serves.
pub(super) fn wait_for(daemon: &mut Process, socket: &Path) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !listens(&fs::read_to_string("/proc/net/unix")?, socket) {
        let words = daemon.last_words();
        ensure!(daemon.wait(Duration::ZERO).is_err(), "the daemon ended{words}");
        ensure!(Instant::now() < deadline, "the daemon does not listen{words}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether the kernel's list has a socket at this path whose flags say that it accepts connections (`__SO_ACCEPTCON`).
fn listens(list: &str, socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    list.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(3) == Some(&ACCEPTS) && words.get(7).is_some_and(|path| Path::new(path) == socket)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_known_from_one_that_is_only_bound() {
        let list = "Num RefCount Protocol Flags Type St Inode Path\n\
            0000: 00000002 00000000 00010000 0001 01 7 /tmp/a.sock\n\
            0000: 00000002 00000000 00000000 0001 01 8 /tmp/b.sock\n\
            0000: 00000003 00000000 00000000 0001 03 9\n";
        assert!(listens(list, Path::new("/tmp/a.sock")));
        assert!(!listens(list, Path::new("/tmp/b.sock")));
        assert!(!listens(list, Path::new("/tmp/c.sock")));
    }
}
