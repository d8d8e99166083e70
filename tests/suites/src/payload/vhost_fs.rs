//! What virtiofsd knows of a guest goes to another one, as in a migration: there is none yet, so the device is driven without a VM.

use super::data::pattern;
use crate::storage::soon;
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use triarch_device_core::{NoSandbox, Sandbox};
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_vhost_user::{
    DaemonFs, DataPath, LinkStatus, OnDisconnect, PageLog, Peer, PeerOptions, StateLimits, VhostUser,
};
use triarch_virtio::mock::{Desc, FakeDriver};
use triarch_virtio::{VirtQueue, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("vhost_fs::open_files_move_to_another_daemon", open_files_move)
        .without_kvm()
        .within(LONG),
];

const LONG: Duration = Duration::from_secs(60);
const PROGRAM: &str = "virtiofsd";
const SIZE: usize = 4 * PIECE;
/// What is read and written at once.
const PIECE: usize = 64 << 10;
/// The queue for requests; there is one more, for urgent ones.
const REQUESTS: u16 = 1;
const QUEUE_SIZE: u16 = 64;
/// GPAs of a request and of its answer.
const REQUEST: u64 = 0x80_0000;
const ANSWER: u64 = 0xa0_0000;
/// virtiofsd fills all of it when it reads, however much it is asked for.
const ROOM: u32 = (OUT_HEADER + PIECE) as u32;
/// FUSE's messages (linux/fuse.h).
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const ROOT: u64 = 1;
const OUT_HEADER: usize = 16;
const READ_WRITE: u32 = 2;

fn open_files_move(context: &Context) -> Result<Outcome> {
    let Ok(program) = context.images.path(PROGRAM) else {
        return Ok(Outcome::Skipped(format!("there is no {PROGRAM} among the images")));
    };
    let dir = tempfile::Builder::new().prefix("files").tempdir_in(&context.dir)?;
    let shared = dir.path().join("shared");
    fs::create_dir_all(shared.join("deep"))?;
    fs::write(shared.join("deep/file"), pattern(3, 0, SIZE))?;
    let host = Host {
        program,
        socket: dir.path().join("fs.sock"),
        shared,
    };
    let mut guest = Guest::new();
    let mut first = Served::start(&host, &mut guest, None)?;
    let file = guest.open()?;
    guest.reads(file, 0)?;
    // As a migration does: it tells the daemon to log what it writes, which begins to collect what it knows.
    let log = PageLog::new(&guest.drivers[0].context(0).memory.memory(), &[], None)?;
    first.device.handle().start_log(&Arc::new(log))?;
    guest.reads(file, 1)?;
    guest.stop(&mut first.device)?;
    let mut state = Vec::new();
    let saved = first.device.save_state(&mut state, &StateLimits::default())?;
    ensure!(saved == state.len() as u64 && saved > 0, "{saved} bytes");
    first.end()?;
    // One that knows nothing knows no file.
    let mut ignorant = Served::start(&host, &mut guest, None)?;
    let unknown = guest
        .read(file, 2)
        .err()
        .context("it reads a file that it does not know")?;
    ensure!(unknown.to_string().contains("error"), "{unknown:#}");
    guest.stop(&mut ignorant.device)?;
    ignorant.end()?;
    let mut second = Served::start(&host, &mut guest, Some(&state))?;
    guest
        .reads(file, 2)
        .with_context(|| format!("the daemon's last words:{}", second.daemon.last_words()))?;
    guest.write(file, 3, &pattern(4, 0, PIECE))?;
    ensure!(
        fs::read(host.shared.join("deep/file"))?[3 * PIECE..] == pattern(4, 0, PIECE),
        "the host reads something else"
    );
    guest.stop(&mut second.device)?;
    second.end()?;
    Ok(Outcome::Passed)
}

/// What is shared, and how.
struct Host {
    program: PathBuf,
    socket: PathBuf,
    shared: PathBuf,
}

/// A device and its daemon.
struct Served {
    device: VhostUser,
    daemon: Process,
}

impl Served {
    /// Lets the guest's queues be served by a daemon that is given `state`.
    fn start(host: &Host, guest: &mut Guest, state: Option<&[u8]>) -> Result<Self> {
        let daemon = daemon(host)?;
        let device = device(&host.socket, guest, state);
        let device = device.with_context(|| format!("the daemon's last words:{}", daemon.last_words()))?;
        Ok(Self { device, daemon })
    }

    /// virtiofsd ends with its front end.
    fn end(self) -> Result<()> {
        let Self { device, mut daemon } = self;
        drop(device);
        let status = daemon.wait(soon())?;
        daemon.expect(status, 0)
    }
}

fn daemon(host: &Host) -> Result<Process> {
    let _ = fs::remove_file(&host.socket);
    let mut command = Command::new(&host.program);
    command.arg(format!("--socket-path={}", host.socket.display()));
    command.arg(format!("--shared-dir={}", host.shared.display()));
    command.args(["--sandbox=chroot", "--inode-file-handles=never"]);
    // By their paths it finds the files again; where it does not, it must say so.
    command.args(["--migration-mode=find-paths", "--migration-on-error=abort"]);
    let daemon = Process::start(&mut command)?;
    let deadline = Instant::now() + soon();
    while !host.socket.exists() {
        ensure!(Instant::now() < deadline, "it does not listen{}", daemon.last_words());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(daemon)
}

fn device(socket: &Path, guest: &mut Guest, state: Option<&[u8]>) -> Result<VhostUser> {
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let options = PeerOptions {
        endpoint: socket.to_owned().into(),
        on_disconnect: OnDisconnect::Stall,
        data_path: DataPath::Auto,
    };
    let kind = Arc::new(DaemonFs::new("shared", 1, QUEUE_SIZE));
    let peer = Peer::open("_fs0", options, kind, None, &sandbox)?;
    let mut device = VhostUser::new("_fs0", peer, &sandbox, Arc::new(|_: &LinkStatus| {}))?;
    device.activate(guest.drivers[0].context(0))?;
    if let Some(mut state) = state {
        let length = state.len() as u64;
        let loaded = device.load_state(&mut state, &StateLimits::default())?;
        ensure!(loaded == length, "{loaded} bytes");
    }
    for queue in guest.queues.drain(..) {
        device.start_queue(queue)?;
    }
    Ok(device)
}

/// A driver of the file system. It outlives its devices.
struct Guest {
    drivers: [FakeDriver; 2],
    /// Those of a device that stopped, or is to come.
    queues: Vec<VirtQueue>,
    unique: u64,
}

/// A file that it has open.
#[derive(Clone, Copy)]
struct File {
    node: u64,
    handle: u64,
}

impl Guest {
    fn new() -> Self {
        let urgent = FakeDriver::sharing(QUEUE_SIZE, false);
        let requests = FakeDriver::beside(&urgent, REQUESTS);
        let drivers = [urgent, requests];
        let queues = drivers.iter().map(FakeDriver::queue).collect();
        Self {
            drivers,
            queues,
            unique: 0,
        }
    }

    /// Takes the queues back.
    fn stop(&mut self, device: &mut VhostUser) -> Result<()> {
        for index in 0..=REQUESTS {
            let queue = device.stop_queue(index).context("a queue does not stop")?;
            self.queues.push(queue);
        }
        Ok(())
    }

    /// What the daemon answers.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>> {
        self.unique += 1;
        let length = 40 + body.len() as u32;
        let mut request = Vec::new();
        request.extend(length.to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        // By root, of no process.
        request.extend([0; 16]);
        request.extend(body);
        let driver = &mut self.drivers[usize::from(REQUESTS)];
        driver.ram().write_slice(&request, GuestAddress(REQUEST))?;
        let head = driver.add(&[Desc::readable(REQUEST, length), Desc::writable(ANSWER, ROOM)]);
        driver.kick();
        let (used, bytes) = driver.wait_used().context("no answer")?;
        ensure!(used == head && bytes as usize >= OUT_HEADER, "{bytes} bytes for {used}");
        let mut answer = vec![0; bytes as usize];
        driver.ram().read_slice(&mut answer, GuestAddress(ANSWER))?;
        let error = i32::from_le_bytes(answer[4..8].try_into()?);
        ensure!(number(&answer, 8)? == self.unique, "an answer to something else");
        if error != 0 {
            bail!("message {opcode} has the error {error}");
        }
        Ok(answer.split_off(OUT_HEADER))
    }

    /// Mounts the file system and opens the file.
    fn open(&mut self) -> Result<File> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        // Version 7.31, 1 MiB read ahead, and no more than every driver can.
        self.ask(INIT, 0, &words(&[7, 31, 1 << 20, 0]))?;
        let directory = number(&self.ask(LOOKUP, ROOT, b"deep\0")?, 0)?;
        let node = number(&self.ask(LOOKUP, directory, b"file\0")?, 0)?;
        let handle = number(&self.ask(OPEN, node, &words(&[READ_WRITE, 0]))?, 0)?;
        Ok(File { node, handle })
    }

    /// What the file has at piece `n`.
    fn read(&mut self, file: File, n: u64) -> Result<Vec<u8>> {
        self.ask(READ, file.node, &range(file, n))
    }

    /// The same, which must be right.
    fn reads(&mut self, file: File, n: u64) -> Result<()> {
        let wanted = &pattern(3, 0, SIZE)[n as usize * PIECE..][..PIECE];
        ensure!(self.read(file, n)? == wanted, "the guest reads something else");
        Ok(())
    }

    fn write(&mut self, file: File, n: u64, data: &[u8]) -> Result<()> {
        let mut body = range(file, n);
        body.extend(data);
        let answer = self.ask(WRITE, file.node, &body)?;
        ensure!(number(&answer, 0)? as u32 == PIECE as u32, "not all was written");
        Ok(())
    }
}

/// `fuse_read_in` and `fuse_write_in` of piece `n`.
fn range(file: File, n: u64) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(file.handle.to_le_bytes());
    body.extend((n * PIECE as u64).to_le_bytes());
    body.extend((PIECE as u32).to_le_bytes());
    body.resize(40, 0);
    body
}

fn number(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).context("a short answer")?;
    Ok(u64::from_le_bytes(field.try_into()?))
}
