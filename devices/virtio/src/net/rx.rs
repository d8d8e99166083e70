//! From the host to the guest: packets go straight into the guest's buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::collections::VecDeque;
use std::io::{self, Write};

use triarch_memory::GuestMemory;
use triarch_net::{HEADER_LEN, MAX_PACKET, PacketQueue};

use super::counters::Direction;
use super::vectors::{GuestVectors, Recycled};
use crate::{Chain, RingFault, VirtQueue, mark_written};

/// Packets before the other direction gets its turn.
const BUDGET: usize = 128;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS_OFFSET: u32 = 10;

/// Why receiving paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxPause {
    /// The host has nothing more: wait for it.
    NoPacket,
    /// The guest has no buffers left: wait for its notification.
    NoBuffer,
    /// There may be more at once.
    Budget,
    /// The host's end is gone for good.
    Lost,
}

/// A receive queue at work.
pub(super) struct Rx {
    queue: VirtQueue,
    mergeable: bool,
    /// Chains popped but not used yet, in order.
    ready: VecDeque<Chain>,
    /// Their room in bytes.
    room: usize,
    /// How many vectors each of them takes, while a batch runs.
    counts: VecDeque<usize>,
    used: Vec<(u16, u32)>,
    recycled: Recycled,
    notified: bool,
}

impl Rx {
    pub(super) fn new(queue: VirtQueue, mergeable: bool) -> Self {
        Self {
            queue,
            mergeable,
            ready: VecDeque::new(),
            room: 0,
            counts: VecDeque::new(),
            used: Vec::new(),
            recycled: Recycled::default(),
            notified: true,
        }
    }

    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Hands the queue back with what was popped but not used put back.
    pub(super) fn into_queue(mut self) -> VirtQueue {
        for _ in 0..self.ready.len() {
            // Chains are used in the order they were popped, so these are the last ones and nothing came after them.
            self.queue.unpop();
        }
        self.queue
    }

    /// Receives packets until something is missing.
    pub(super) fn receive(&mut self, host: &PacketQueue, counters: &Direction) -> RxPause {
        let guard = self.queue.memory();
        let memory: &GuestMemory = &guard;
        let mut vectors = GuestVectors::new(memory, &mut self.recycled);
        self.counts.clear();
        let mut completed = false;
        let loaded = self.ready.iter().try_for_each(|chain| {
            self.counts.push_back(vectors.push(chain.writable())?);
            io::Result::Ok(())
        });
        let mut pause = RxPause::Budget;
        if loaded.is_err() {
            self.queue.fault(&RingFault::Inaccessible);
            pause = RxPause::NoBuffer;
        } else {
            for _ in 0..BUDGET {
                match self.receive_one(memory, &mut vectors, host, counters) {
                    Ok(done) => completed |= done,
                    Err(reason) => {
                        pause = reason;
                        break;
                    }
                }
            }
        }
        vectors.recycle(&mut self.recycled);
        if completed {
            self.queue.signal();
        }
        pause
    }

    /// Receives one packet; `true` when it reached the guest.
    fn receive_one(
        &mut self,
        memory: &GuestMemory,
        vectors: &mut GuestVectors<'_>,
        host: &PacketQueue,
        counters: &Direction,
    ) -> Result<bool, RxPause> {
        self.fill(vectors)?;
        let count = if self.mergeable {
            self.counts.iter().sum()
        } else {
            self.counts.front().copied().unwrap_or(0)
        };
        let len = match vectors.read(host, count) {
            Ok(Some(len)) if len >= HEADER_LEN => len,
            // Too small to be one, or too large for the guest's buffers.
            Ok(_) => {
                counters.dropped();
                return Ok(false);
            }
            Err(error) => return received_error(&error, counters),
        };
        if self.hand_over(memory, vectors, len).is_err() {
            self.queue.fault(&RingFault::Inaccessible);
            return Err(RxPause::NoBuffer);
        }
        counters.passed(len - HEADER_LEN);
        Ok(true)
    }

    /// Gives the guest the packet of `len` bytes at the front of the ready chains.
    fn hand_over(&mut self, memory: &GuestMemory, vectors: &mut GuestVectors<'_>, len: usize) -> io::Result<()> {
        self.used.clear();
        let mut left = len;
        let mut chains = 0;
        for chain in &self.ready {
            if left == 0 {
                break;
            }
            let written = (chain.writable_len() as usize).min(left);
            self.used.push((chain.head(), written as u32));
            left -= written;
            chains += 1;
        }
        if let Some(first) = self.ready.front() {
            let mut header = first.writer(memory);
            header.take_segments(NUM_BUFFERS_OFFSET)?;
            header.write_all(&(chains as u16).to_le_bytes())?;
        }
        for (chain, (_, written)) in self.ready.drain(..chains).zip(&self.used) {
            mark_written(memory, chain.writable(), *written);
            self.room -= chain.writable_len() as usize;
        }
        vectors.drop_front(self.counts.drain(..chains).sum());
        self.queue.complete_all(&self.used);
        Ok(())
    }

    /// Pops chains until the largest packet fits, or there are no more.
    fn fill(&mut self, vectors: &mut GuestVectors<'_>) -> Result<(), RxPause> {
        loop {
            let enough = if self.mergeable {
                self.room >= MAX_PACKET
            } else {
                !self.ready.is_empty()
            };
            if enough {
                return Ok(());
            }
            if let Some(chain) = self.queue.pop() {
                self.accept(chain, vectors)?;
            } else if !self.ready.is_empty() {
                // A packet that needs more than this is rare, and dropped.
                return Ok(());
            } else if !self.queue.arm() {
                self.notified = true;
                return Err(RxPause::NoBuffer);
            }
        }
    }

    fn accept(&mut self, chain: Chain, vectors: &mut GuestVectors<'_>) -> Result<(), RxPause> {
        if (chain.writable_len() as usize) < HEADER_LEN {
            let fault = RingFault::Request("a receive buffer is smaller than a header");
            self.queue.fault(&fault);
            return Err(RxPause::NoBuffer);
        }
        let Ok(count) = vectors.push(chain.writable()) else {
            self.queue.fault(&RingFault::Inaccessible);
            return Err(RxPause::NoBuffer);
        };
        self.counts.push_back(count);
        self.room += chain.writable_len() as usize;
        self.ready.push_back(chain);
        if self.notified {
            // Notifications are of use only when there is nothing left.
            self.queue.disarm();
            self.notified = false;
        }
        Ok(())
    }
}

fn received_error(error: &io::Error, counters: &Direction) -> Result<bool, RxPause> {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Err(RxPause::NoPacket),
        Some(libc::EINTR) => Ok(false),
        // The kernel met a packet it cannot describe, and dropped it.
        Some(libc::EINVAL | libc::EFAULT | libc::ENOMEM) => {
            counters.dropped();
            Ok(false)
        }
        _ => Err(RxPause::Lost),
    }
}
