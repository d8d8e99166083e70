//! virtio-iommu (virtio 1.2 §5.13).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::string::String;
use alloc::vec::Vec;

/// All that it can offer.
const FEATURES: u64 = 0x77;
/// Bytes of a request at most, and where its answer is.
const ANSWER: usize = 2048;
/// Bytes of a fault, and where it is.
const FAULT: usize = 24;
const FAULT_AT: usize = 1024;
/// Status of a request that was not answered.
const NONE: u8 = 0xff;

/// An IOMMU.
pub struct Iommu {
    transport: Transport,
    /// Agreed features.
    pub features: u64,
    requests: Queue,
    events: Queue,
    data: Dma,
}

impl Driver for Iommu {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(FEATURES | setup.features())?;
        let requests = transport.queue(0, setup.size, Options::of(features))?;
        let events = transport.queue(1, setup.size, Options::of(features))?;
        transport.run();
        let mut iommu = Self {
            transport,
            features,
            requests,
            events,
            data: Dma::new(4096)?,
        };
        iommu.offer();
        Ok(iommu)
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        alloc::vec![&mut self.requests, &mut self.events]
    }

    fn victim(&self) -> u16 {
        0
    }

    fn prove(&mut self) -> Result<(), String> {
        // A domain that nobody is in.
        match self.request(2, &[0, 0, 0, 0], 4)? {
            NONE => Err("no status".into()),
            _ => Ok(()),
        }
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport.remap(&mut [&mut self.requests, &mut self.events])
    }
}

impl Iommu {
    /// The registers, to look at.
    pub fn registers(&self) -> &Transport {
        &self.transport
    }

    /// Gives a buffer for the next fault.
    fn offer(&mut self) {
        let segment = Segment::write(&self.data, FAULT_AT, FAULT);
        self.events.want_interrupt(true);
        if self.events.add(&[segment]).is_some() {
            self.events.kick();
        }
    }

    /// Sends a request of type `kind` with these words and `room` bytes for its answer; its status.
    pub fn request(&mut self, kind: u8, words: &[u32], room: usize) -> Result<u8, String> {
        self.data.bytes()[ANSWER..ANSWER + room].fill(NONE);
        self.data.put(0, [kind, 0, 0, 0]);
        for (n, word) in words.iter().enumerate() {
            self.data.put(4 + 4 * n, word.to_le_bytes());
        }
        let chain = [
            Segment::read(&self.data, 0, 4 + 4 * words.len()),
            Segment::write(&self.data, ANSWER, room),
        ];
        self.requests.want_interrupt(true);
        self.requests.add(&chain).ok_or("queue is full")?;
        self.requests.kick();
        let done = self.requests.wait(Deadline::after_ms(5000));
        done.ok_or_else(|| self.requests.silence())?;
        Ok(self.data.bytes()[ANSWER + room - 4])
    }

    /// Bytes of the last answer.
    pub fn answer(&mut self, len: usize) -> &[u8] {
        &self.data.bytes()[ANSWER..ANSWER + len]
    }

    /// The next fault within `ms`: reason, flags, endpoint, address.
    pub fn fault(&mut self, ms: u64) -> Option<(u8, u32, u32, u64)> {
        self.events.wait(Deadline::after_ms(ms))?;
        let mut fault = [0; FAULT];
        fault.copy_from_slice(&self.data.bytes()[FAULT_AT..FAULT_AT + FAULT]);
        self.offer();
        let word = |at: usize| u32::from_le_bytes([fault[at], fault[at + 1], fault[at + 2], fault[at + 3]]);
        let address = u64::from(word(16)) | u64::from(word(20)) << 32;
        Some((fault[0], word(4), word(8), address))
    }
}
