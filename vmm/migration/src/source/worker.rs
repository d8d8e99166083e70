//! A thread that sends memory on one stream.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use triarch_device_core::{Sandbox, ThreadClass, Worker};

use super::pack::Packer;
use super::round::{BATCH, Round, SHARE, batches};
use crate::handle::Handle;
use crate::memory::{Memory, Outlet, PAGE};
use crate::stream::{Interrupt, Stream, StreamError, unexpected};
use crate::wire::{Message, Pages, Runs};

/// How often a stream on which nothing is sent says that it is not dead, at least.
pub(super) const ALIVE: Duration = Duration::from_secs(5);

/// Why memory could not be sent.
#[derive(Debug)]
pub(super) enum Failed {
    Stream(StreamError),
    Memory(io::Error),
}

impl From<StreamError> for Failed {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

/// What a thread did of a round.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Done {
    /// Bytes of memory sent with what is in them.
    pub(super) data: u64,
    /// What that took.
    pub(super) data_time: Duration,
    /// Bytes of memory looked at.
    pub(super) all: u64,
}

/// All threads of a migration.
pub(super) struct Team {
    orders: Vec<Sender<Order>>,
    results: Receiver<Result<Done, Failed>>,
    workers: Vec<Worker<()>>,
    interrupt: Interrupt,
}

enum Order {
    Round(Arc<Round>),
    /// Ends the stream as agreed.
    End,
}

/// What every thread has.
#[derive(Clone)]
pub(super) struct Common {
    pub(super) memory: Arc<dyn Memory>,
    pub(super) handle: Handle,
    pub(super) compress: bool,
    /// How long a destination may be silent.
    pub(super) silence: Duration,
}

impl Team {
    /// Starts a thread for each stream.
    pub(super) fn start(
        streams: Vec<Stream>,
        common: &Common,
        interrupt: &Interrupt,
        sandbox: &Arc<dyn Sandbox>,
    ) -> io::Result<Self> {
        let (report, results) = channel();
        let mut team = Self {
            orders: Vec::new(),
            results,
            workers: Vec::new(),
            interrupt: interrupt.clone(),
        };
        for (index, stream) in streams.into_iter().enumerate() {
            let (order, orders) = channel();
            let sender = SendsMemory::new(stream, common, interrupt);
            let report = report.clone();
            let name = format!("migrate-{index}");
            let run = move |(): &mut (), _: &_| sender.run(&orders, &report);
            let worker = Worker::spawn(&name, ThreadClass::Migration, sandbox, (), run)?;
            team.workers.push(worker);
            team.orders.push(order);
        }
        Ok(team)
    }

    pub(super) fn begin(&self, round: &Arc<Round>) {
        for order in &self.orders {
            // Whoever is gone has said why.
            let _ = order.send(Order::Round(round.clone()));
        }
    }

    /// Waits until all have done their part; `meanwhile` is called now and then.
    pub(super) fn finish(&self, mut meanwhile: impl FnMut() -> Result<(), Failed>) -> Result<Done, Failed> {
        let mut sum = Done::default();
        for _ in &self.orders {
            let done = loop {
                match self.results.recv_timeout(ALIVE / 5) {
                    Ok(result) => break result?,
                    Err(RecvTimeoutError::Timeout) => meanwhile()?,
                    Err(RecvTimeoutError::Disconnected) => return Err(StreamError::Stopped.into()),
                }
            };
            sum.data += done.data;
            sum.all += done.all;
            // They work at the same time.
            sum.data_time = sum.data_time.max(done.data_time);
        }
        Ok(sum)
    }

    /// Ends all streams, after the last round.
    pub(super) fn end(&self) -> Result<(), Failed> {
        for order in &self.orders {
            let _ = order.send(Order::End);
        }
        self.finish(|| Ok(())).map(|_| ())
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.interrupt.raise();
        self.orders.clear();
        for worker in self.workers.drain(..) {
            let _ = worker.stop();
        }
    }
}

/// Sends memory on one stream.
pub(super) struct SendsMemory {
    common: Common,
    packer: Packer,
    interrupt: Interrupt,
    pub(super) stream: Stream,
    /// When something was sent last.
    said: Instant,
    /// Copies of pages, where they are not sent in place.
    buffer: Vec<u8>,
    /// Which pages of a piece are zeroes.
    zero: Vec<bool>,
    data: Runs,
    zeroes: Runs,
}

impl SendsMemory {
    /// Sends on `stream` until `interrupt` is raised.
    pub(super) fn new(mut stream: Stream, common: &Common, interrupt: &Interrupt) -> Self {
        stream.set_interrupt(interrupt);
        Self {
            packer: Packer::new(common.compress),
            common: common.clone(),
            interrupt: interrupt.clone(),
            stream,
            said: Instant::now(),
            buffer: Vec::new(),
            zero: Vec::new(),
            data: Runs::default(),
            zeroes: Runs::default(),
        }
    }

    /// Sends what is on the pages of `pieces` now: zeroes, too. `urgent`: whatever else is sent.
    pub(super) fn send_pages(&mut self, pieces: &[Range<u64>], urgent: bool) -> Result<(), Failed> {
        self.look(pieces, false)?;
        self.send_batch(urgent)
    }

    fn run(mut self, orders: &Receiver<Order>, report: &Sender<Result<Done, Failed>>) {
        loop {
            let result = match orders.recv_timeout(self.alive()) {
                Ok(Order::Round(round)) => self.round(&round),
                Ok(Order::End) => self.send(&Message::End).map(|()| Done::default()),
                Err(RecvTimeoutError::Timeout) => match self.send(&Message::Alive) {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let failed = result.is_err();
            if report.send(result).is_err() || failed {
                return;
            }
        }
    }

    pub(super) fn alive(&self) -> Duration {
        ALIVE.min(self.common.silence / 3)
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), Failed> {
        let sent = self.stream.send(message)?;
        self.count(sent);
        Ok(())
    }

    fn count(&mut self, bytes: usize) {
        let wire = &self.common.handle.counters().wire_bytes;
        wire.fetch_add(bytes as u64, Ordering::Relaxed);
        self.said = Instant::now();
    }

    fn round(&mut self, round: &Round) -> Result<Done, Failed> {
        let mut done = Done::default();
        let memory = self.common.memory.clone();
        loop {
            let handle = &self.common.handle;
            // What is taken cannot be given back, and takes its time where not much may be sent.
            let most = if handle.cap().is_some() { BATCH } else { SHARE };
            let taken = round.take(&*memory, handle.counters(), most);
            let pieces = taken.map_err(Failed::Memory)?;
            if pieces.is_empty() {
                break;
            }
            for batch in batches(pieces) {
                self.batch(&batch, round.first, &mut done)?;
            }
        }
        let asked = Instant::now();
        self.send(&Message::RoundEnd(round.number))?;
        match self.stream.receive(self.common.silence, "confirm what it got")? {
            Message::RoundDone(number) if number == round.number => {}
            other => return Err(unexpected(&other, "the end of the round").into()),
        }
        if done.data > 0 {
            done.data_time += asked.elapsed();
        }
        Ok(done)
    }

    fn batch(&mut self, pieces: &[Range<u64>], first: bool, done: &mut Done) -> Result<(), Failed> {
        let began = Instant::now();
        self.look(pieces, first)?;
        let (data, zeroes) = (self.data.len(), self.zeroes.len());
        self.send_batch(false)?;
        done.data += data;
        done.all += super::round::bytes(pieces);
        if data > 0 {
            // Of what has zeroes as well, the part of the others.
            done.data_time += began.elapsed().mul_f64(data as f64 / (data + zeroes) as f64);
        }
        Ok(())
    }

    /// Looks at the pages of `pieces`, and notes those that are something, or became nothing.
    fn look(&mut self, pieces: &[Range<u64>], first: bool) -> Result<(), Failed> {
        self.data.clear();
        self.zeroes.clear();
        let mut nothing = 0_u64;
        for piece in pieces {
            self.zero.clear();
            self.zero.resize(((piece.end - piece.start) / PAGE) as usize, false);
            let memory = &self.common.memory;
            memory.zeroes(piece.start, &mut self.zero).map_err(Failed::Memory)?;
            for (gpa, zero) in piece.clone().step_by(PAGE as usize).zip(&self.zero) {
                // Pages of the same piece are of the same region.
                let joins = gpa > piece.start;
                if !zero {
                    self.data.push(gpa, PAGE, joins);
                    continue;
                }
                nothing += 1;
                if !first {
                    self.zeroes.push(gpa, PAGE, joins);
                }
            }
        }
        let counters = self.common.handle.counters();
        counters.zero_pages.fetch_add(nothing, Ordering::Relaxed);
        counters.pages.fetch_add(self.data.len() / PAGE, Ordering::Relaxed);
        Ok(())
    }

    /// Sends what was noted.
    fn send_batch(&mut self, urgent: bool) -> Result<(), Failed> {
        if !self.zeroes.is_empty() {
            let zeroes = Message::Zeroes(std::mem::take(&mut self.zeroes));
            self.send(&zeroes)?;
        }
        if self.data.is_empty() {
            return Ok(());
        }
        let memory = self.common.memory.clone();
        match memory.outlet() {
            Some(outlet) if self.stream.is_plain() && !self.common.compress => self.send_in_place(outlet, urgent),
            _ => self.send_copy(urgent),
        }
    }

    /// Sends pages straight from memory.
    fn send_in_place(&mut self, outlet: &dyn Outlet, urgent: bool) -> Result<(), Failed> {
        if !urgent {
            self.pace(self.data.len())?;
        }
        let sent = self.stream.send_pages(std::mem::take(&mut self.data), outlet)?;
        self.count(sent);
        Ok(())
    }

    /// Sends a copy of pages, compressed where that pays.
    fn send_copy(&mut self, urgent: bool) -> Result<(), Failed> {
        let len = self.data.len() as usize;
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        let mut rest = &mut self.buffer[..len];
        for (gpa, len) in self.data.iter() {
            let (page, after) = rest.split_at_mut(len as usize);
            self.common.memory.read(gpa, page).map_err(Failed::Memory)?;
            rest = after;
        }
        // Taken out of `self` while they are borrowed by the message.
        let buffer = std::mem::take(&mut self.buffer);
        let mut packer = std::mem::replace(&mut self.packer, Packer::new(false));
        let plain = &buffer[..len];
        let packed = packer.pack(plain);
        let bytes = packed.unwrap_or(plain);
        let message = Message::Pages(Pages {
            runs: std::mem::take(&mut self.data),
            packed: packed.is_some(),
            bytes,
        });
        let began = Instant::now();
        if !urgent {
            self.pace(bytes.len() as u64)?;
        }
        self.send(&message)?;
        let sent = bytes.len();
        packer.sent(sent, began.elapsed());
        (self.packer, self.buffer) = (packer, buffer);
        Ok(())
    }

    /// Waits until so many bytes may go, and keeps the stream alive meanwhile.
    fn pace(&mut self, bytes: u64) -> Result<(), Failed> {
        let handle = self.common.handle.clone();
        handle.pacer().wait(bytes, || {
            if self.interrupt.is_raised() {
                return Err(Failed::Stream(StreamError::Stopped));
            }
            match self.said.elapsed() > self.alive() {
                true => self.send(&Message::Alive),
                false => Ok(()),
            }
        })
    }
}
