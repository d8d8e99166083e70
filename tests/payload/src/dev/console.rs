//! virtio-console with one port (virtio 1.2 §5.3).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const SIZE: u64 = 1;
const BUFFERS: usize = 16;
const BUFFER: usize = 256;

/// A console.
pub struct Console {
    transport: Transport,
    /// Agreed features.
    pub features: u64,
    receive: Queue,
    transmit: Queue,
    input: Dma,
    output: Dma,
    heads: Vec<(u16, usize)>,
}

impl Driver for Console {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(setup.features() | SIZE)?;
        let receive = transport.queue(0, setup.size, Options::of(features))?;
        let transmit = transport.queue(1, setup.size, Options::of(features))?;
        transport.run();
        let mut console = Self {
            transport,
            features,
            receive,
            transmit,
            input: Dma::new(BUFFERS * BUFFER)?,
            output: Dma::new(65536)?,
            heads: Vec::new(),
        };
        for buffer in 0..BUFFERS.min(usize::from(console.receive.size)) {
            console.give(buffer);
        }
        console.receive.kick();
        Ok(console)
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        alloc::vec![&mut self.receive, &mut self.transmit]
    }

    fn victim(&self) -> u16 {
        1
    }

    fn prove(&mut self) -> Result<(), String> {
        self.write(b"\n")
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport.remap(&mut [&mut self.receive, &mut self.transmit])
    }
}

impl Console {
    fn give(&mut self, buffer: usize) {
        if let Some(head) = self
            .receive
            .add(&[Segment::write(&self.input, buffer * BUFFER, BUFFER)])
        {
            self.heads.push((head, buffer));
        }
    }

    /// Writes `bytes` (at most 64 KiB).
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        let len = bytes.len().min(self.output.len());
        self.output.bytes()[..len].copy_from_slice(&bytes[..len]);
        self.transmit.want_interrupt(true);
        self.transmit
            .add(&[Segment::read(&self.output, 0, len)])
            .ok_or("queue is full")?;
        self.transmit.kick();
        self.transmit
            .wait(Deadline::after_ms(5000))
            .ok_or_else(|| format!("no answer, device status {:#x}", self.transport.status()))?;
        Ok(())
    }

    /// Reads until a newline, the end of the time, or `limit` bytes.
    pub fn read(&mut self, limit: usize, deadline: Deadline) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < limit && text.last() != Some(&b'\n') {
            let Some((head, len)) = self.receive.wait(deadline) else {
                break;
            };
            let Some(place) = self.heads.iter().position(|(known, _)| *known == head) else {
                break;
            };
            let (_, buffer) = self.heads.swap_remove(place);
            let len = (len as usize).min(BUFFER);
            text.extend_from_slice(&self.input.bytes()[buffer * BUFFER..][..len]);
            self.give(buffer);
            self.receive.kick();
        }
        text
    }

    /// Columns and rows.
    pub fn size(&self) -> Result<(u64, u64), String> {
        if self.features & SIZE == 0 {
            return Err("size not offered".into());
        }
        Ok((self.transport.config_number(0, 2)?, self.transport.config_number(2, 2)?))
    }
}
