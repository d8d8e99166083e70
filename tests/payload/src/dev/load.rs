//! A load on a disk, to be measured: so many reads in flight on each queue, for so long.

use super::blk::{Blk, check, request};
use crate::arch::interrupts::connect;
use crate::clock::{Deadline, nanoseconds, ticks, ticks_of_ms};
use crate::virtio::ring::{Dma, Segment};
use crate::{data, interrupts};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes that header and status of a request take.
const SLOT: usize = 32;
const STATUS: usize = 16;
const SECTOR: u64 = 512;
/// What is in flight at the end is waited for so long.
const DRAIN_MS: u64 = 10_000;

/// What to do.
#[derive(Clone, Copy)]
pub struct Plan {
    /// Reads in flight on each queue.
    pub depth: usize,
    /// Bytes a read, a multiple of 512.
    pub bytes: u64,
    /// For so long.
    pub ms: u64,
    /// One after the other from the disk's start on, else at random places.
    pub sequential: bool,
    /// Look for completions all the time instead of sleeping until an interrupt.
    pub poll: bool,
}

/// What came of it.
pub struct Load {
    /// Reads done.
    pub requests: u64,
    /// Ticks they took together.
    pub ticks: u64,
    /// Ticks of each from being made available to being seen done.
    pub latencies: Histogram,
    /// Notifications sent to the device.
    pub kicks: u64,
    /// Interrupts taken.
    pub interrupts: u64,
}

/// Numbers counted in buckets whose width is a 32nd of what is in them, so that they are known to 3 percent.
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u64,
    least: u64,
    most: u64,
}

const FINE: u32 = 5;

impl Histogram {
    /// One of nothing.
    pub fn new() -> Self {
        Self {
            buckets: alloc::vec![0; (64 - FINE as usize + 1) << FINE],
            count: 0,
            sum: 0,
            least: u64::MAX,
            most: 0,
        }
    }

    fn bucket(value: u64) -> usize {
        let shift = (value | 1).ilog2().saturating_sub(FINE);
        (u64::from(shift) << FINE) as usize + (value >> shift) as usize
    }

    /// The least value of a bucket.
    fn value(bucket: usize) -> u64 {
        let shift = (bucket >> FINE).saturating_sub(1);
        ((bucket - (shift << FINE)) as u64) << shift
    }

    /// Counts a number of ticks.
    pub fn add(&mut self, value: u64) {
        self.buckets[Self::bucket(value)] += 1;
        self.count += 1;
        self.sum += value;
        self.least = self.least.min(value);
        self.most = self.most.max(value);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    fn at(&self, per_mille: u64) -> u64 {
        let wanted = (self.count * per_mille / 1000).min(self.count.saturating_sub(1));
        let mut below = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            below += count;
            if below > wanted {
                return Self::value(bucket).clamp(self.least, self.most);
            }
        }
        self.most
    }

    /// `ns_min= ns_mean= ns_p50= ns_p99= ns_p999= ns_max=`
    pub fn report(&self) -> String {
        if self.count == 0 {
            return "ns_min=0 ns_mean=0 ns_p50=0 ns_p99=0 ns_p999=0 ns_max=0".into();
        }
        format!(
            "ns_min={} ns_mean={} ns_p50={} ns_p99={} ns_p999={} ns_max={}",
            nanoseconds(self.least),
            nanoseconds(self.sum / self.count),
            nanoseconds(self.at(500)),
            nanoseconds(self.at(990)),
            nanoseconds(self.at(999)),
            nanoseconds(self.most)
        )
    }
}

/// One request's place: which it is of all, and when it was made available.
struct Slot {
    queue: usize,
    chain: [Segment; 3],
    since: u64,
}

/// A load while it runs.
struct Run<'a> {
    disk: &'a mut Blk,
    plan: Plan,
    /// Headers and status bytes.
    requests: Dma,
    slots: Vec<Slot>,
    /// The slot of each head, by queue.
    owners: Vec<Vec<usize>>,
    blocks: u64,
    next: u64,
    random: u64,
    histogram: Histogram,
}

impl Blk {
    /// Runs a load with buffers in `memory`, which nothing else uses.
    pub fn load(&mut self, plan: &Plan, memory: &Range<u64>) -> Result<Load, String> {
        let vector = self.one_vector()?;
        let mut run = Run::new(self, *plan, memory)?;
        let result = run.measure(vector);
        if result.is_err() {
            // Buffers may still be in flight: the device must let go of them before they are used again.
            run.disk.transport.reset();
        }
        result
    }

    /// Lets all queues interrupt by one vector, so that one sleep waits for all of them.
    fn one_vector(&mut self) -> Result<u8, String> {
        let entry = self.queues[0].msix_entry;
        let message = connect(self.transport.function.bdf, entry)?;
        for queue in &mut self.queues {
            self.transport.msix.set(queue.msix_entry, message);
            queue.vector = message.vector;
        }
        Ok(message.vector)
    }
}

impl<'a> Run<'a> {
    fn new(disk: &'a mut Blk, plan: Plan, memory: &Range<u64>) -> Result<Self, String> {
        let count = plan.depth * disk.queues.len();
        let blocks = disk.capacity()? * SECTOR / plan.bytes.max(1);
        if plan.bytes == 0 || !plan.bytes.is_multiple_of(SECTOR) || blocks == 0 {
            return Err("reads are of whole sectors, no larger than the disk".into());
        }
        if memory.end - memory.start < count as u64 * plan.bytes {
            return Err(format!("{count} buffers do not fit into the RAM for tests"));
        }
        let requests = Dma::new(count * SLOT)?;
        let slots = (0..count).map(|n| Slot {
            queue: n % disk.queues.len(),
            chain: [
                Segment::read(&requests, n * SLOT, 16),
                Segment {
                    address: memory.start + n as u64 * plan.bytes,
                    len: plan.bytes as u32,
                    write: true,
                },
                Segment::write(&requests, n * SLOT + STATUS, 1),
            ],
            since: 0,
        });
        Ok(Self {
            slots: slots.collect(),
            owners: disk
                .queues
                .iter()
                .map(|q| alloc::vec![usize::MAX; q.size.into()])
                .collect(),
            requests,
            plan,
            blocks,
            next: 0,
            random: ticks(),
            histogram: Histogram::new(),
            disk,
        })
    }

    fn measure(&mut self, vector: u8) -> Result<Load, String> {
        let kicks = |disk: &Blk| disk.queues.iter().map(|q| q.kicks).sum::<u64>();
        let (kicked, interrupted) = (kicks(self.disk), interrupts::count(vector));
        let (deadline, start) = (Deadline::after_ms(self.plan.ms), ticks());
        let end = start + ticks_of_ms(self.plan.ms);
        for slot in 0..self.slots.len() {
            self.submit(slot, start)?;
        }
        for queue in &mut self.disk.queues {
            queue.want_interrupt(false);
            queue.kick();
        }
        while ticks() < end {
            let seen = interrupts::count(vector);
            if self.collect(true)? == 0 && !self.plan.poll {
                self.sleep(vector, seen, deadline);
            }
        }
        let passed = ticks() - start;
        let load = Load {
            requests: self.histogram.count,
            ticks: passed,
            latencies: core::mem::replace(&mut self.histogram, Histogram::new()),
            kicks: kicks(self.disk) - kicked,
            interrupts: interrupts::count(vector) - interrupted,
        };
        let deadline = Deadline::after_ms(DRAIN_MS);
        while self.disk.queues.iter().any(|q| q.in_flight() > 0) {
            self.collect(false)?;
            deadline.left().ok_or("reads without an answer")?;
        }
        Ok(load)
    }

    /// Makes the slot's next read available, without telling the device.
    fn submit(&mut self, number: usize, now: u64) -> Result<(), String> {
        let block = if self.plan.sequential {
            self.next += 1;
            (self.next - 1) % self.blocks
        } else {
            data::splitmix64(&mut self.random) % self.blocks
        };
        let at = number * SLOT;
        self.requests.put(at, u64::from(request::IN).to_le_bytes());
        self.requests
            .put(at + 8, (block * (self.plan.bytes / SECTOR)).to_le_bytes());
        self.requests.put(at + STATUS, [0xff]);
        let slot = &mut self.slots[number];
        slot.since = now;
        let head = self.disk.queues[slot.queue].add(&slot.chain).ok_or("queue is full")?;
        self.owners[slot.queue][usize::from(head)] = number;
        Ok(())
    }

    /// Takes what is done, and asks for as much again if told to; how many that was.
    fn collect(&mut self, again: bool) -> Result<usize, String> {
        let mut total = 0;
        for queue in 0..self.disk.queues.len() {
            let mut count = 0;
            while let Some((head, _)) = self.disk.queues[queue].poll() {
                let owner = self.owners[queue].get_mut(usize::from(head));
                let number = owner.map_or(usize::MAX, |owner| core::mem::replace(owner, usize::MAX));
                let slot = self.slots.get(number);
                let since = slot.ok_or_else(|| format!("unknown head {head} completed"))?.since;
                check(self.requests.bytes()[number * SLOT + STATUS])?;
                let now = ticks();
                self.histogram.add(now - since);
                if again {
                    self.submit(number, now)?;
                }
                count += 1;
            }
            if count > 0 && again {
                self.disk.queues[queue].kick();
            }
            total += count;
        }
        Ok(total)
    }

    /// Asks for interrupts and sleeps until one comes, unless something is done already.
    fn sleep(&mut self, vector: u8, seen: u64, deadline: Deadline) {
        for queue in &mut self.disk.queues {
            queue.want_interrupt(true);
        }
        if let (false, Some(left)) = (self.disk.queues.iter().any(|q| q.done() > 0), deadline.left()) {
            interrupts::sleep(vector, seen, left);
        }
        for queue in &mut self.disk.queues {
            queue.want_interrupt(false);
        }
    }
}
