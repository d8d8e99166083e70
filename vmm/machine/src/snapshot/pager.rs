//! Memory that comes from a snapshot when somebody first touches it, and by and by all of it.
//!
//! ```text
//!  vCPU, device, system call ──► page that is missing ──► pager: reads the chunk, checks it, provides it, releases it
//!                                                          between two faults: the next chunk, until all are there
//! ```
//!
//! A chunk is the unit because it is what a checksum is of. Once it is provided its faults are the kernel's, so that what is given back
//! later reads as zeroes; what is given back before is noted and not provided.
//!
//! Where the file cannot be read, or is not what was saved, nobody who waits for a page goes on: the process ends.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use triarch_api::events::{EventLog, kind};
use triarch_device_core::{Sandbox, ThreadClass, Worker};
use triarch_memory::{Fault, GuestMemory, Userfault, UserfaultError};
use triarch_state::{CHUNK, MemoryRange, PAGE, SavedMemory, SnapshotError, filled};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::build::Report;
use crate::{GuestEvent, MachineError};

/// How long the controller has to end the process in order when memory is lost. It may itself wait for a page.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// What the thread is told.
enum Order {
    /// More memory.
    Add(Place, SyncSender<Result<(), UserfaultError>>),
    /// That was all.
    Sealed,
}

/// How far it is.
#[derive(Default)]
struct Standing {
    complete: bool,
    lost: Option<String>,
}

#[derive(Default)]
struct Shared {
    standing: Mutex<Standing>,
    changed: Condvar,
}

/// The thread that provides memory, called `pager`. It ends when all is there, or when this is dropped: nobody may use the memory then.
pub(crate) struct Pager {
    orders: Sender<Order>,
    wake: EventFd,
    shared: Arc<Shared>,
    worker: Option<Worker<Work>>,
}

impl Pager {
    /// Begins without memory, of what `saved` has. When all is there, or that cannot be, `events` and `report` are told.
    pub(crate) fn start(
        saved: SavedMemory,
        sandbox: &Arc<dyn Sandbox>,
        events: &Arc<EventLog>,
        report: &Report,
    ) -> Result<Self, MachineError> {
        let userfault = Userfault::new()?;
        let failed = MachineError::host("start the thread that provides memory");
        let wake = EventFd::new(EFD_NONBLOCK).map_err(&failed)?;
        let (orders, inbox) = channel();
        let shared = Arc::new(Shared::default());
        let work = Work {
            userfault,
            saved,
            buffer: vec![0; CHUNK],
            page: Userfault::page_size(),
            places: Vec::new(),
            removed: BTreeMap::new(),
            faults: VecDeque::new(),
            next: (0, 0),
            sealed: false,
            orders: inbox,
            wake: wake.try_clone().map_err(&failed)?,
            shared: shared.clone(),
            events: events.clone(),
            report: report.clone(),
        };
        let worker = Worker::spawn("pager", ThreadClass::Pager, sandbox, work, Work::run).map_err(&failed)?;
        Ok(Self {
            orders,
            wake,
            shared,
            worker: Some(worker),
        })
    }

    /// Has it provide `range` of `memory`, of which nothing is there yet.
    pub(crate) fn add(&self, memory: &GuestMemory, range: &MemoryRange) -> Result<(), MachineError> {
        let chunks = range.size.div_ceil(CHUNK as u64) as usize;
        let (reply, answer) = sync_channel(1);
        let place = Place {
            memory: memory.clone(),
            start: 0,
            range: range.clone(),
            done: vec![false; chunks],
        };
        self.order(Order::Add(place, reply));
        // It is lost when the thread has ended, which says why itself.
        answer.recv().unwrap_or(Ok(()))?;
        Ok(())
    }

    /// There is no more.
    pub(crate) fn seal(&self) {
        self.order(Order::Sealed);
    }

    fn order(&self, order: Order) {
        let _ = self.orders.send(order);
        let _ = self.wake.write(1);
    }

    /// Whether all is there.
    pub(crate) fn is_complete(&self) -> bool {
        let standing = self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner);
        standing.complete
    }

    /// Waits until all is there.
    pub(crate) fn complete(&self) -> Result<(), MachineError> {
        let standing = self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |standing: &mut Standing| !standing.complete && standing.lost.is_none();
        let standing = self.shared.changed.wait_while(standing, waits);
        match &standing.unwrap_or_else(PoisonError::into_inner).lost {
            Some(reason) => Err(MachineError::MemoryLost(reason.clone())),
            None => Ok(()),
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

/// A range that is provided.
struct Place {
    /// Keeps it mapped.
    memory: GuestMemory,
    /// Where it is in this process.
    start: u64,
    range: MemoryRange,
    /// Chunks that are there.
    done: Vec<bool>,
}

impl Place {
    /// Where chunk `index` begins behind the range's begin, and its bytes.
    fn chunk(&self, index: usize) -> (u64, u64) {
        let at = index as u64 * CHUNK as u64;
        (at, (self.range.size - at).min(CHUNK as u64))
    }
}

/// Why memory is lost.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Saved(#[from] SnapshotError),
    #[error("cannot provide memory")]
    Host(#[from] io::Error),
}

/// What the thread owns.
struct Work {
    userfault: Userfault,
    saved: SavedMemory,
    /// For one chunk.
    buffer: Vec<u8>,
    /// Bytes of the host's pages.
    page: u64,
    places: Vec<Place>,
    /// Pages that were given back before their chunk was there, by place and chunk.
    removed: BTreeMap<(usize, usize), Vec<bool>>,
    /// Addresses of pages that somebody waits for.
    faults: VecDeque<u64>,
    /// Place and chunk that nobody asked for and that come next.
    next: (usize, usize),
    sealed: bool,
    orders: Receiver<Order>,
    wake: EventFd,
    shared: Arc<Shared>,
    events: Arc<EventLog>,
    report: Report,
}

impl Work {
    fn run(&mut self, stop: &EventFd) {
        match self.serve(stop) {
            Ok(true) => {
                tracing::info!("all memory is there; the snapshot is not needed any more");
                self.tell(|standing| standing.complete = true);
                self.events.post(&kind::VM_MEMORY_THERE, &[]);
            }
            Ok(false) => {}
            Err(error) => self.lose(&triarch_api::chain(&error), stop),
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.changed.notify_all();
    }

    /// Works until all is there, or until `stop` becomes readable; returns whether all is.
    fn serve(&mut self, stop: &EventFd) -> Result<bool, Lost> {
        let epoll = Epoll::new()?;
        let watch = |fd: RawFd| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64));
        let own = [
            self.userfault.as_fd().as_raw_fd(),
            self.wake.as_raw_fd(),
            stop.as_raw_fd(),
        ];
        own.into_iter().try_for_each(watch)?;
        let mut events = [EpollEvent::default(); 3];
        loop {
            let pending = self.pending();
            if pending.is_none() && self.sealed {
                // What could not be released alone.
                for place in &self.places {
                    self.userfault.release(place.start, place.range.size)?;
                }
                return Ok(true);
            }
            let timeout = if pending.is_some() { 0 } else { -1 };
            let count = match epoll.wait(timeout, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                other => other?,
            };
            if events
                .iter()
                .take(count)
                .any(|event| event.data() == stop.as_raw_fd() as u64)
            {
                return Ok(false);
            }
            let _ = self.wake.read();
            self.obey();
            self.look()?;
            match (self.faults.pop_front(), pending) {
                (Some(at), _) => self.fault(at)?,
                (None, Some((place, chunk))) => self.provide(place, chunk)?,
                (None, None) => {}
            }
        }
    }

    fn obey(&mut self) {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Sealed => self.sealed = true,
                Order::Add(place, reply) => {
                    let _ = reply.send(self.add(place));
                }
            }
        }
    }

    fn add(&mut self, mut place: Place) -> Result<(), UserfaultError> {
        // One of another size is refused by whoever compares them all.
        let region = place.memory.find_region(GuestAddress(place.range.gpa));
        if let Some(region) = region.filter(|region| region.len() == place.range.size) {
            place.start = region.as_ptr() as u64;
            self.userfault.register(region)?;
            self.places.push(place);
        }
        Ok(())
    }

    /// The next chunk that is not there.
    fn pending(&mut self) -> Option<(usize, usize)> {
        let (place, chunk) = self.next;
        let first = |from: usize, done: &[bool]| done.iter().skip(from).position(|done| !done).map(|at| from + at);
        let found = self.places.iter().enumerate().skip(place).find_map(|(at, known)| {
            let from = if at == place { chunk } else { 0 };
            first(from, &known.done).map(|chunk| (at, chunk))
        });
        self.next = found.unwrap_or((self.places.len(), 0));
        found
    }

    /// Takes note of what threads wait for and of what they gave back.
    fn look(&mut self) -> Result<(), Lost> {
        for fault in self.userfault.faults()? {
            match fault {
                Fault::Missing(at) => self.faults.push_back(at),
                Fault::Removed(range) => self.remove(range),
            }
        }
        Ok(())
    }

    fn remove(&mut self, range: Range<u64>) {
        for at in range.step_by(PAGE as usize) {
            if let Some((place, offset)) = self.find(at) {
                let chunk = (offset / CHUNK as u64) as usize;
                if !self.places[place].done[chunk] {
                    let pages = self.removed.entry((place, chunk));
                    let pages = pages.or_insert_with(|| vec![false; CHUNK / PAGE as usize]);
                    pages[(offset % CHUNK as u64 / PAGE) as usize] = true;
                }
            }
        }
    }

    /// The place of an address, and how far behind its begin that is.
    fn find(&self, at: u64) -> Option<(usize, u64)> {
        let inside = |place: &Place| at.checked_sub(place.start).filter(|offset| *offset < place.range.size);
        self.places
            .iter()
            .enumerate()
            .find_map(|(index, place)| Some((index, inside(place)?)))
    }

    fn fault(&mut self, at: u64) -> Result<(), Lost> {
        let Some((place, offset)) = self.find(at) else {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        };
        let chunk = (offset / CHUNK as u64) as usize;
        if !self.places[place].done[chunk] {
            return self.provide(place, chunk);
        }
        // It came when that was not over yet, or the chunk could not be released.
        self.zero(at / self.page * self.page)
    }

    fn zero(&mut self, at: u64) -> Result<(), Lost> {
        while !self.userfault.zero(at, self.page)? {
            self.look()?;
            thread::yield_now();
        }
        Ok(())
    }

    /// Provides a chunk.
    fn provide(&mut self, place: usize, chunk: usize) -> Result<(), Lost> {
        let (at, len) = self.places[place].chunk(chunk);
        let start = self.places[place].start + at;
        // Apart from the rest, since what is given back meanwhile has to be noted.
        let mut buffer = std::mem::take(&mut self.buffer);
        if let Some(bytes) = self.saved.chunk(&self.places[place].range, at, &mut buffer)? {
            let runs: Vec<_> = match self.page {
                PAGE => filled(bytes).collect(),
                _ => std::iter::once(0..bytes.len()).collect(),
            };
            for run in runs {
                self.copy((place, chunk), start, bytes, run)?;
            }
        }
        self.buffer = buffer;
        self.places[place].done[chunk] = true;
        self.removed.remove(&(place, chunk));
        match self.userfault.release(start, len) {
            // The process has too many mappings: what is missing of it is provided piece by piece.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                for at in (start..start + len).step_by(self.page as usize) {
                    self.zero(at)?;
                }
                Ok(())
            }
            done => Ok(done?),
        }
    }

    /// Provides the pages `run` of a chunk, but for those that were given back.
    fn copy(&mut self, key: (usize, usize), start: u64, bytes: &[u8], run: Range<usize>) -> Result<(), Lost> {
        let mut at = run.start;
        while at < run.end {
            let removed = self.removed.get(&key);
            let gone = |at: usize| removed.is_some_and(|pages| pages[at / PAGE as usize]);
            if gone(at) {
                at += self.page as usize;
                continue;
            }
            let pages = (at..run.end).step_by(self.page as usize);
            let end = pages.skip(1).find(|at| gone(*at)).unwrap_or(run.end);
            let done = self.userfault.copy(start + at as u64, &bytes[at..end])?;
            at += done;
            if at < end {
                // Somebody gives memory back, and waits until that is noted.
                self.look()?;
                thread::yield_now();
            }
        }
        Ok(())
    }

    /// The guest cannot go on. Whoever waits for a page waits until the process has ended.
    fn lose(&mut self, reason: &str, stop: &EventFd) {
        let error = MachineError::MemoryLost(reason.to_owned()).to_string();
        tracing::error!("{error}");
        self.events.post(&kind::VM_FAILED, &[("error", error.as_str().into())]);
        self.tell(|standing| standing.lost = Some(reason.to_owned()));
        (self.report)(GuestEvent::MemoryLost(reason.to_owned()));
        let deadline = std::time::Instant::now() + LAST_WORDS;
        while std::time::Instant::now() < deadline {
            if stop.read().is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        // The controller waits for a page.
        crate::restore_terminal();
        eprintln!("triarch: {error}");
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use triarch_memory::{Discarder, GuestMemoryHandle, RamOptions, allocate};
    use triarch_state::{About, Part, Payloads, Snapshot, SnapshotWriter, Source};
    use vm_memory::{Bytes, GuestAddressSpace};

    use super::*;

    const MIB: u64 = 1 << 20;
    const START: u64 = 1 << 32;
    const SIZE: u64 = 3 * CHUNK as u64 / 2;
    const RANGE: Range<u64> = START..START + SIZE;

    struct Sevens;

    impl Source for Sevens {
        fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
            Ok(Some(range.start..range.end.min(START + SIZE - 4096)).filter(|run| !run.is_empty()))
        }

        fn read(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
            bytes.fill(7);
            Ok(())
        }
    }

    /// A snapshot whose bytes are 7, but for its last page.
    fn saved(dir: &std::path::Path) -> Snapshot {
        let mut writer = SnapshotWriter::create(dir).expect("a directory");
        let part = Part {
            range: RANGE,
            pages: None,
        };
        writer.memory(vec![part], &Sevens, |_, _| {}).expect("memory");
        let about = About {
            vmm: "1".into(),
            arch: "x".into(),
            id: None,
            base: None,
        };
        writer.finish(b"{}", &about, Payloads::default()).expect("a snapshot");
        Snapshot::open(dir, "x").expect("a snapshot")
    }

    /// What the thread would own, in the hands of a test; `None` where the host does not let us.
    fn work(snapshot: &Snapshot, memory: &GuestMemory) -> Option<Work> {
        let userfault = match Userfault::new() {
            Err(UserfaultError::Forbidden(error)) => {
                eprintln!("not tried: {error}");
                return None;
            }
            other => other.expect("userfaultfd"),
        };
        let mut work = Work {
            userfault,
            saved: snapshot.saved_memory().expect("a file"),
            buffer: vec![0; CHUNK],
            page: Userfault::page_size(),
            places: Vec::new(),
            removed: BTreeMap::new(),
            faults: VecDeque::new(),
            next: (0, 0),
            sealed: true,
            orders: channel().1,
            wake: EventFd::new(EFD_NONBLOCK).expect("an event"),
            shared: Arc::default(),
            events: EventLog::new(),
            report: Arc::new(|_| {}),
        };
        let range = snapshot.ranges()[0].clone();
        let done = vec![false; 2];
        let memory = memory.clone();
        let place = Place {
            memory,
            start: 0,
            range,
            done,
        };
        work.add(place).expect("registered");
        Some(work)
    }

    fn memory(shared: bool) -> (GuestMemoryHandle, RamOptions) {
        let options = RamOptions {
            shared,
            ..RamOptions::default()
        };
        let memory = allocate(&[(GuestAddress(START), SIZE)], &options).expect("memory");
        (GuestMemoryHandle::new(memory), options)
    }

    #[test]
    fn what_is_given_back_before_it_came_is_zeroes() {
        let dir = tempfile::tempdir().expect("a directory");
        let snapshot = saved(dir.path());
        for shared in [false, true] {
            let (memory, options) = memory(shared);
            let Some(mut work) = work(&snapshot, &memory.memory()) else {
                return;
            };
            let discarder = Discarder::new(memory.clone(), options).expect("a page size");
            let discard = thread::spawn(move || {
                let first = discarder.discard(GuestAddress(START + 8192), 8192);
                (first.expect("discard"), discarder)
            });
            while work.removed.is_empty() {
                work.look().expect("faults");
            }
            let (len, discarder) = discard.join().expect("discarded");
            assert_eq!(len, 8192);
            while let Some((place, chunk)) = work.pending() {
                work.provide(place, chunk).expect("provided");
            }
            let map = memory.memory();
            let byte = |at| map.read_obj::<u8>(GuestAddress(START + at)).expect("memory");
            let found = [0, 8191, 8192, 16383, 16384, SIZE - 4097, SIZE - 4096].map(byte);
            assert_eq!(found, [7, 7, 0, 0, 7, 7, 0], "shared {shared}");
            // Afterwards nobody is asked.
            discarder.discard(GuestAddress(START + MIB), 4096).expect("discard");
            assert_eq!([MIB - 1, MIB, MIB + 4096].map(byte), [7, 0, 7]);
            assert!(work.removed.is_empty() && work.userfault.faults().expect("faults").is_empty());
        }
    }

    #[test]
    fn whoever_waits_for_lost_memory_gets_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let snapshot = saved(dir.path());
        let (memory, _) = memory(false);
        let Some(mut work) = work(&snapshot, &memory.memory()) else {
            return;
        };
        let file = std::fs::File::options()
            .write(true)
            .open(dir.path().join("memory-ranges"));
        file.expect("a file").set_len(CHUNK as u64 + 5).expect("cut");
        let waiting = thread::spawn(move || memory.memory().read_obj::<u8>(GuestAddress(START + SIZE - 1)));
        while work.faults.is_empty() {
            work.look().expect("faults");
        }
        let at = work.faults.pop_front().expect("a fault");
        let lost = work.fault(at).expect_err("cut short");
        assert!(triarch_api::chain(&lost).contains("memory-ranges"), "{lost}");
        assert!(!waiting.is_finished(), "it read something");
        // What is lost is lost when the process ends; here the kernel provides it.
        drop(work);
        waiting.join().expect("no panic").expect("memory");
    }
}
