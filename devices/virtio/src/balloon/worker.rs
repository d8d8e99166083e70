//! The balloon's thread.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use triarch_device_core::RateLimit;
use triarch_memory::Discarder;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::pages::{HugePages, runs};
use super::shared::Shared;
use super::statistics::{BalloonStatistics, ENTRY};
use super::{BALLOON_PAGE, Role};
use crate::wait::{Waiter, stopping};
use crate::{Chain, RingFault, VirtQueue};

/// Most page numbers of one request, so that no request takes long; Linux sends 256.
const MAX_PAGES: u32 = 64 << 10;
/// Most statistics of one buffer: a multiple of what there are.
const MAX_STATISTICS: u32 = 64;

/// What the thread owns.
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) discarder: Discarder,
    pub(super) huge: HugePages,
    pub(super) queues: Vec<(Role, VirtQueue)>,
    /// The buffer for statistics, which is the device's until it wants new ones.
    pub(super) statistics: Option<u16>,
    pub(super) log: RateLimit,
}

impl Job {
    /// Takes a queue out, as far as it was worked off.
    pub(super) fn take_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let at = self.queues.iter().position(|(_, queue)| queue.index() == index)?;
        let (role, mut queue) = self.queues.remove(at);
        if role == Role::Statistics && self.statistics.take().is_some() && !queue.faulted() {
            // Nothing was popped behind it. Whoever starts the queue finds it again.
            queue.unpop();
        }
        Some(queue)
    }

    pub(super) fn forget_driver(&mut self) {
        self.queues.clear();
        self.statistics = None;
        self.huge.clear();
    }

    pub(super) fn run(&mut self, stop: &EventFd) {
        if let Err(error) = self.work(stop) {
            tracing::error!("the balloon cannot wait and stops: {error}");
        }
    }

    fn work(&mut self, stop: &EventFd) -> io::Result<()> {
        let kicks = self.queues.iter().map(|(_, queue)| queue.kick().as_raw_fd());
        let fds: Vec<_> = kicks
            .chain([stop.as_raw_fd(), self.shared.refresh.as_raw_fd()])
            .collect();
        let waiter = Waiter::new(&fds)?;
        loop {
            let mut more = false;
            for at in 0..self.queues.len() {
                if stopping(stop) {
                    return Ok(());
                }
                // One request of each queue in turn: no queue keeps the others or our end waiting.
                more |= self.serve(at);
            }
            self.ask_for_statistics();
            if more || self.queues.iter_mut().any(|(_, queue)| queue.arm()) {
                continue;
            }
            waiter.wait();
            // A notification that came is answered by looking at the queues.
            let _ = self.shared.refresh.read();
            for (_, queue) in &self.queues {
                let _ = queue.kick().read();
            }
        }
    }

    /// Serves one request of the queue at `at`, if there is one.
    fn serve(&mut self, at: usize) -> bool {
        let Some((role, queue)) = self.queues.get_mut(at) else {
            return false;
        };
        let role = *role;
        let Some(chain) = queue.pop() else { return false };
        let served = match role {
            Role::Inflate => self.inflate(at, &chain).map(|()| true),
            Role::Deflate => self.deflate(at, &chain).map(|()| true),
            Role::Reporting => self.report(&chain).map(|()| true),
            // The buffer is kept.
            Role::Statistics => self.take_statistics(at, &chain).map(|()| false),
        };
        let Some((_, queue)) = self.queues.get_mut(at) else {
            return false;
        };
        match served {
            Ok(true) => {
                queue.complete(chain.head(), 0);
                queue.signal();
            }
            Ok(false) => {}
            Err(fault) => queue.fault(&fault),
        }
        true
    }

    fn inflate(&mut self, at: usize, chain: &Chain) -> Result<(), RingFault> {
        let mut pages = self.pages(at, chain)?;
        let mut count = 0;
        for run in runs(&mut pages) {
            count += run.end - run.start;
            if self.huge.are_small() {
                let len = (run.end - run.start) * BALLOON_PAGE;
                let missing = len - self.discard(run.start * BALLOON_PAGE, len);
                add(&self.shared.counters.invalid, missing / BALLOON_PAGE);
                continue;
            }
            for page in run {
                if !self.discarder.is_memory(GuestAddress(page * BALLOON_PAGE)) {
                    add(&self.shared.counters.invalid, 1);
                } else if let Some(whole) = self.huge.insert(page) {
                    self.discard(whole.start * BALLOON_PAGE, (whole.end - whole.start) * BALLOON_PAGE);
                }
            }
        }
        add(&self.shared.counters.inflated, count * BALLOON_PAGE);
        Ok(())
    }

    /// The pages come back by themselves when the guest writes to them.
    fn deflate(&mut self, at: usize, chain: &Chain) -> Result<(), RingFault> {
        let mut pages = self.pages(at, chain)?;
        let mut count = 0;
        for run in runs(&mut pages) {
            count += run.end - run.start;
            if !self.huge.are_small() {
                run.for_each(|page| self.huge.remove(page));
            }
        }
        add(&self.shared.counters.deflated, count * BALLOON_PAGE);
        Ok(())
    }

    /// The numbers of pages in a request.
    fn pages(&self, at: usize, chain: &Chain) -> Result<Vec<u32>, RingFault> {
        let len = chain.readable_len();
        if chain.writable_len() != 0 || !len.is_multiple_of(4) || len / 4 > MAX_PAGES {
            return Err(RingFault::Request(
                "a request of the balloon is not one list of at most 65536 page numbers",
            ));
        }
        let bytes = self.read(at, chain)?;
        let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        Ok(bytes.chunks_exact(4).map(number).collect())
    }

    fn read(&self, at: usize, chain: &Chain) -> Result<Vec<u8>, RingFault> {
        let mut bytes = vec![0; chain.readable_len() as usize];
        let Some((_, queue)) = self.queues.get(at) else {
            return Ok(Vec::new());
        };
        // The region may have gone since the chain was checked.
        chain
            .reader(&queue.memory())
            .read_exact(&mut bytes)
            .map_err(|_| RingFault::Inaccessible)?;
        Ok(bytes)
    }

    /// Pages that are free, until the buffer is given back (virtio 1.2, 5.5.6.7).
    fn report(&mut self, chain: &Chain) -> Result<(), RingFault> {
        if chain.readable_len() != 0 {
            return Err(RingFault::Request("a report of free pages has a part to be read"));
        }
        add(&self.shared.counters.reported, chain.writable_len().into());
        // The driver relies on what it filled its free pages with, and ours come back with zeroes.
        if self.shared.poison.load(Relaxed) == 0 {
            for segment in chain.writable() {
                self.discard(segment.addr.0, segment.len.into());
            }
        }
        Ok(())
    }

    fn take_statistics(&mut self, at: usize, chain: &Chain) -> Result<(), RingFault> {
        let len = chain.readable_len();
        if chain.writable_len() != 0 || len > MAX_STATISTICS * ENTRY as u32 {
            return Err(RingFault::Request("a buffer of statistics is not one list of them"));
        }
        if self.statistics.is_some() {
            return Err(RingFault::Request("there is more than one buffer of statistics"));
        }
        let statistics = BalloonStatistics::parse(&self.read(at, chain)?);
        self.shared.set_statistics(statistics);
        self.statistics = Some(chain.head());
        Ok(())
    }

    /// Gives the buffer of statistics back, which asks for new ones, if somebody wants them.
    fn ask_for_statistics(&mut self) {
        let Some(head) = self.statistics else { return };
        let queue = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics);
        if let Some((_, queue)) = queue.filter(|_| self.shared.take_wanted()) {
            self.statistics = None;
            queue.complete(head, 0);
            queue.signal();
        }
    }

    /// Gives back what of `len` bytes at `at` is guest memory; returns how many bytes that were.
    fn discard(&self, at: u64, len: u64) -> u64 {
        match self.discarder.discard(GuestAddress(at), len) {
            Ok(bytes) => {
                add(&self.shared.counters.discarded, bytes);
                bytes
            }
            Err(error) => {
                if let Some(held_back) = self.log.admit() {
                    tracing::warn!(held_back, "{error}: {}", error.source);
                }
                len
            }
        }
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Relaxed);
}
