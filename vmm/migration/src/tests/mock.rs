//! A guest that is memory and a thread that writes to it, and two hosts for it.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use triarch_device_core::{NoSandbox, Sandbox};
use triarch_state::{Kind, Payloads};

use crate::{
    Address, Blocker, Cause, Deadlines, Destination, DestinationError, DestinationOptions, DevicePart, Guest, Handed,
    Handle, Inlet, Limits, MAX_BLOCKERS, Memory, Moved, NotMoved, Offer, Outlet, PAGE, Part, Region, Sink, Source,
    SourceOptions, Taken, Target,
};

pub(super) const KIND: Kind = Kind::new("mock", 1);
pub(super) const P: usize = PAGE as usize;

/// Memory of two regions that touch, and one that does not.
pub(super) struct MockMemory {
    regions: Vec<Region>,
    /// Of each region.
    bytes: Vec<Mutex<Vec<u8>>>,
    touched: Mutex<BTreeSet<u64>>,
    /// Pages written since the log was fetched; none: there is no log.
    log: Mutex<Option<BTreeSet<u64>>>,
}

impl MockMemory {
    pub(super) fn new(regions: &[Region]) -> Arc<Self> {
        let bytes = |region: &Region| Mutex::new(vec![0; region.len as usize]);
        Arc::new(Self {
            regions: regions.to_vec(),
            bytes: regions.iter().map(bytes).collect(),
            touched: Mutex::default(),
            log: Mutex::default(),
        })
    }

    fn at(&self, gpa: u64, len: usize) -> (&Mutex<Vec<u8>>, Range<usize>) {
        let index = self.regions.iter().position(|region| {
            let end = region.gpa + region.len;
            region.gpa <= gpa && gpa + len as u64 <= end
        });
        let index = index.unwrap_or_else(|| panic!("{len} bytes at {gpa:#x} are not in one region"));
        let start = (gpa - self.regions[index].gpa) as usize;
        (&self.bytes[index], start..start + len)
    }

    /// The guest writes.
    pub(super) fn store(&self, gpa: u64, bytes: &[u8]) {
        let (region, range) = self.at(gpa, bytes.len());
        region.lock().unwrap()[range].copy_from_slice(bytes);
        for page in gpa / PAGE..(gpa + bytes.len() as u64).div_ceil(PAGE) {
            self.touched.lock().unwrap().insert(page);
            if let Some(log) = &mut *self.log.lock().unwrap() {
                log.insert(page);
            }
        }
    }

    /// Fills `pages` of every region with what depends on where they are.
    pub(super) fn fill(&self, pages: u64) {
        for region in &self.regions {
            for page in 0..pages.min(region.len / PAGE) {
                let gpa = region.gpa + page * PAGE;
                let byte = |n: usize| (gpa / PAGE) as u8 ^ (n as u8).wrapping_mul(31) | 1;
                self.store(gpa, &(0..P).map(byte).collect::<Vec<_>>());
            }
        }
    }

    pub(super) fn equals(&self, other: &Self) -> bool {
        let pairs = self.bytes.iter().zip(&other.bytes);
        self.regions == other.regions && pairs.into_iter().all(|(a, b)| *a.lock().unwrap() == *b.lock().unwrap())
    }

    pub(super) fn is_logging(&self) -> bool {
        self.log.lock().unwrap().is_some()
    }
}

impl Memory for MockMemory {
    fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (region, range) = self.at(gpa, buffer.len());
        buffer.copy_from_slice(&region.lock().unwrap()[range]);
        Ok(())
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let touched = self.touched.lock().unwrap();
        let first = touched.range(range.start / PAGE..range.end / PAGE).next().copied();
        Ok(first.map(|first| {
            let mut end = first + 1;
            while end < range.end / PAGE && touched.contains(&end) {
                end += 1;
            }
            first * PAGE..end * PAGE
        }))
    }

    fn outlet(&self) -> Option<&dyn Outlet> {
        Some(self)
    }

    fn start_log(&self) -> io::Result<()> {
        *self.log.lock().unwrap() = Some(BTreeSet::new());
        Ok(())
    }

    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
        let fetched = self.log.lock().unwrap().replace(BTreeSet::new());
        let page = |page: u64| page * PAGE..(page + 1) * PAGE;
        Ok(fetched.expect("a log").into_iter().map(page).collect())
    }

    fn stop_log(&self) {
        *self.log.lock().unwrap() = None;
    }
}

impl Target for MockMemory {
    fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        // One page after the other: runs may have been made of two regions only by mistake.
        let (region, range) = self.at(gpa, bytes.len());
        region.lock().unwrap()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.write(gpa, &vec![0; len as usize])
    }

    fn inlet(&self) -> Option<&dyn Inlet> {
        Some(self)
    }
}

/// Bytes that go at once: neither whole pages nor whole runs.
const AT_ONCE: u64 = 3 * PAGE + 777;

impl Outlet for MockMemory {
    fn send(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (gpa, len) = runs[0];
        let mut bytes = vec![0; len.min(AT_ONCE) as usize];
        self.read(gpa, &mut bytes)?;
        Ok(send(socket, &bytes, SendFlags::NOSIGNAL)?)
    }
}

impl Inlet for MockMemory {
    fn expect(&self, runs: &[(u64, u64)]) {
        for (gpa, len) in runs {
            let _ = self.at(*gpa, *len as usize);
        }
    }

    fn receive(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (gpa, len) = runs[0];
        let mut bytes = vec![0; len.min(AT_ONCE) as usize];
        let (came, _) = recv(socket, &mut bytes[..], RecvFlags::empty())?;
        self.write(gpa, &bytes[..came])?;
        Ok(came)
    }
}

/// What must hold of a guest with two hosts, whoever does what.
#[derive(Default)]
pub(super) struct World {
    pub(super) source_runs: AtomicBool,
    pub(super) destination_runs: AtomicBool,
    source_locks: AtomicBool,
    destination_locks: AtomicBool,
    pub(super) aborted: AtomicBool,
    pub(super) throttled: Mutex<Vec<u8>>,
    pub(super) pauses: AtomicU64,
    /// What devices are, as it came.
    pub(super) devices: Mutex<Vec<(u16, Vec<u8>)>>,
}

impl World {
    fn check(&self) {
        let both = |a: &AtomicBool, b: &AtomicBool| a.load(Ordering::SeqCst) && b.load(Ordering::SeqCst);
        assert!(!both(&self.source_runs, &self.destination_runs), "two run");
        assert!(!both(&self.source_locks, &self.destination_locks), "two have the locks");
    }

    pub(super) fn running(&self) -> (bool, bool) {
        let get = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        (get(&self.source_runs), get(&self.destination_runs))
    }
}

/// What may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fails {
    Nothing,
    Save,
    /// Its devices tell nothing.
    Device,
    /// The destination's do not want it.
    LoadDevice,
    ReleaseLocks,
    Prepare,
    Restore,
    Run,
    /// And the source cannot take them back either.
    RunAndTakeLocks,
}

fn fail(what: &str) -> Result<(), Cause> {
    Err(what.to_owned().into())
}

pub(super) struct MockGuest {
    pub(super) world: Arc<World>,
    /// Whoever writes holds it for reading and looks whether the guest runs.
    pub(super) runs: Arc<RwLock<bool>>,
    pub(super) fails: Fails,
    /// How long it takes to write its disks out before it is paused.
    pub(super) writes_out: Duration,
    /// How long it takes to pause.
    pub(super) stops: Duration,
    /// How long a read of its devices takes.
    pub(super) tells: Duration,
    /// What devices are, before it is paused and after.
    pub(super) devices: Vec<(DevicePart, Vec<u8>)>,
    pub(super) paused_devices: Vec<(DevicePart, Vec<u8>)>,
}

impl MockGuest {
    pub(super) fn new(world: &Arc<World>, fails: Fails) -> Self {
        world.source_runs.store(true, Ordering::SeqCst);
        world.source_locks.store(true, Ordering::SeqCst);
        Self {
            world: world.clone(),
            runs: Arc::new(RwLock::new(true)),
            fails,
            writes_out: Duration::ZERO,
            stops: Duration::ZERO,
            tells: Duration::ZERO,
            devices: Vec::new(),
            paused_devices: Vec::new(),
        }
    }
}

impl Guest for MockGuest {
    fn before_pause(&mut self) {
        thread::sleep(self.writes_out);
    }

    fn pause(&mut self) -> Result<(), Cause> {
        *self.runs.write().unwrap() = false;
        thread::sleep(self.stops);
        assert!(self.world.source_runs.swap(false, Ordering::SeqCst), "paused twice");
        self.world.pauses.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn save(&mut self) -> Result<Payloads, Cause> {
        if self.fails == Fails::Save {
            fail("a device has no state")?;
        }
        let mut payloads = Payloads::default();
        payloads.put(KIND, "first", &vec![7; 100])?;
        Ok(payloads)
    }

    fn release_locks(&mut self) -> Result<(), Cause> {
        if self.fails == Fails::ReleaseLocks {
            fail("a lock is stuck")?;
        }
        assert!(self.world.source_locks.swap(false, Ordering::SeqCst));
        Ok(())
    }

    fn take_locks(&mut self) -> Result<(), Cause> {
        if self.fails == Fails::RunAndTakeLocks {
            fail("somebody else has the lock")?;
        }
        self.world.source_locks.store(true, Ordering::SeqCst);
        self.world.check();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Cause> {
        assert!(self.world.source_locks.load(Ordering::SeqCst), "resumed without locks");
        assert!(!self.world.source_runs.swap(true, Ordering::SeqCst), "resumed twice");
        self.world.check();
        *self.runs.write().unwrap() = true;
        Ok(())
    }

    fn devices_ahead(&mut self) -> u64 {
        self.devices.iter().map(|(part, _)| part.len as u64).sum()
    }

    fn devices_size(&mut self) -> u64 {
        self.paused_devices.iter().map(|(part, _)| part.len as u64).sum()
    }

    fn read_devices(&mut self, buffer: &mut [u8]) -> Result<Option<DevicePart>, Cause> {
        thread::sleep(self.tells);
        let paused = self.world.pauses.load(Ordering::SeqCst) > 0;
        if paused && self.fails == Fails::Device {
            fail("the device gpu cannot tell its state")?;
        }
        let from = match self.devices.is_empty() && paused {
            true => &mut self.paused_devices,
            false => &mut self.devices,
        };
        let Some((part, bytes)) = (!from.is_empty()).then(|| from.remove(0)) else {
            return Ok(None);
        };
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(Some(part))
    }

    fn throttle(&mut self, percent: u8) -> Result<(), Cause> {
        self.world.throttled.lock().unwrap().push(percent);
        Ok(())
    }
}

/// One of many things that are in the way.
pub(super) fn blocker(number: usize) -> Blocker {
    Blocker {
        what: Part::Cpu,
        name: format!("feature{number}"),
        reason: "this host has none".into(),
        remedy: String::new(),
    }
}

pub(super) struct MockSink {
    pub(super) world: Arc<World>,
    pub(super) memory: Option<Arc<MockMemory>>,
    pub(super) fails: Fails,
    /// Files of memory that came.
    pub(super) handed: Option<Handed>,
    restored: bool,
}

impl MockSink {
    pub(super) fn new(world: &Arc<World>, fails: Fails) -> Self {
        Self {
            world: world.clone(),
            memory: None,
            fails,
            handed: None,
            restored: false,
        }
    }
}

impl Sink for MockSink {
    fn prepare(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause> {
        assert_eq!((offer.config, offer.cpu), (&b"config"[..], &b"cpu"[..]));
        if self.fails == Fails::Prepare {
            fail("this host has no avx512_vnni")?;
        }
        self.handed = handed;
        let memory = MockMemory::new(offer.layout.regions());
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn check(&mut self, offer: &Offer<'_>, _handed: Option<Handed>) -> Vec<Blocker> {
        assert_eq!((offer.config, offer.cpu), (&b"config"[..], &b"cpu"[..]));
        match self.fails {
            Fails::Prepare => (0..2 * MAX_BLOCKERS).map(blocker).collect(),
            _ => Vec::new(),
        }
    }

    fn load_device(&mut self, device: u16, begins: bool, part: &[u8]) -> Result<(), Cause> {
        if self.fails == Fails::LoadDevice {
            fail("the device gpu cannot take the state that came")?;
        }
        let mut devices = self.world.devices.lock().unwrap();
        if begins {
            devices.retain(|(number, _)| *number != device);
            devices.push((device, Vec::new()));
        }
        let found = devices.iter_mut().find(|(number, _)| *number == device);
        found.ok_or("it has not begun")?.1.extend_from_slice(part);
        Ok(())
    }

    fn restore(&mut self, mut state: Payloads) -> Result<(), Cause> {
        if self.fails == Fails::Restore {
            fail("a device is missing")?;
        }
        assert_eq!(state.take::<Vec<u8>>(KIND, "first")?, [7; 100]);
        state.finish()?;
        self.restored = true;
        Ok(())
    }

    fn take_locks_and_run(&mut self) -> Result<(), Cause> {
        assert!(self.restored && !self.world.aborted.load(Ordering::SeqCst));
        if matches!(self.fails, Fails::Run | Fails::RunAndTakeLocks) {
            fail("the lock is somebody else's")?;
        }
        self.world.destination_locks.store(true, Ordering::SeqCst);
        self.world.destination_runs.store(true, Ordering::SeqCst);
        self.world.check();
        Ok(())
    }

    fn abort(&mut self, _why: &str) {
        assert!(
            !self.world.destination_runs.load(Ordering::SeqCst),
            "aborted while it runs"
        );
        assert!(!self.world.aborted.swap(true, Ordering::SeqCst), "aborted twice");
        self.memory = None;
    }
}

/// Writes to memory while the guest runs: what `page` says for the number of a write, and the bytes it becomes.
pub(super) struct Dirtier {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Dirtier {
    pub(super) fn start(
        memory: &Arc<MockMemory>,
        guest: &MockGuest,
        pause: Duration,
        page: impl Fn(u64) -> (u64, u8) + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, memory, runs) = (stop.clone(), memory.clone(), guest.runs.clone());
        let thread = thread::spawn(move || {
            let mut writes = 0;
            while !stopped.load(Ordering::SeqCst) {
                if *runs.read().unwrap() {
                    let guard = runs.read().unwrap();
                    if *guard {
                        let (gpa, byte) = page(writes);
                        memory.store(gpa, &[byte; P]);
                        writes += 1;
                    }
                }
                thread::sleep(pause);
            }
            writes
        });
        Self { stop, thread }
    }

    pub(super) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("no panic")
    }
}

/// Deadlines that tests need not wait for.
pub(super) fn deadlines() -> Deadlines {
    Deadlines {
        connect: Duration::from_secs(8),
        message: Duration::from_secs(20),
        silence: Duration::from_secs(20),
        outcome: Duration::from_secs(20),
    }
}

pub(super) fn source_options(address: &Address) -> SourceOptions {
    SourceOptions {
        address: address.clone(),
        tls: None,
        streams: 2,
        hand_over: false,
        compress: false,
        post_copy: None,
        limits: Limits {
            // Machines that run tests may be slow: who wants it short says so.
            downtime: Duration::from_secs(30),
            ..Limits::default()
        },
        deadlines: deadlines(),
        vmm: "1.0".into(),
    }
}

pub(super) fn destination_options(address: &Address) -> DestinationOptions {
    DestinationOptions {
        address: address.clone(),
        tls: None,
        deadlines: deadlines(),
        vmm: "1.1".into(),
    }
}

pub(super) fn regions() -> Vec<Region> {
    let region = |gpa: u64, pages: u64| Region {
        gpa: gpa * PAGE,
        len: pages * PAGE,
    };
    vec![region(0, 1024), region(1024, 512), region(1 << 20, 512)]
}

/// What both sides say in the end.
pub(super) struct End {
    pub(super) source: Result<Moved, NotMoved>,
    pub(super) destination: Result<Taken, DestinationError>,
    pub(super) world: Arc<World>,
    /// At the destination.
    pub(super) memory: Option<Arc<MockMemory>>,
}

/// Moves `guest` to a destination that listens already; `through` is where the source connects to instead of there.
pub(super) fn migrate(
    destination: Destination,
    sink_fails: Fails,
    options: SourceOptions,
    memory: &Arc<MockMemory>,
    guest: &mut MockGuest,
    handle: &Handle,
) -> End {
    let world = guest.world.clone();
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let theirs = (MockSink::new(&world, sink_fails), sandbox.clone());
    let takes = thread::spawn(move || {
        let (mut sink, sandbox) = theirs;
        let taken = destination.run(&mut sink, &Handle::new(None), &sandbox);
        (taken, sink.memory)
    });
    let source = Source::new(options, memory.clone(), handle, &sandbox).expect("a source");
    let source = source.run(guest, b"config", b"cpu");
    let (destination, memory) = takes.join().expect("no panic");
    End {
        source,
        destination,
        world,
        memory,
    }
}

/// A directory with a socket's path in it.
pub(super) fn socket() -> (tempfile::TempDir, Address) {
    let dir = tempfile::tempdir().expect("a directory");
    let address = Address::Unix(dir.path().join("migration.sock"));
    (dir, address)
}
