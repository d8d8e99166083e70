//! virtio-balloon (virtio 1.2 §5.5).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const STATS_VQ: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;
const ACTUAL: u64 = 4;
const PAGE: u64 = 4096;
/// Page numbers of one request.
const BATCH: usize = 1024;

/// A balloon.
pub struct Balloon {
    transport: Transport,
    /// Agreed features.
    pub features: u64,
    inflate: Queue,
    deflate: Queue,
    statistics: Queue,
    reporting: Option<Queue>,
    numbers: Dma,
    told: Dma,
    actual: u32,
}

impl Driver for Balloon {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(setup.features() | STATS_VQ | REPORTING)?;
        if features & STATS_VQ == 0 {
            return Err("the balloon takes no statistics".into());
        }
        let queue = |index| transport.queue(index, setup.size, Options::of(features));
        let (inflate, deflate, statistics) = (queue(0)?, queue(1)?, queue(2)?);
        // Behind the others without a gap, as Linux counts.
        let reporting = if features & REPORTING != 0 {
            Some(queue(3)?)
        } else {
            None
        };
        transport.run();
        let balloon = Self {
            transport,
            features,
            inflate,
            deflate,
            statistics,
            reporting,
            numbers: Dma::new(4 * BATCH)?,
            told: Dma::new(64)?,
            actual: 0,
        };
        balloon.tell_size()?;
        Ok(balloon)
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        let first = [&mut self.inflate, &mut self.deflate, &mut self.statistics];
        first.into_iter().chain(&mut self.reporting).collect()
    }

    fn victim(&self) -> u16 {
        0
    }

    /// A page that is none.
    fn prove(&mut self) -> Result<(), String> {
        self.numbers.put(0, u32::MAX.to_le_bytes());
        let request = [Segment::read(&self.numbers, 0, 4)];
        send(&mut self.inflate, &request, &self.transport)
    }

    fn remap(&mut self) -> Result<(), String> {
        let first = [&mut self.inflate, &mut self.deflate, &mut self.statistics];
        let mut queues: Vec<&mut Queue> = first.into_iter().chain(&mut self.reporting).collect();
        self.transport.remap(&mut queues)
    }
}

impl Balloon {
    /// Pages the host wants, and pages in the balloon.
    pub fn sizes(&self) -> Result<(u64, u32), String> {
        Ok((self.transport.config_number(0, 4)?, self.actual))
    }

    /// Puts `pages` pages from `start` on in, or takes them out.
    pub fn change(&mut self, inflate: bool, start: u64, pages: u64) -> Result<(), String> {
        let first = start / PAGE;
        let mut done = 0;
        while done < pages {
            let count = (pages - done).min(BATCH as u64);
            for n in 0..count {
                let number = (first + done + n) as u32;
                self.numbers.put(4 * n as usize, number.to_le_bytes());
            }
            let request = [Segment::read(&self.numbers, 0, 4 * count as usize)];
            let queue = if inflate { &mut self.inflate } else { &mut self.deflate };
            send(queue, &request, &self.transport)?;
            done += count;
            self.actual = match inflate {
                true => self.actual.wrapping_add(count as u32),
                false => self.actual.wrapping_sub(count as u32),
            };
            self.tell_size()?;
        }
        Ok(())
    }

    fn tell_size(&self) -> Result<(), String> {
        self.transport.write_config32(ACTUAL, self.actual)
    }

    /// Reports that `len` bytes from `start` on are free.
    pub fn report(&mut self, start: u64, len: u32) -> Result<(), String> {
        let queue = self.reporting.as_mut().ok_or("the balloon takes no reports")?;
        let segment = Segment {
            address: start,
            len,
            write: true,
        };
        send(queue, &[segment], &self.transport)
    }

    /// Tells the host of so many bytes that are free; it may keep the buffer.
    pub fn tell_free(&mut self, bytes: u64) -> Result<(), String> {
        self.told.put(0, 4u16.to_le_bytes());
        self.told.put(2, bytes.to_le_bytes());
        let segment = Segment::read(&self.told, 0, 10);
        self.statistics.add(&[segment]).ok_or("queue is full")?;
        self.statistics.kick();
        Ok(())
    }

    /// Waits until the host wants new statistics.
    pub fn wait_wanted(&mut self) -> Result<(), String> {
        self.statistics.want_interrupt(true);
        let wanted = self.statistics.wait(Deadline::after_ms(5000));
        wanted.map(|_| ()).ok_or_else(|| "nobody wants statistics".into())
    }
}

fn send(queue: &mut Queue, request: &[Segment], transport: &Transport) -> Result<(), String> {
    queue.want_interrupt(true);
    queue.add(request).ok_or("queue is full")?;
    queue.kick();
    match queue.wait(Deadline::after_ms(10_000)) {
        Some(_) => Ok(()),
        None => Err(format!("no answer, device status {:#x}", transport.status())),
    }
}
