//! QEMU as the front end of our storage daemon: a Linux of Debian's on a disk that `triarch-blkd` serves, and a machine that boots from one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use triarch_harness::process::Process;

use super::suites::Programs;
use super::tally::{Tally, Verdict};
use crate::arch::Arch;
use crate::host::{self, Host, Kind, Options};
use crate::qemu::DISK_QUEUES;
use crate::root::Rig;
use crate::tools;

type Test = fn(&Path) -> Result<()>;
const TESTS: [(&str, Test); 2] = [
    ("nested::qemu::blkd_serves_qemu", serve),
    ("nested::qemu::blkd_boots_qemu", boot),
];
const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
/// What each round writes.
const PART: u64 = 8;
/// How often the daemon is killed.
const KILLS: u64 = 5;
/// How long a boot may take.
const BOOT: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);

/// Runs the tests that are asked for.
pub fn run(filters: &[String], programs: &Programs, tally: &mut Tally) {
    for (name, test) in TESTS {
        if !super::selected(filters, name) {
            continue;
        }
        let start = Instant::now();
        let verdict = match test(&programs.blkd()) {
            Ok(()) => Verdict::Passed,
            Err(error) => Verdict::Failed(format!("{error:#}")),
        };
        tally.add(name, verdict, Some(start.elapsed()));
    }
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

/// What SeaBIOS finds in the first sector, and runs at 0x7c00. It reads sector 7 with the same BIOS that read it, prints what is there to
/// port 0xe9 up to the first zero, writes it to sector 9, and ends QEMU by port 0xf4.
#[rustfmt::skip]
const BOOT_SECTOR: [u8; 80] = [
    0xea, 0x05, 0x7c, 0x00, 0x00,           // ljmp 0, begin
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0,     // begin: xor ax, ax; mov ds, ax; mov ss, ax
    0xbc, 0x00, 0x7c, 0xbe, 0x40, 0x7c,     // mov sp, 0x7c00; mov si, packet
    0xb4, 0x42, 0xcd, 0x13, 0x72, 0x22,     // mov ah, 0x42 (extended read); int 0x13; jc fails
    0x88, 0xd3, 0xbe, 0x00, 0x7e,           // mov bl, dl; mov si, 0x7e00
    0xac, 0x84, 0xc0, 0x74, 0x04,           // next: lodsb; test al, al; jz ends
    0xe6, 0xe9, 0xeb, 0xf7,                 // out 0xe9, al; jmp next
    0xbe, 0x40, 0x7c, 0xc6, 0x44, 8, 9,     // ends: mov si, packet; mov byte [si + 8], 9
    0x88, 0xda, 0xb8, 0x00, 0x43,           // mov dl, bl; mov ax, 0x4300 (extended write)
    0xcd, 0x13, 0x72, 0x04,                 // int 0x13; jc fails
    0xb0, GOOD, 0xeb, 0x02, 0xb0, BAD,      // mov al, GOOD; jmp leaves; fails: mov al, BAD
    0xe6, 0xf4, 0xf4, 0xeb, 0xfd,           // leaves: out 0xf4, al; hlt; jmp to it
    16, 0, 1, 0, 0x00, 0x7e, 0, 0,          // packet: 16 bytes, one sector, to 0:0x7e00,
    7, 0, 0, 0, 0, 0, 0, 0,                 // number 7
];
/// What the boot sector ends QEMU with; its exit code is twice that, and one more.
const GOOD: u8 = 0x10;
const BAD: u8 = 0x11;

/// QEMU's firmware boots a machine from the daemon's disk: what runs is what the daemon was given.
fn boot(program: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let daemon = Daemon::start(program, dir.path())?;
    let file = File::options().read(true).write(true).open(&daemon.image)?;
    file.write_all_at(&BOOT_SECTOR, 0)?;
    file.write_all_at(&[0x55, 0xaa], 510)?;
    // No other run says the same.
    let said = format!("served by triarch-blkd to {}", dir.path().display());
    file.write_all_at(said.as_bytes(), 7 * 512)?;
    let printed = dir.path().join("printed");
    let mut command = Rig::get(Arch::X86_64)?.qemu();
    command.args(["-accel", "tcg", "-machine", "q35,memory-backend=ram", "-m", "64M"]);
    command.args(["-object", "memory-backend-memfd,id=ram,size=64M,share=on"]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-monitor",
        "none",
    ]);
    for (flag, value) in [
        ("-chardev", format!("socket,id=disk,path={}", daemon.socket.display())),
        (
            "-device",
            format!("vhost-user-blk-pci,chardev=disk,num-queues={DISK_QUEUES},bootindex=0"),
        ),
        ("-chardev", format!("file,id=printed,path={}", printed.display())),
        ("-device", "isa-debugcon,iobase=0xe9,chardev=printed".to_owned()),
        ("-device", "isa-debug-exit,iobase=0xf4,iosize=4".to_owned()),
    ] {
        command.args([flag, &value]);
    }
    let ended = Process::start(&mut command)?.wait(BOOT)?;
    let read = std::fs::read_to_string(&printed).unwrap_or_default();
    let good = i32::from(GOOD) * 2 + 1;
    ensure!(
        ended.code() == Some(good),
        "QEMU: {ended}; the boot sector printed '{read}'"
    );
    ensure!(read == said, "it printed '{read}', not '{said}'");
    let mut written = vec![0; said.len()];
    file.read_exact_at(&mut written, 9 * 512)?;
    ensure!(written == said.as_bytes(), "it wrote something else");
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
