//! The thread that serves one queue.
#![allow(unsafe_code)] // hands guest memory to the disk engine

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use triarch_block::{Disk, IoBuf, IoQueue, Op, SERIAL_LEN};
use triarch_device_core::RateLimit;
use triarch_memory::GuestMemory;
use vm_memory::Bytes;
use vm_memory::atomic::GuestMemoryLoadGuard;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::polling::{Looks, Window};
use super::request::{self, Parsed, Request, Segments, Status};
use crate::{Chain, Segment, VirtQueue, iovecs, mark_written};

/// What a worker waits for: the driver's notification, completions, the order to stop.
const KICK: u64 = 1;
const DONE: u64 = 2;
const STOP: u64 = 4;

/// A request in flight.
struct Pending {
    head: u16,
    status: Segment,
    /// Where a read puts its data; empty for all else.
    filled: Segments,
    filled_len: u32,
    /// Keeps the memory mapped that the engine has addresses of.
    memory: GuestMemoryLoadGuard<GuestMemory>,
}

/// One queue and all that serving it takes. It is the worker's while that runs.
pub(super) struct QueueWorker {
    // First, so that it is dropped first: that waits for operations on memory which `lane` keeps mapped.
    io: Box<dyn IoQueue>,
    lane: Lane,
    epoll: Epoll,
    window: Window,
    looks: Arc<Looks>,
}

/// What completions need, apart from the engine's queue that delivers them.
struct Lane {
    queue: VirtQueue,
    disk: Arc<Disk>,
    id: Arc<str>,
    features: u64,
    cache: Arc<Cache>,
    /// Requests by the tag the engine knows them by. It grows with what was ever in flight at once, because most disks never
    /// have a queue full.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Tags there may be.
    depth: usize,
    /// Something was completed since the driver was told last.
    completed: bool,
    log: RateLimit,
}

/// What the threads of one disk share.
pub(super) struct Common {
    pub(super) disk: Arc<Disk>,
    pub(super) id: Arc<str>,
    pub(super) features: u64,
    pub(super) cache: Arc<Cache>,
    /// How long to look for work before sleeping, at most.
    pub(super) look: Duration,
    pub(super) looks: Arc<Looks>,
}

/// The write cache as the driver sees it.
pub(super) struct Cache {
    /// Writes may stay in a cache until the driver flushes.
    pub(super) writeback: AtomicBool,
    /// The driver switched the cache off and counts on what it holds being flushed. The first worker to see this does it.
    pub(super) flush: AtomicBool,
}

impl QueueWorker {
    /// Prepares to serve `queue` through `io`, whose depth is at least 1.
    pub(super) fn new(queue: VirtQueue, io: Box<dyn IoQueue>, common: &Common) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let readable = |what| EpollEvent::new(EventSet::IN, what);
        epoll.ctl(ControlOperation::Add, queue.kick().as_raw_fd(), readable(KICK))?;
        epoll.ctl(ControlOperation::Add, io.completion_fd().as_raw_fd(), readable(DONE))?;
        if let Some(alarm) = io.alarm_fd() {
            epoll.ctl(ControlOperation::Add, alarm.as_raw_fd(), readable(DONE))?;
        }
        let depth = io.depth();
        let lane = Lane {
            queue,
            disk: Arc::clone(&common.disk),
            id: Arc::clone(&common.id),
            features: common.features,
            cache: Arc::clone(&common.cache),
            pending: Vec::with_capacity(depth),
            free: Vec::with_capacity(depth),
            depth,
            completed: false,
            log: RateLimit::default(),
        };
        Ok(Self {
            io,
            lane,
            epoll,
            window: Window::new(common.look),
            looks: Arc::clone(&common.looks),
        })
    }

    /// Gives the queue back once nothing is in flight.
    pub(super) fn into_queue(self) -> VirtQueue {
        self.lane.queue
    }

    /// Serves the queue until `stop` becomes readable, then finishes what is in flight.
    pub(super) fn run(&mut self, stop: &EventFd) {
        let event = EpollEvent::new(EventSet::IN, STOP);
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event) {
            return tracing::error!(disk = %self.lane.id, %error, "cannot wait for work, the queue stands still");
        }
        // Kept, so that a request allocates nothing.
        let mut vecs = Vec::new();
        // Before the first wait, chains may be there and the notification gone.
        let mut fired = KICK;
        while fired & STOP == 0 {
            if fired & KICK != 0 {
                let _ = self.lane.queue.kick().read();
            }
            self.lane.flush_if_wanted(&mut *self.io);
            let more = self.serve(&mut vecs);
            // Much completes at once (the page cache, the plain backend), so look before waiting.
            if fired & DONE != 0 || self.io.in_flight() > 0 {
                let lane = &mut self.lane;
                self.io.completions(&mut |tag, result| lane.finish(tag, &result));
            }
            self.lane.signal();
            fired = match self.rest(more) {
                Ok(fired) => fired,
                Err(error) => {
                    tracing::error!(disk = %self.lane.id, %error, "cannot wait for work, the queue stands still");
                    break;
                }
            };
        }
        let lane = &mut self.lane;
        if let Err(error) = self.io.drain(&mut |tag, result| lane.finish(tag, &result)) {
            tracing::error!(disk = %lane.id, %error, "cannot wait for operations in flight");
        }
        self.lane.signal();
    }

    /// Waits for something to do, or only sees what there is if there may be `more` in the ring. Returns what is readable.
    fn rest(&mut self, more: bool) -> io::Result<u64> {
        if more && self.lane.has_room() {
            return self.wait(true);
        }
        if !self.window.is_allowed() {
            return self.wait(false);
        }
        let begun = Instant::now();
        if !self.window.now().is_zero() {
            let found = self.look(begun + self.window.now());
            self.looks.count(found);
            if found {
                // Also an order to stop is seen, however much work there is.
                return self.wait(true);
            }
        }
        // From here on the driver is to notify; what it offered until then it need not have.
        if self.lane.has_room() && self.lane.queue.arm() {
            return self.wait(true);
        }
        let fired = self.wait(false)?;
        self.window.adapt(begun.elapsed());
        Ok(fired)
    }

    /// Looks for work until there is some or it is `end`. Returns whether there is.
    fn look(&mut self, end: Instant) -> bool {
        loop {
            let offered = self.lane.has_room() && self.lane.queue.has_more();
            if offered || self.io.in_flight() > 0 && self.io.ready() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Waits for something to do, or only looks if `busy`. Returns what is readable.
    fn wait(&mut self, busy: bool) -> io::Result<u64> {
        let mut events = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(if busy { 0 } else { -1 }, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        Ok(events.iter().take(count).fold(0, |fired, event| fired | event.data()))
    }

    /// Starts the requests there are, as far as the engine has room, and not more than a queue full: a driver that goes on and
    /// on must not keep the worker from stopping. Returns whether there may be more.
    pub(super) fn serve(&mut self, vecs: &mut Vec<libc::iovec>) -> bool {
        self.lane.queue.disarm();
        let mut more = true;
        for _ in 0..self.lane.queue.size() {
            // Without room the next completion leads back here, and notifications would not help.
            if !self.lane.has_room() {
                break;
            }
            if let Some(chain) = self.lane.queue.pop() {
                self.lane.start(&chain, &mut *self.io, vecs);
            } else if self.window.is_allowed() || !self.lane.queue.arm() {
                // Whoever looks first needs no notification yet.
                more = false;
                break;
            }
        }
        if let Err(error) = self.io.kick() {
            let message = format_args!("operations wait, the kernel takes none: {error}");
            self.lane.warn(&message);
        }
        more
    }
}

impl Lane {
    /// Whether the engine takes another operation.
    fn has_room(&self) -> bool {
        !self.free.is_empty() || self.pending.len() < self.depth
    }

    /// A tag for an operation, if there is room.
    fn take_tag(&mut self) -> Option<usize> {
        if self.free.is_empty() && self.pending.len() < self.depth {
            self.pending.push(None);
            return Some(self.pending.len() - 1);
        }
        self.free.pop()
    }

    /// Flushes when the driver switched the cache off. The tag it uses has no pending request.
    fn flush_if_wanted(&mut self, io: &mut dyn IoQueue) {
        if !self.cache.flush.load(Relaxed) || !self.has_room() || !self.cache.flush.swap(false, Relaxed) {
            return;
        }
        if let Some(tag) = self.take_tag()
            && io.submit(&Op::Flush, tag as u64).is_err()
        {
            // Cannot be: there are as many tags as the engine has room for.
            self.free.push(tag);
        }
    }

    fn start(&mut self, chain: &Chain, io: &mut dyn IoQueue, vecs: &mut Vec<libc::iovec>) {
        let memory = self.queue.memory();
        let parsed = match request::parse(chain, &memory, self.features) {
            Ok(parsed) => parsed,
            Err(fault) => return self.queue.fault(&fault),
        };
        let Parsed {
            request,
            data,
            len,
            room,
            status,
        } = parsed;
        let request = match request {
            Ok(Request::GetId) => return self.get_id(chain, &memory, status),
            Ok(request) => request,
            Err(code) => return self.answer(&memory, chain.head(), status, code, 0, room),
        };
        vecs.clear();
        let moves = matches!(request, Request::Read { .. } | Request::Write { .. });
        if moves && iovecs(&memory, &data, vecs).is_err() {
            return self.answer(&memory, chain.head(), status, Status::IoErr, 0, room);
        }
        let Some(tag) = self.take_tag() else {
            // Cannot be: `serve` looked.
            return self.queue.unpop();
        };
        // SAFETY: the vectors lie in guest memory, which `memory` keeps mapped until the completion is handled,
        // or longer: `io` is dropped before the pending requests are. Guest memory has no Rust references into it.
        let bufs = unsafe { IoBuf::from_iovecs(vecs) };
        let durable = !self.cache.writeback.load(Relaxed);
        let op = match request {
            Request::Read { offset } => Op::Read { offset, bufs },
            Request::Write { offset } => Op::Write { offset, bufs, durable },
            Request::Discard { offset, len } => Op::Discard { offset, len, durable },
            Request::WriteZeroes { offset, len, unmap } => Op::WriteZeroes {
                offset,
                len,
                unmap,
                durable,
            },
            Request::Flush | Request::GetId => Op::Flush,
        };
        let (filled, filled_len) = match request {
            Request::Read { .. } => (data, len),
            _ => (Segments::new(), room),
        };
        let pending = Pending {
            head: chain.head(),
            status,
            filled,
            filled_len,
            memory,
        };
        self.pending[tag] = Some(pending);
        if io.submit(&op, tag as u64).is_err() {
            // Cannot be: there are as many tags as the engine has room for.
            self.finish(tag as u64, &Err(io::ErrorKind::ResourceBusy.into()));
        }
    }

    /// Handles a completion.
    fn finish(&mut self, tag: u64, result: &io::Result<u64>) {
        let tag = tag as usize;
        self.free.push(tag);
        let Some(done) = self.pending.get_mut(tag).and_then(Option::take) else {
            if let Err(error) = result {
                self.warn(&format_args!(
                    "flushing the cache that was switched off failed: {error}"
                ));
            }
            return;
        };
        let read = !done.filled.is_empty();
        // A failed read may have written some of the memory too.
        if read {
            mark_written(&done.memory, &done.filled, done.filled_len);
        }
        let (code, written) = match result {
            Ok(_) if read => (Status::Ok, done.filled_len),
            Ok(_) => (Status::Ok, 0),
            Err(error) => {
                self.warn(&format_args!("an operation failed: {error}"));
                (Status::IoErr, 0)
            }
        };
        self.answer(&done.memory, done.head, done.status, code, written, done.filled_len);
    }

    /// Writes the serial number, padded with zeroes to 20 bytes, as far as there is room.
    fn get_id(&mut self, chain: &Chain, memory: &GuestMemory, status: Segment) {
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(self.disk.serial().bytes()) {
            *to = from;
        }
        let mut writer = chain.writer(memory);
        let room = writer.left().saturating_sub(1);
        let len = room.min(SERIAL_LEN as u32);
        let code = match writer.write_all(&serial[..len as usize]) {
            Ok(()) => Status::Ok,
            Err(_) => Status::IoErr,
        };
        self.answer(memory, chain.head(), status, code, len, room);
    }

    /// Ends a request. `written` of the `room` bytes before the status were written: the length given to the driver counts
    /// only what was written without a gap (virtio 1.2, 2.7.8.2).
    fn answer(&mut self, memory: &GuestMemory, head: u16, status: Segment, code: Status, written: u32, room: u32) {
        if memory.write_obj(code as u8, status.addr).is_err() {
            return self.queue.fault(&crate::RingFault::Inaccessible);
        }
        let length = if written == room {
            written.saturating_add(1)
        } else {
            written
        };
        self.queue.complete(head, length);
        self.completed = true;
    }

    /// Tells the driver, once for all that was completed.
    fn signal(&mut self) {
        if std::mem::take(&mut self.completed) {
            self.queue.signal();
        }
    }

    fn warn(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(disk = %self.id, queue = self.queue.index(), held_back, "{message}");
        }
    }
}
