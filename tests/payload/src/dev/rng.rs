//! virtio-rng (virtio 1.2 §5.4).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// An entropy device.
pub struct Rng {
    transport: Transport,
    queue: Queue,
    data: Dma,
}

impl Driver for Rng {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(setup.features())?;
        let queue = transport.queue(0, setup.size, Options::of(features))?;
        transport.run();
        Ok(Self {
            transport,
            queue,
            data: Dma::new(65536)?,
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

    fn prove(&mut self) -> Result<(), String> {
        self.read(16).map(|_| ())
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport.remap(&mut [&mut self.queue])
    }
}

impl Rng {
    /// `len` random bytes (at most 64 KiB), asked for until all are there.
    pub fn read(&mut self, len: usize) -> Result<&[u8], String> {
        self.data.bytes().fill(0);
        let mut have = 0;
        while have < len {
            let segment = Segment::write(&self.data, have, len - have);
            self.queue.want_interrupt(true);
            self.queue.add(&[segment]).ok_or("queue is full")?;
            self.queue.kick();
            match self.queue.wait(Deadline::after_ms(5000)) {
                Some((_, 0)) => return Err("the device gave 0 bytes".into()),
                Some((_, got)) if got as usize > len - have => {
                    return Err(format!("{got} bytes for a buffer of {}", len - have));
                }
                Some((_, got)) => have += got as usize,
                None => {
                    return Err(format!("no answer, device status {:#x}", self.transport.status()));
                }
            }
        }
        Ok(&self.data.bytes()[..len])
    }
}
