//! Loads on a NIC, to be measured: frames as fast as they are taken, frames counted, frames there and back.

use super::load::Histogram;
use super::net::{HEADER, Net};
use crate::clock::{Deadline, ticks, ticks_of_ms};
use crate::interrupts;
use crate::virtio::ring::{Dma, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Frames in flight.
const DEPTH: u16 = 64;
/// A frame is described in pieces of this many bytes.
const PIECE: usize = 16384;
/// What is in flight at the end is waited for so long.
const DRAIN_MS: u64 = 10_000;

/// What was done in how long.
#[derive(Default)]
pub struct Tally {
    /// Frames.
    pub frames: u64,
    /// Bytes of them, without the device's header.
    pub bytes: u64,
    /// Ticks: from the start to the end, or from the first frame that came to the last.
    pub ticks: u64,
    /// Notifications sent to the device.
    pub kicks: u64,
    /// Interrupts taken.
    pub interrupts: u64,
}

/// A frame behind its header, where the device can read it.
struct Outgoing {
    dma: Dma,
    chain: Vec<Segment>,
}

impl Outgoing {
    fn new(header: &[u8; HEADER], frame: &[u8]) -> Result<Self, String> {
        let len = HEADER + frame.len();
        let mut dma = Dma::new(len)?;
        dma.bytes()[..HEADER].copy_from_slice(header);
        dma.bytes()[HEADER..len].copy_from_slice(frame);
        let pieces = (0..len).step_by(PIECE);
        let chain = pieces
            .map(|at| Segment::read(&dma, at, (len - at).min(PIECE)))
            .collect();
        Ok(Self { dma, chain })
    }
}

impl Net {
    /// Sends `frame` again and again for so long, on the first queue pair.
    pub fn flood(&mut self, header: &[u8; HEADER], frame: &[u8], ms: u64) -> Result<Tally, String> {
        let outgoing = Outgoing::new(header, frame)?;
        let tally = self.flood_with(&outgoing, ms);
        let result = tally.as_ref().map(|_| ()).map_err(Clone::clone);
        self.settle(outgoing, result)?;
        let frame = frame.len() as u64;
        tally.map(|tally| Tally {
            bytes: tally.frames * frame,
            ..tally
        })
    }

    fn flood_with(&mut self, outgoing: &Outgoing, ms: u64) -> Result<Tally, String> {
        let queue = &mut self.pairs[0].transmit;
        let depth = DEPTH.min(queue.size / outgoing.chain.len() as u16).max(1);
        let (kicked, interrupted) = (queue.kicks, interrupts::count(queue.vector));
        let (deadline, start) = (Deadline::after_ms(ms), ticks());
        let end = start + ticks_of_ms(ms);
        let mut frames = 0;
        while ticks() < end {
            let seen = interrupts::count(queue.vector);
            while queue.poll().is_some() {
                frames += 1;
            }
            while queue.in_flight() < depth {
                queue.add(&outgoing.chain).ok_or("queue is full")?;
            }
            queue.kick();
            // Asleep until half of them are gone, as far as the device can tell.
            queue.want_interrupt_after(depth / 2);
            if let (true, Some(left)) = (queue.done() <= depth / 2, deadline.left()) {
                interrupts::sleep(queue.vector, seen, left);
            }
            queue.want_interrupt(false);
        }
        let passed = ticks() - start;
        Ok(Tally {
            frames,
            bytes: 0,
            ticks: passed,
            kicks: queue.kicks - kicked,
            interrupts: interrupts::count(queue.vector) - interrupted,
        })
    }

    /// Counts the frames of `kind` (their ethertype) that come in for so long, on the first queue pair.
    pub fn sink(&mut self, kind: u16, ms: u64) -> Result<Tally, String> {
        let deadline = Deadline::after_ms(ms);
        let mut tally = Tally::default();
        let (kicked, interrupted) = {
            let queue = &self.pairs[0].receive;
            (queue.kicks, interrupts::count(queue.vector))
        };
        let (mut first, mut last) = (0, 0);
        while let (Some((frame, bytes)), Some(_)) = (self.incoming(deadline), deadline.left()) {
            if frame != kind {
                continue;
            }
            last = ticks();
            if tally.frames == 0 {
                first = last;
            }
            tally.frames += 1;
            tally.bytes += bytes as u64;
        }
        let queue = &self.pairs[0].receive;
        Ok(Tally {
            ticks: last - first,
            kicks: queue.kicks - kicked,
            interrupts: interrupts::count(queue.vector) - interrupted,
            ..tally
        })
    }

    /// The next frame on the first queue pair: ethertype and length. Its buffers are the device's again.
    fn incoming(&mut self, deadline: Deadline) -> Option<(u16, usize)> {
        let pair = &mut self.pairs[0];
        let (mut kind, mut bytes, mut left) = (0, 0, 1u16);
        while left > 0 {
            let (head, len) = match pair.receive.poll() {
                Some(done) => done,
                None => {
                    // All that came is taken: time to tell that there are buffers again.
                    pair.receive.kick();
                    pair.receive.wait(deadline)?
                }
            };
            let buffer = pair.peek(head)?;
            if bytes == 0 {
                left = u16::from_le_bytes([buffer[10], buffer[11]]).max(1);
                kind = u16::from_be_bytes([buffer[HEADER + 12], buffer[HEADER + 13]]);
            }
            bytes += len as usize;
            pair.give_back(head);
            left -= 1;
        }
        Some((kind, bytes.saturating_sub(HEADER)))
    }

    /// Answers each frame of `kind` that comes by sending `frame`, for so long; how many.
    pub fn answer(&mut self, frame: &[u8], kind: u16, ms: u64) -> Result<u64, String> {
        let outgoing = Outgoing::new(&[0; HEADER], frame)?;
        let deadline = Deadline::after_ms(ms);
        let mut count = 0;
        let mut result = Ok(());
        while let (Some((came, _)), Some(_), Ok(())) = (self.incoming(deadline), deadline.left(), &result) {
            if came == kind {
                result = self.post(&outgoing);
                count += 1;
            }
        }
        self.settle(outgoing, result).map(|()| count)
    }

    /// Sends `frame`, waits for a frame of `kind`, and again, for so long; ticks of each turn.
    pub fn turns(&mut self, frame: &[u8], kind: u16, ms: u64) -> Result<Histogram, String> {
        let outgoing = Outgoing::new(&[0; HEADER], frame)?;
        let deadline = Deadline::after_ms(ms);
        let mut histogram = Histogram::new();
        // A frame that came before is no answer.
        while self.pairs[0].receive.done() > 0 && self.incoming(deadline).is_some() {}
        let mut result = Ok(());
        while deadline.left().is_some() && result.is_ok() {
            let start = ticks();
            result = self.turn(&outgoing, kind);
            histogram.add(ticks() - start);
        }
        self.settle(outgoing, result).map(|()| histogram)
    }

    fn turn(&mut self, outgoing: &Outgoing, kind: u16) -> Result<(), String> {
        self.post(outgoing)?;
        let deadline = Deadline::after_ms(2000);
        while let Some((came, _)) = self.incoming(deadline) {
            if came == kind {
                return Ok(());
            }
        }
        let status = self.transport.status();
        Err(format!("a frame did not come back, device status {status:#x}"))
    }

    /// Sends without waiting until the device has taken the frame.
    fn post(&mut self, outgoing: &Outgoing) -> Result<(), String> {
        let queue = &mut self.pairs[0].transmit;
        while queue.poll().is_some() {}
        queue.want_interrupt(false);
        queue.add(&outgoing.chain).ok_or("queue is full")?;
        queue.kick();
        Ok(())
    }

    /// Frees a frame when the device has read it for the last time.
    fn settle(&mut self, outgoing: Outgoing, mut result: Result<(), String>) -> Result<(), String> {
        let deadline = Deadline::after_ms(DRAIN_MS);
        let queue = &mut self.pairs[0].transmit;
        while queue.in_flight() > 0 && result.is_ok() {
            let done = queue.wait(deadline).map(|_| ());
            result = done.ok_or_else(|| "frames are not taken".into());
        }
        if result.is_err() {
            self.transport.reset();
        }
        drop(outgoing.dma);
        result
    }
}
