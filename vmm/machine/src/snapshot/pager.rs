//! Memory that comes from a snapshot, or from the host where the guest was, when somebody first touches it, and by and by all of it.
//!
//! ```text
//!  vCPU, device, system call ──► page that is missing ──► pager: reads the chunk, checks it, provides it, releases it
//!                                                          between two faults: the next chunk, until all are there
//! ```
//!
//! A chunk is the unit because it is what a checksum is of. Once it is provided its faults are the kernel's, so that what is given back
//! later reads as zeroes; what is given back before is noted and not provided.
//!
//! Of a guest that came before all of its memory did ([`coming`]), only some pages are missing. They come in any order, from a thread of the
//! migration, which is told what somebody waits for.
//!
//! Where the file cannot be read, or is not what was saved, nobody who waits for a page goes on: the process ends.

mod coming;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
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
use triarch_migration::PageSet;
use triarch_state::{CHUNK, MemoryRange, PAGE, SavedMemory, SnapshotError, filled};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::build::Report;
use crate::{GuestEvent, MachineError};

const _: () = assert!(CHUNK as u64 == triarch_memory::PART, "chunks are released one by one");

/// Most runs of memory that the kernel has of all that is provided, before all is. Each divides a mapping of the process, which has 65530 of
/// them (vm.max_map_count) and cannot do much without more: take memory, or start a thread. What is there beside these stays with us.
const MAX_RUNS: usize = if cfg!(test) { 16 } else { 8192 };

/// How long the controller has to end the process in order when memory is lost. It may itself wait for a page.
const LAST_WORDS: Duration = Duration::from_secs(3);

pub(crate) use coming::Coming;

/// What the thread is told.
enum Order {
    /// More memory.
    Add(Place, SyncSender<Result<(), Lost>>),
    /// That was all.
    Sealed,
    /// About memory that comes from elsewhere.
    Coming(coming::Order),
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
        let supply = Supply::Saved {
            saved,
            buffer: vec![0; CHUNK],
        };
        Self::begin(Userfault::new()?, supply, sandbox, events, report)
    }

    fn begin(
        userfault: Userfault,
        supply: Supply,
        sandbox: &Arc<dyn Sandbox>,
        events: &Arc<EventLog>,
        report: &Report,
    ) -> Result<Self, MachineError> {
        let failed = MachineError::host("start the thread that provides memory");
        let wake = EventFd::new(EFD_NONBLOCK).map_err(&failed)?;
        let (orders, inbox) = channel();
        let shared = Arc::new(Shared::default());
        let work = Work {
            userfault,
            supply,
            page: Userfault::page_size(),
            places: Vec::new(),
            faults: VecDeque::new(),
            next: (0, 0),
            runs: 0,
            sealed: false,
            wake: wake.try_clone().map_err(&failed)?,
            shared: shared.clone(),
            events: events.clone(),
            report: report.clone(),
        };
        let worker = Worker::spawn("pager", ThreadClass::Pager, sandbox, work, move |work, stop| {
            work.run(inbox, stop);
        });
        Ok(Self {
            orders,
            wake,
            shared,
            worker: Some(worker.map_err(&failed)?),
        })
    }

    /// Has it provide `range` of `memory`, of which nothing is there yet.
    pub(crate) fn add(&self, memory: &GuestMemory, range: &MemoryRange) -> Result<(), MachineError> {
        let pages = range.size.div_ceil(Userfault::page_size());
        self.place(memory, What::Saved(range.clone()), PageSet::all(pages))
    }

    fn place(&self, memory: &GuestMemory, range: What, lacks: PageSet) -> Result<(), MachineError> {
        let (reply, answer) = sync_channel(1);
        let place = Place {
            memory: memory.clone(),
            start: 0,
            released: PageSet::none(range.size().div_ceil(CHUNK as u64)),
            range,
            lacks,
        };
        self.order(Order::Add(place, reply));
        match answer.recv() {
            Ok(Err(Lost::Fault(error))) => Err(error.into()),
            Ok(Err(error)) => Err(MachineError::MemoryLost(triarch_api::chain(&error))),
            Ok(Ok(())) => Ok(()),
            // The thread has ended.
            Err(_) => self.complete(),
        }
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

/// What a place is.
enum What {
    /// A range of a snapshot.
    Saved(MemoryRange),
    /// A whole region, which begins there and has so many bytes.
    Region(u64, u64),
}

impl What {
    fn gpa(&self) -> u64 {
        match self {
            Self::Saved(range) => range.gpa,
            Self::Region(gpa, _) => *gpa,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Saved(range) => range.size,
            Self::Region(_, size) => *size,
        }
    }
}

/// A range that is provided.
struct Place {
    /// Keeps it mapped.
    memory: GuestMemory,
    /// Where it is in this process.
    start: u64,
    range: What,
    /// Pages of the host that are not there.
    lacks: PageSet,
    /// Chunks whose faults are the kernel's.
    released: PageSet,
}

impl Place {
    /// Where chunk `index` begins behind the range's begin, and its bytes.
    fn chunk(&self, index: usize) -> (u64, u64) {
        let at = index as u64 * CHUNK as u64;
        (at, (self.range.size() - at).min(CHUNK as u64))
    }
}

/// Where memory comes from.
enum Supply {
    Saved {
        saved: SavedMemory,
        /// For one chunk.
        buffer: Vec<u8>,
    },
    /// From whoever has the other end of it.
    Coming(Arc<coming::Shared>),
}

/// Why memory is lost.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Saved(#[from] SnapshotError),
    #[error("cannot provide memory")]
    Host(#[from] io::Error),
    #[error(transparent)]
    Fault(#[from] UserfaultError),
}

/// What the thread owns.
struct Work {
    userfault: Userfault,
    supply: Supply,
    /// Bytes of the host's pages.
    page: u64,
    places: Vec<Place>,
    /// Addresses of pages that somebody waits for.
    faults: VecDeque<u64>,
    /// Place and chunk that nobody asked for and that come next.
    next: (usize, usize),
    /// Runs of chunks whose faults are the kernel's.
    runs: usize,
    sealed: bool,
    wake: EventFd,
    shared: Arc<Shared>,
    events: Arc<EventLog>,
    report: Report,
}

impl Work {
    fn run(&mut self, orders: Receiver<Order>, stop: &EventFd) {
        let served = self.serve(&orders, stop);
        let lost = match &served {
            Ok(true) => None,
            Ok(false) => Some("what it lacks is not waited for any more".to_owned()),
            Err(error) => Some(triarch_api::chain(error)),
        };
        self.tell(|standing| (standing.complete, standing.lost) = (lost.is_none(), lost.clone()));
        // Whoever waits for an answer waits no more.
        drop(orders);
        if let Supply::Coming(shared) = &self.supply {
            shared.close();
        }
        match (served, lost) {
            (Ok(true), _) => {
                tracing::info!("all memory is there; where it came from is not needed any more");
                self.events.post(&kind::VM_MEMORY_THERE, &[]);
            }
            (Err(_), Some(reason)) => self.lose(&reason, stop),
            _ => {}
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.changed.notify_all();
    }

    /// Works until all is there, or until `stop` becomes readable; returns whether all is.
    fn serve(&mut self, orders: &Receiver<Order>, stop: &EventFd) -> Result<bool, Lost> {
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
            let (lacks, abandoned) = match &self.supply {
                Supply::Saved { .. } => (pending.is_some(), false),
                Supply::Coming(shared) => (shared.lacks(), shared.is_abandoned()),
            };
            if !lacks && self.sealed || abandoned {
                // What could not be released alone.
                for place in &self.places {
                    self.userfault.release(place.start, place.range.size())?;
                }
                return Ok(!abandoned);
            }
            let busy = pending.is_some() || !self.faults.is_empty();
            let timeout = if busy { 0 } else { -1 };
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
            self.obey(orders);
            self.look()?;
            match (self.faults.pop_front(), pending) {
                (Some(at), _) => self.fault(at)?,
                (None, Some((place, chunk))) => self.provide(place, chunk)?,
                (None, None) => {}
            }
        }
    }

    fn obey(&mut self, orders: &Receiver<Order>) {
        while let Ok(order) = orders.try_recv() {
            match order {
                Order::Sealed => self.sealed = true,
                Order::Coming(order) => self.obey_coming(order),
                Order::Add(place, reply) => {
                    let _ = reply.send(self.add(place));
                }
            }
        }
    }

    fn add(&mut self, mut place: Place) -> Result<(), Lost> {
        // One of another size is refused by whoever compares them all.
        let region_chunks = place.range.size().div_ceil(CHUNK as u64);
        let region = place.memory.find_region(GuestAddress(place.range.gpa()));
        if let Some(region) = region.filter(|region| region.len() == place.range.size()) {
            place.start = region.as_ptr() as u64;
            self.userfault.register(region)?;
            self.places.push(place);
            let (last, chunks) = (self.places.len() - 1, region_chunks);
            if matches!(self.supply, Supply::Coming(_)) {
                self.release_whole(last, 0..chunks)?;
            }
        }
        Ok(())
    }

    /// The next chunk that is not there, of those that nobody else sends.
    fn pending(&mut self) -> Option<(usize, usize)> {
        if matches!(self.supply, Supply::Coming(_)) {
            return None;
        }
        let (place, chunk) = self.next;
        let each = CHUNK as u64 / self.page;
        let found = self.places.iter().enumerate().skip(place).find_map(|(at, known)| {
            let from = if at == place { chunk as u64 * each } else { 0 };
            let first = known.lacks.first(from..u64::MAX)?;
            Some((at, (first.start / each) as usize))
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
                self.there(place, offset, 1);
            }
        }
    }

    /// The pages in these bytes of a place do not lack any more.
    fn there(&mut self, place: usize, offset: u64, len: u64) {
        let pages = offset / self.page..(offset + len).div_ceil(self.page);
        let came = self.places[place].lacks.remove(pages);
        if let Supply::Coming(shared) = &self.supply {
            shared.came(self.places[place].range.gpa() + offset, len, came * self.page);
        }
    }

    /// The place of an address, and how far behind its begin that is.
    fn find(&self, at: u64) -> Option<(usize, u64)> {
        let inside = |place: &Place| {
            at.checked_sub(place.start)
                .filter(|offset| *offset < place.range.size())
        };
        self.places
            .iter()
            .enumerate()
            .find_map(|(index, place)| Some((index, inside(place)?)))
    }

    fn fault(&mut self, at: u64) -> Result<(), Lost> {
        let Some((place, offset)) = self.find(at) else {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        };
        if self.places[place].lacks.contains(offset / self.page) {
            if let Supply::Coming(shared) = &self.supply {
                shared.want(self.places[place].range.gpa() + offset / self.page * self.page);
                return Ok(());
            }
            return self.provide(place, (offset / CHUNK as u64) as usize);
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
        if let (Supply::Saved { saved, buffer }, What::Saved(range)) = (&mut self.supply, &self.places[place].range) {
            // Apart from the rest, since what is given back meanwhile has to be noted.
            let mut buffer = std::mem::take(buffer);
            if let Some(bytes) = saved.chunk(range, at, &mut buffer)? {
                let runs: Vec<_> = match self.page {
                    PAGE => filled(bytes).collect(),
                    _ => std::iter::once(0..bytes.len()).collect(),
                };
                for run in runs {
                    self.copy(place, at + run.start as u64, &bytes[run])?;
                }
            }
            if let Supply::Saved { buffer: kept, .. } = &mut self.supply {
                *kept = buffer;
            }
        }
        self.there(place, at, len);
        let chunk = chunk as u64;
        self.release(place, chunk..chunk + 1)
    }

    /// Faults of these chunks of a place, of which nothing is missing, are the kernel's from now on, unless it has too many runs of them. Whoever
    /// waits for a page there goes on.
    fn release(&mut self, place: usize, chunks: Range<u64>) -> Result<(), Lost> {
        let known = &self.places[place];
        let (start, released) = (known.start + chunks.start * CHUNK as u64, &known.released);
        let len = (chunks.end * CHUNK as u64).min(known.range.size()) - chunks.start * CHUNK as u64;
        let beside = |chunk: Option<u64>| usize::from(chunk.is_some_and(|chunk| released.contains(chunk)));
        let joined = beside(chunks.start.checked_sub(1)) + beside(Some(chunks.end));
        if joined == 0 && self.runs >= MAX_RUNS {
            // Whoever waits asks again, for what is there or zeroes.
            return Ok(self.userfault.wake(start, len)?);
        }
        self.runs = (self.runs + 1).saturating_sub(joined);
        // Runs join in the kernel only if their mapping had its anon_vma before it was divided, which a page that is put there gives it.
        if self.places[place].released.count() == 0 {
            self.zero(start)?;
        }
        self.places[place].released.insert(chunks);
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

    /// Provides `bytes` at `offset` of a place, but for pages that it does not lack: they are there, or were given back.
    fn copy(&mut self, place: usize, offset: u64, bytes: &[u8]) -> Result<(), Lost> {
        let mut at = 0;
        while at < bytes.len() as u64 {
            let known = &self.places[place];
            let first = (offset + at) / self.page;
            let end = (offset + bytes.len() as u64).div_ceil(self.page);
            let Some(run) = known.lacks.first(first..end) else {
                break;
            };
            at = run.start * self.page - offset;
            let to = (run.end * self.page - offset).min(bytes.len() as u64);
            let done = self
                .userfault
                .copy(known.start + offset + at, &bytes[at as usize..to as usize])? as u64;
            self.there(place, offset + at, done);
            at += done;
            if at < to {
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
