//! QEMU as the front end of our storage daemon: a Linux of Debian's on a disk that `triarch-blkd` serves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::suites::Programs;
use super::tally::{Tally, Verdict};
use crate::host::{self, Host, Kind, Options};
use crate::qemu::DISK_QUEUES;
use crate::tools;

const NAME: &str = "nested::qemu::blkd_serves_qemu";
const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
/// What each round writes.
const PART: u64 = 8;
/// How often the daemon is killed.
const KILLS: u64 = 5;
const SOON: Duration = Duration::from_secs(10);

/// Runs the test, if it is asked for.
pub fn run(filters: &[String], programs: &Programs, tally: &mut Tally) {
    if !super::selected(filters, NAME) {
        return;
    }
    let start = Instant::now();
    let verdict = match serve(&programs.blkd()) {
        Ok(()) => Verdict::Passed,
        Err(error) => Verdict::Failed(format!("{error:#}")),
    };
    tally.add(NAME, verdict, Some(start.elapsed()));
}

/// A daemon that ends with this.
struct Daemon {
    program: PathBuf,
    image: PathBuf,
    socket: PathBuf,
    child: Child,
}

impl Daemon {
    fn start(program: &Path, dir: &Path) -> Result<Self> {
        let (image, socket) = (dir.join("disk"), dir.join("disk.sock"));
        File::create(&image)?.set_len(DISK)?;
        let child = spawn(program, &image, &socket)?;
        Ok(Self {
            program: program.to_owned(),
            image,
            socket,
            child,
        })
    }

    /// Kills it, and starts another one.
    fn replace(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(&self.program, &self.image, &self.socket)?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, image: &Path, socket: &Path) -> Result<Child> {
    // A killed one leaves it behind.
    let _ = std::fs::remove_file(socket);
    let export = format!(
        "name=root,path={},socket={},num_queues={DISK_QUEUES}",
        image.display(),
        socket.display()
    );
    let mut command = Command::new(program);
    let child = command
        .args(["--export", &export, "--log-level", "warn"])
        .stdin(Stdio::null());
    let mut child = child.spawn().context("cannot start the daemon")?;
    let deadline = Instant::now() + SOON;
    while !socket.exists() {
        ensure!(child.try_wait()?.is_none(), "the daemon ended at once");
        ensure!(Instant::now() < deadline, "the daemon does not listen");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child)
}

fn serve(program: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut daemon = Daemon::start(program, dir.path())?;
    let options = Options {
        memory_mib: 512,
        vhost_disk: Some(daemon.socket.clone()),
        ..Options::default()
    };
    host::with_host(Kind::Amd, &options, |host| {
        describes(host)?;
        carries(host, &daemon)?;
        survives(host, &mut daemon)
    })
}

/// The guest sees the disk as it is.
fn describes(host: &Host) -> Result<()> {
    let read =
        |file: &str| Ok::<_, anyhow::Error>(host.shell(&format!("cat /sys/block/vda/{file}"))?.trim().to_owned());
    ensure!(read("size")? == (DISK / 512).to_string(), "size");
    ensure!(read("queue/write_cache")? == "write back", "write cache");
    ensure!(read("queue/discard_max_bytes")? != "0", "discards");
    ensure!(read("queue/write_zeroes_max_bytes")? != "0", "write-zeroes");
    let queues = host.shell("ls /sys/block/vda/mq | wc -l")?;
    // One CPU uses one of them.
    ensure!(queues.trim() == "1", "{queues} queues");
    Ok(())
}

/// What it writes is in the file, and what is in the file it reads.
fn carries(host: &Host, daemon: &Daemon) -> Result<()> {
    let file = File::options().read(true).write(true).open(&daemon.image)?;
    let ours: Vec<u8> = (0..MIB).map(|n| (n * 7 + n / 251) as u8).collect();
    file.write_all_at(&ours, 3 * MIB)?;
    let read = host.shell("dd if=/dev/vda bs=1M skip=3 count=1 iflag=direct 2>/dev/null | md5sum")?;
    let expected = sum(dir_of(daemon), &ours)?;
    ensure!(read.starts_with(&expected), "the guest reads {read}, not {expected}");
    make(host, 0)?;
    write(host, 0)?;
    check(host, daemon, 0)
}

/// Makes a part of random data.
fn make(host: &Host, part: u64) -> Result<()> {
    let script = format!("dd if=/dev/urandom of=/tmp/{part} bs=1M count={PART} 2>/dev/null");
    host.shell(&script).map(drop)
}

/// Writes it, past the guest's page cache.
fn write(host: &Host, part: u64) -> Result<()> {
    let at = part * PART * 256;
    let script = format!("dd if=/tmp/{part} of=/dev/vda bs=4k seek={at} oflag=direct conv=fsync 2>/dev/null");
    host.shell(&script).map(drop)
}

/// The part is in the image as the guest wrote it.
fn check(host: &Host, daemon: &Daemon, part: u64) -> Result<()> {
    let expected = host.shell(&format!("md5sum < /tmp/{part}; rm /tmp/{part}"))?;
    let mut data = vec![0; (PART * MIB) as usize];
    File::open(&daemon.image)?.read_exact_at(&mut data, part * PART * MIB)?;
    let found = sum(dir_of(daemon), &data)?;
    ensure!(
        expected.starts_with(&found),
        "part {part} has the sum {found}, not {expected}"
    );
    Ok(())
}

/// Nothing is lost when the daemon is killed under load.
fn survives(host: &Host, daemon: &mut Daemon) -> Result<()> {
    for round in 0..KILLS {
        let part = 1 + round;
        make(host, part)?;
        std::thread::scope(|scope| -> Result<()> {
            let load = scope.spawn(|| write(host, part));
            std::thread::sleep(Duration::from_millis(150 + 50 * round));
            ensure!(!load.is_finished(), "the load was over before the kill");
            daemon.replace()?;
            load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
        })
        .with_context(|| format!("kill {round}"))?;
        check(host, daemon, part)?;
    }
    Ok(())
}

fn dir_of(daemon: &Daemon) -> &Path {
    daemon.image.parent().unwrap_or(Path::new("."))
}

/// The MD5 sum, as the guest's tool computes it.
fn sum(dir: &Path, data: &[u8]) -> Result<String> {
    let file = dir.join("sum");
    std::fs::write(&file, data)?;
    let text = tools::output(Command::new("md5sum").arg(&file))?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
