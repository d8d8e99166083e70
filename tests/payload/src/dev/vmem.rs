//! virtio-mem (virtio 1.2 §5.15).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const REQUEST: usize = 24;
const ANSWER: usize = 10;
/// Where answers are in the buffer.
const ANSWER_AT: usize = 64;
/// Blocks of one request when many are plugged.
const BATCH: u64 = 64;

/// Types of requests.
pub mod request {
    /// Plug blocks.
    pub const PLUG: u16 = 0;
    /// Unplug blocks.
    pub const UNPLUG: u16 = 1;
    /// Unplug all.
    pub const UNPLUG_ALL: u16 = 2;
    /// How blocks are.
    pub const STATE: u16 = 3;
}

/// What the configuration space says, in bytes.
pub struct Config {
    /// Of a block.
    pub block: u64,
    /// Address of the region.
    pub addr: u64,
    /// Of the region.
    pub region: u64,
    /// Of its usable part.
    pub usable: u64,
    /// Plugged.
    pub plugged: u64,
    /// What the host wants plugged.
    pub requested: u64,
}

/// A memory device.
pub struct Vmem {
    transport: Transport,
    /// Agreed features.
    pub features: u64,
    queue: Queue,
    buffer: Dma,
}

impl Driver for Vmem {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(setup.features() | UNPLUGGED_INACCESSIBLE)?;
        let queue = transport.queue(0, setup.size, Options::of(features))?;
        transport.run();
        Ok(Self {
            transport,
            features,
            queue,
            buffer: Dma::new(4096)?,
        })
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        alloc::vec![&mut self.queue]
    }

    fn victim(&self) -> u16 {
        0
    }

    /// Asks for the state of the first block.
    fn prove(&mut self) -> Result<(), String> {
        let addr = self.config()?.addr;
        match self.ask(request::STATE, addr, 1)? {
            (0, _) => Ok(()),
            (answer, _) => Err(format!("answer {answer}")),
        }
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport.remap(&mut [&mut self.queue])
    }
}

impl Vmem {
    /// The configuration space.
    pub fn config(&self) -> Result<Config, String> {
        let field = |at| self.transport.config_number(at, 8);
        Ok(Config {
            block: field(0)?,
            addr: field(16)?,
            region: field(24)?,
            usable: field(32)?,
            plugged: field(40)?,
            requested: field(48)?,
        })
    }

    /// Sends a request; the type of the answer and the state in it.
    pub fn ask(&mut self, kind: u16, addr: u64, blocks: u16) -> Result<(u16, u16), String> {
        self.buffer.bytes()[..REQUEST].fill(0);
        self.buffer.put(0, kind.to_le_bytes());
        self.buffer.put(8, addr.to_le_bytes());
        self.buffer.put(16, blocks.to_le_bytes());
        self.buffer.bytes()[ANSWER_AT..ANSWER_AT + ANSWER].fill(0xff);
        let chain = [
            Segment::read(&self.buffer, 0, REQUEST),
            Segment::write(&self.buffer, ANSWER_AT, ANSWER),
        ];
        self.queue.want_interrupt(true);
        self.queue.add(&chain).ok_or("queue is full")?;
        self.queue.kick();
        if self.queue.wait(Deadline::after_ms(10_000)).is_none() {
            return Err(format!("no answer, device status {:#x}", self.transport.status()));
        }
        let bytes = self.buffer.bytes();
        let word = |at: usize| u16::from_le_bytes([bytes[ANSWER_AT + at], bytes[ANSWER_AT + at + 1]]);
        Ok((word(0), word(8)))
    }

    /// Plugs from the begin of the region on, or unplugs from the end of what is plugged, until `bytes` are: as if nobody had left
    /// gaps.
    pub fn reach(&mut self, bytes: u64) -> Result<(), String> {
        loop {
            let config = self.config()?;
            let (now, wanted) = (config.plugged / config.block, bytes / config.block);
            let (kind, from, count) = match now {
                _ if now == wanted => return Ok(()),
                _ if now < wanted => (request::PLUG, now, (wanted - now).min(BATCH)),
                _ => {
                    let count = (now - wanted).min(BATCH);
                    (request::UNPLUG, now - count, count)
                }
            };
            let (answer, _) = self.ask(kind, config.addr + from * config.block, count as u16)?;
            if answer != 0 {
                return Err(format!("answer {answer} with {} bytes plugged", config.plugged));
            }
        }
    }
}
