//! A thread that takes memory from one stream.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lz4_flex::block::decompress_into;
use triarch_device_core::{Sandbox, ThreadClass, Worker};

use super::DestinationError;
use crate::memory::{Layout, Target};
use crate::stream::{Interrupt, Stream, StreamError, unexpected};
use crate::wire::{Kind, Message, Pages};

/// All threads of a session.
pub(super) struct Team {
    workers: Vec<Worker<()>>,
    results: Receiver<u64>,
    /// Why the first of them failed.
    failed: Arc<Mutex<Option<DestinationError>>>,
    interrupt: Interrupt,
    /// Streams that did not end yet.
    open: Arc<AtomicUsize>,
    /// All threads are past their streams.
    finished: bool,
}

impl Team {
    /// Starts a thread for each stream. One that fails raises `interrupt`.
    pub(super) fn start(
        streams: Vec<Stream>,
        target: &Arc<dyn Target>,
        layout: &Layout,
        interrupt: &Interrupt,
        silence: Duration,
        sandbox: &Arc<dyn Sandbox>,
    ) -> io::Result<Self> {
        let (report, results) = channel();
        let mut team = Self {
            workers: Vec::new(),
            results,
            failed: Arc::default(),
            interrupt: interrupt.clone(),
            open: Arc::new(AtomicUsize::new(streams.len())),
            finished: false,
        };
        for (index, mut stream) in streams.into_iter().enumerate() {
            stream.set_interrupt(interrupt);
            let mut taker = TakesMemory {
                writer: Writer::new(target.clone(), layout.clone()),
                silence,
            };
            let (report, failed, interrupt) = (report.clone(), team.failed.clone(), interrupt.clone());
            let open = team.open.clone();
            let run = move |(): &mut (), _: &_| {
                let end = taker.run(&mut stream);
                open.fetch_sub(1, Ordering::Release);
                match end {
                    Ok(()) => {
                        let _ = report.send(taker.writer.bytes);
                    }
                    Err(error) => {
                        failed
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .get_or_insert(error);
                        interrupt.raise();
                    }
                }
            };
            let name = format!("migrate-{index}");
            team.workers
                .push(Worker::spawn(&name, ThreadClass::Migration, sandbox, (), run)?);
        }
        Ok(team)
    }

    /// Whether memory may still come. Whoever is silent on one of these streams fails by that.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire) > 0
    }

    /// Why one of them failed, if one did.
    pub(super) fn check(&self) -> Result<(), DestinationError> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }

    /// Waits until all streams have ended as agreed, and returns how many bytes came.
    pub(super) fn finish(mut self, wait: Duration) -> Result<u64, DestinationError> {
        let mut sum: u64 = 0;
        for _ in &self.workers {
            match self.results.recv_timeout(wait) {
                Ok(bytes) => sum = sum.saturating_add(bytes),
                Err(_) => {
                    self.check()?;
                    return Err(StreamError::Late("end its streams").into());
                }
            }
        }
        self.finished = true;
        Ok(sum)
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        if !self.finished {
            self.interrupt.raise();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.stop();
        }
    }
}

struct TakesMemory {
    writer: Writer,
    silence: Duration,
}

impl TakesMemory {
    fn run(&mut self, stream: &mut Stream) -> Result<(), DestinationError> {
        loop {
            let came = stream.begin(self.silence, "send memory")?;
            if came.0 == Kind::Pages && self.writer.take_as_it_comes(stream, came.1)? {
                continue;
            }
            let came = stream.rest(came)?;
            let round = match stream.message(came)? {
                Message::Alive => continue,
                Message::End => return Ok(()),
                Message::RoundEnd(round) => round,
                message => {
                    self.writer.take(&message)?;
                    continue;
                }
            };
            stream.send(&Message::RoundDone(round))?;
        }
    }
}

/// Puts into memory what messages say.
pub(crate) struct Writer {
    target: Arc<dyn Target>,
    layout: Layout,
    unpacked: Vec<u8>,
    bytes: u64,
}

impl Writer {
    pub(crate) fn new(target: Arc<dyn Target>, layout: Layout) -> Self {
        Self {
            target,
            layout,
            unpacked: Vec::new(),
            bytes: 0,
        }
    }

    /// Carries out a message about pages; of others there should be none.
    pub(crate) fn take(&mut self, message: &Message) -> Result<(), DestinationError> {
        match message {
            Message::Pages(pages) => self.write(pages),
            Message::Zeroes(runs) => {
                self.check(runs.iter())?;
                runs.iter()
                    .try_for_each(|(gpa, len)| self.target.zero(gpa, len))
                    .map_err(DestinationError::Memory)
            }
            other => Err(unexpected(other, "memory").into()),
        }
    }

    /// Has the kernel put the pages of a message, which began on `stream` and has `len` bytes, into memory. `false`: it is to be
    /// [taken](Self::take).
    fn take_as_it_comes(&mut self, stream: &mut Stream, len: usize) -> Result<bool, DestinationError> {
        let Some(inlet) = self.target.inlet() else {
            return Ok(false);
        };
        let Some(runs) = stream.pages_ahead(len)? else {
            return Ok(false);
        };
        self.check(runs.iter())?;
        let bytes = runs.len();
        stream.receive_pages(runs, inlet)?;
        self.bytes = self.bytes.saturating_add(bytes);
        Ok(true)
    }

    /// All is looked at before anything is written.
    fn check(&self, mut runs: impl Iterator<Item = (u64, u64)>) -> Result<(), DestinationError> {
        match runs.find(|(gpa, len)| !self.layout.holds(*gpa, *len)) {
            Some((gpa, _)) => Err(DestinationError::Outside { gpa }),
            None => Ok(()),
        }
    }

    fn write(&mut self, pages: &Pages) -> Result<(), DestinationError> {
        self.check(pages.runs.iter())?;
        let bytes = match pages.packed {
            false => pages.bytes,
            true => {
                // Bounded when the message was read.
                let len = pages.runs.len() as usize;
                if self.unpacked.len() < len {
                    self.unpacked.resize(len, 0);
                }
                match decompress_into(pages.bytes, &mut self.unpacked[..len]) {
                    Ok(found) if found == len => &self.unpacked[..len],
                    _ => return Err(DestinationError::Damaged),
                }
            }
        };
        let mut rest = bytes;
        for (gpa, len) in pages.runs.iter() {
            let (run, after) = rest.split_at_checked(len as usize).ok_or(DestinationError::Damaged)?;
            self.target.write(gpa, run).map_err(DestinationError::Memory)?;
            rest = after;
        }
        self.bytes = self.bytes.saturating_add(pages.runs.len());
        Ok(())
    }
}
