//! virtio-blk (virtio 1.2 §5.2).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::data;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Request types.
pub mod request {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Serial number.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Feature bits used here.
pub mod feature {
    /// Read-only.
    pub const RO: u64 = 1 << 5;
    /// Optimal block size in the configuration.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// Flush.
    pub const FLUSH: u64 = 1 << 9;
    /// Topology in the configuration.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// Writeback can be switched.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard.
    pub const DISCARD: u64 = 1 << 13;
    /// Write zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Segment limit in the configuration.
    pub const SEG_MAX: u64 = 1 << 2;
}

/// The most one request carries: 1 MiB.
pub const MAX_SECTORS: u64 = 2048;
const SECTOR: usize = 512;
const TIMEOUT_MS: u64 = 10_000;

/// A disk.
pub struct Blk {
    pub(super) transport: Transport,
    /// Agreed features.
    pub features: u64,
    pub(super) queues: Vec<Queue>,
    /// Header at 0, discard range at 64, status at 128.
    header: Dma,
    data: Dma,
    next: usize,
}

impl Driver for Blk {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        use feature::{BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, MQ, RO, SEG_MAX, TOPOLOGY, WRITE_ZEROES};
        let transport = Transport::new(function)?;
        let wanted = RO | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ | DISCARD | WRITE_ZEROES | SEG_MAX;
        let features = transport.negotiate(wanted | setup.features())?;
        let available = if features & MQ != 0 {
            transport.config_number(34, 2)? as u16
        } else {
            1
        };
        let mut queues = Vec::new();
        let options = Options {
            offset: setup.offset,
            ..Options::of(features)
        };
        for index in 0..setup.queues.min(available) {
            queues.push(transport.queue(index, setup.size, options)?);
        }
        transport.run();
        Ok(Self {
            transport,
            features,
            queues,
            header: Dma::new(4096)?,
            data: Dma::new(MAX_SECTORS as usize * SECTOR)?,
            next: 0,
        })
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        self.queues.iter_mut().collect()
    }

    fn victim(&self) -> u16 {
        0
    }

    fn prove(&mut self) -> Result<(), String> {
        // Always on the queue that `victim` names.
        self.timed_read(0, false).map(|_| ())
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport.remap(&mut self.queues.iter_mut().collect::<Vec<_>>())
    }
}

/// A status byte in words.
pub fn check(status: u8) -> Result<(), String> {
    match status {
        0 => Ok(()),
        1 => Err("status 1 (I/O error)".into()),
        2 => Err("status 2 (unsupported)".into()),
        other => Err(format!("status {other}")),
    }
}

impl Blk {
    /// Capacity in sectors of 512 bytes.
    pub fn capacity(&self) -> Result<u64, String> {
        self.transport.config_number(0, 8)
    }

    /// The transport, to look at.
    pub fn registers(&self) -> &Transport {
        &self.transport
    }

    /// The data buffer.
    pub fn data(&mut self) -> &mut [u8] {
        self.data.bytes()
    }

    /// The next queue in turn.
    fn next_queue(&mut self) -> usize {
        self.next = (self.next + 1) % self.queues.len();
        self.next
    }

    /// One request of any type, with the data segments given, on the next queue; its status byte.
    pub fn request(&mut self, kind: u32, sector: u64, segments: &[Segment]) -> Result<u8, String> {
        self.request_within(kind, sector, segments, TIMEOUT_MS)
    }

    /// The same, for one that may never be answered.
    pub fn request_within(&mut self, kind: u32, sector: u64, segments: &[Segment], ms: u64) -> Result<u8, String> {
        let queue = self.next_queue();
        self.begin(queue, kind, sector, segments)?;
        let done = self.queues[queue].wait(Deadline::after_ms(ms));
        done.ok_or_else(|| format!("no answer, device status {:#x}", self.transport.status()))?;
        Ok(self.header.bytes()[128])
    }

    /// Submits one request without waiting.
    fn begin(&mut self, queue: usize, kind: u32, sector: u64, segments: &[Segment]) -> Result<u16, String> {
        self.header.put(0, kind.to_le_bytes());
        self.header.put(4, 0u32.to_le_bytes());
        self.header.put(8, sector.to_le_bytes());
        self.header.put(128, [0xff]);
        let mut chain = alloc::vec![Segment::read(&self.header, 0, 16)];
        chain.extend_from_slice(segments);
        chain.push(Segment::write(&self.header, 128, 1));
        let queue = &mut self.queues[queue];
        queue.want_interrupt(true);
        let head = queue.add(&chain).ok_or("queue is full")?;
        queue.kick();
        Ok(head)
    }

    /// Reads into or writes from the data buffer, cut into `pieces` segments.
    pub fn transfer(&mut self, kind: u32, sector: u64, count: u64, pieces: usize) -> Result<(), String> {
        let len = count as usize * SECTOR;
        let piece = len.div_ceil(pieces.max(1)).max(1);
        let segments: Vec<_> = (0..len)
            .step_by(piece)
            .map(|at| {
                let segment = Segment::read(&self.data, at, piece.min(len - at));
                Segment {
                    write: kind == request::IN,
                    ..segment
                }
            })
            .collect();
        self.request(kind, sector, &segments).and_then(check)
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<(), String> {
        self.request(request::FLUSH, 0, &[]).and_then(check)
    }

    /// Discards or zeroes a range.
    pub fn range(&mut self, kind: u32, sector: u64, count: u32, unmap: bool) -> Result<(), String> {
        self.header.put(64, sector.to_le_bytes());
        self.header.put(72, count.to_le_bytes());
        self.header.put(76, u32::from(unmap).to_le_bytes());
        let segment = Segment::read(&self.header, 64, 16);
        self.request(kind, 0, &[segment]).and_then(check)
    }

    /// The serial number.
    pub fn serial(&mut self) -> Result<String, String> {
        let segment = Segment::write(&self.data, 0, 20);
        self.data()[..20].fill(0);
        self.request(request::GET_ID, 0, &[segment]).and_then(check)?;
        Ok(self.data()[..20]
            .iter()
            .take_while(|byte| **byte != 0)
            .map(|byte| char::from(*byte))
            .collect())
    }

    /// One read of 512 bytes, by interrupt or polling; ticks it took.
    pub fn timed_read(&mut self, sector: u64, poll: bool) -> Result<u64, String> {
        let start = crate::clock::ticks();
        let segment = Segment::write(&self.data, 0, SECTOR);
        let deadline = Deadline::after_ms(TIMEOUT_MS);
        let done = if poll {
            self.queues[0].want_interrupt(false);
            self.submit_quietly(sector, segment)?;
            self.queues[0].spin(deadline)
        } else {
            self.begin(0, request::IN, sector, &[segment])?;
            self.queues[0].wait(deadline)
        };
        done.ok_or_else(|| self.queues[0].silence())?;
        check(self.header.bytes()[128])?;
        Ok(crate::clock::ticks() - start)
    }

    fn submit_quietly(&mut self, sector: u64, segment: Segment) -> Result<(), String> {
        self.header.put(0, request::IN.to_le_bytes());
        self.header.put(8, sector.to_le_bytes());
        self.header.put(128, [0xff]);
        let chain = [
            Segment::read(&self.header, 0, 16),
            segment,
            Segment::write(&self.header, 128, 1),
        ];
        self.queues[0].add(&chain).ok_or("queue is full")?;
        self.queues[0].kick();
        Ok(())
    }

    /// Writes the pattern of `seed` over `blocks` blocks of 4 KiB from sector 0 on, `depth` requests in flight over all
    /// queues, then reads everything back the same way and compares.
    pub fn stress(&mut self, blocks: u64, depth: usize, seed: u64) -> Result<(), String> {
        let mut slots = Vec::new();
        for _ in 0..depth {
            slots.push(Slot {
                dma: Dma::new(8192)?,
                busy: None,
            });
        }
        for kind in [request::OUT, request::IN] {
            let result = self.stress_pass(&mut slots, kind, blocks, seed);
            if result.is_err() {
                // Buffers may still be in flight: the device must let go of them before they are freed.
                self.transport.reset();
                return result;
            }
        }
        Ok(())
    }

    fn stress_pass(&mut self, slots: &mut [Slot], kind: u32, blocks: u64, seed: u64) -> Result<(), String> {
        let (mut next, mut finished) = (0, 0);
        while finished < blocks {
            while let Some(slot) = slots
                .iter_mut()
                .find(|slot| slot.busy.is_none())
                .filter(|_| next < blocks)
            {
                let queue = next as usize % self.queues.len();
                slot.submit(&mut self.queues[queue], queue, kind, next, seed)?;
                next += 1;
            }
            let deadline = Deadline::after_ms(TIMEOUT_MS);
            let waiting = slots
                .iter()
                .find_map(|slot| slot.busy.as_ref())
                .map_or(0, |busy| busy.queue);
            let done = self.queues[waiting].wait(deadline);
            let mut done = done.ok_or_else(|| self.queues[waiting].silence())?;
            loop {
                let slot = slots.iter_mut().find(|slot| {
                    slot.busy
                        .as_ref()
                        .is_some_and(|busy| (busy.queue, busy.head) == (waiting, done.0))
                });
                slot.ok_or_else(|| format!("unknown head {} completed", done.0))?
                    .finish(kind, seed)?;
                finished += 1;
                match self.queues[waiting].poll() {
                    Some(more) => done = more,
                    None => break,
                }
            }
        }
        Ok(())
    }
}

/// What a soak has seen.
pub struct Soak {
    /// Requests answered.
    pub requests: u64,
    /// The longest time without any answer, in TSC ticks.
    pub stall: u64,
}

/// Whether a soak that has made so many requests makes another one.
pub type More<'a> = dyn FnMut(u64) -> Result<bool, String> + 'a;

/// How a soak goes.
#[derive(Clone, Copy)]
pub struct SoakPlan {
    /// Requests to make.
    pub count: u64,
    /// Requests in flight.
    pub depth: usize,
    /// Seed of places and data.
    pub seed: u64,
    /// Blocks of 4 KiB to work on, more than `depth`.
    pub blocks: u64,
}

impl SoakPlan {
    /// Seed of what block has after it was written `version` times.
    fn data(&self, version: u32) -> u64 {
        self.seed ^ u64::from(version) << 32
    }
}

impl Blk {
    /// Writes random blocks again and again, each time with other data, reads others and compares, and flushes now and then; no block is
    /// in flight twice. In the end it reads all of them. So a write that was lost, or one that came late over a newer one, is found.
    pub fn soak(&mut self, plan: &SoakPlan) -> Result<Soak, String> {
        self.soak_while(plan, &mut |made| Ok(made < plan.count))
    }

    /// The same, and makes another request as long as `more`, which is told how many were made, says so.
    pub fn soak_while(&mut self, plan: &SoakPlan, more: &mut More<'_>) -> Result<Soak, String> {
        let mut slots = Vec::new();
        for _ in 0..plan.depth {
            slots.push(Slot {
                dma: Dma::new(8192)?,
                busy: None,
            });
        }
        let mut versions = alloc::vec![0u32; plan.blocks as usize];
        let result = self.soak_pass(&mut slots, &mut versions, plan, more);
        let result = result.and_then(|soak| {
            for (block, version) in (0..).zip(&versions).filter(|(_, version)| **version > 0) {
                let slot = &mut slots[0];
                slot.submit(&mut self.queues[0], 0, request::IN, block, 0)?;
                let done = self.queues[0].wait(Deadline::after_ms(TIMEOUT_MS));
                done.ok_or_else(|| self.queues[0].silence())?;
                slot.finish(request::IN, plan.data(*version))?;
            }
            Ok(soak)
        });
        if result.is_err() {
            // Buffers may still be in flight: the device must let go of them before they are freed.
            self.transport.reset();
        }
        result
    }

    fn soak_pass(
        &mut self,
        slots: &mut [Slot],
        versions: &mut [u32],
        plan: &SoakPlan,
        more: &mut More<'_>,
    ) -> Result<Soak, String> {
        let mut kinds = alloc::vec![request::OUT; slots.len()];
        let (mut next, mut finished, mut random) = (0, 0, plan.seed);
        let (mut last, mut stall) = (crate::clock::ticks(), 0);
        loop {
            while let Some(free) = slots.iter().position(|s| s.busy.is_none()) {
                if !more(next)? {
                    break;
                }
                let block = loop {
                    let block = data::splitmix64(&mut random) % plan.blocks;
                    let taken = |s: &Slot| s.busy.as_ref().is_some_and(|busy| busy.block == block);
                    if !slots.iter().any(taken) {
                        break block;
                    }
                };
                let version = &mut versions[block as usize];
                kinds[free] = match data::splitmix64(&mut random) % 8 {
                    0 => request::FLUSH,
                    1 | 2 if *version > 0 => request::IN,
                    _ => {
                        *version += 1;
                        request::OUT
                    }
                };
                let queue = next as usize % self.queues.len();
                slots[free].submit(&mut self.queues[queue], queue, kinds[free], block, plan.data(*version))?;
                next += 1;
            }
            if finished == next {
                break;
            }
            let waiting = slots.iter().find_map(|slot| slot.busy.as_ref());
            let waiting = waiting.map_or(0, |busy| busy.queue);
            let deadline = Deadline::after_ms(TIMEOUT_MS);
            let done = self.queues[waiting].wait(deadline);
            let mut done = Some(done.ok_or_else(|| self.queues[waiting].silence())?);
            let now = crate::clock::ticks();
            stall = stall.max(now - core::mem::replace(&mut last, now));
            while let Some((head, _)) = done {
                let is_it = |busy: &Busy| (busy.queue, busy.head) == (waiting, head);
                let at = slots.iter().position(|slot| slot.busy.as_ref().is_some_and(is_it));
                let at = at.ok_or_else(|| format!("unknown head {head} completed"))?;
                let block = slots[at].busy.as_ref().map_or(0, |busy| busy.block);
                slots[at].finish(kinds[at], plan.data(versions[block as usize]))?;
                finished += 1;
                done = self.queues[waiting].poll();
            }
        }
        Ok(Soak {
            requests: finished,
            stall,
        })
    }
}

struct Busy {
    queue: usize,
    head: u16,
    block: u64,
}

/// One request in flight: data in the first page, header and status in the second.
struct Slot {
    dma: Dma,
    busy: Option<Busy>,
}

impl Slot {
    fn submit(&mut self, queue: &mut Queue, number: usize, kind: u32, block: u64, seed: u64) -> Result<(), String> {
        if kind == request::OUT {
            data::fill(&mut self.dma.bytes()[..4096], seed, block * 8);
        } else {
            self.dma.bytes()[..4096].fill(0);
        }
        self.dma.put(4096, kind.to_le_bytes());
        self.dma.put(4104, (block * 8).to_le_bytes());
        self.dma.put(4200, [0xff]);
        let write = kind == request::IN;
        let part = |at, len| Segment {
            write,
            ..Segment::read(&self.dma, at, len)
        };
        let chain = [
            Segment::read(&self.dma, 4096, 16),
            part(0, 1024),
            part(1024, 3072),
            Segment::write(&self.dma, 4200, 1),
        ];
        // A flush has no data.
        let flush = [chain[0], chain[3]];
        let chain: &[Segment] = if kind == request::FLUSH { &flush } else { &chain };
        let head = queue.add(chain).ok_or("queue is full")?;
        queue.kick();
        self.busy = Some(Busy {
            queue: number,
            head,
            block,
        });
        Ok(())
    }

    fn finish(&mut self, kind: u32, seed: u64) -> Result<(), String> {
        let block = self.busy.take().map_or(0, |busy| busy.block);
        check(self.dma.bytes()[4200])?;
        if kind == request::IN {
            let mut expected = [0; 4096];
            data::fill(&mut expected, seed, block * 8);
            if self.dma.bytes()[..4096] != expected {
                return Err(format!("block {block} came back changed"));
            }
        }
        Ok(())
    }
}
