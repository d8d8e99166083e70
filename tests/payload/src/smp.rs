//! The other processors: each, once started, sleeps until it is given a job by an interrupt.

use crate::arch::{interrupts, power, smp as arch};
use crate::clock::Deadline;
use crate::serial;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// What the boot processor and another processor tell each other.
#[derive(Default)]
#[repr(C)]
pub struct Mailbox {
    /// 1 + its id, once it runs.
    started: AtomicU64,
    /// Number of the last job given, counted up.
    job: AtomicU64,
    /// Number of the last job done.
    done: AtomicU64,
}

/// A running processor beside the one the shell runs on.
pub struct Processor {
    /// Its id as it reads it itself.
    pub id: u64,
    mailbox: &'static Mailbox,
}

/// Where the architecture's entry code brings a processor to, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn processor_main(mailbox: &'static Mailbox) -> ! {
    if let Err(why) = interrupts::init_processor() {
        serial::write(&format!("\npanic {why}\n"));
        power::park();
    }
    mailbox.started.store(1 + interrupts::processor_id(), Ordering::SeqCst);
    let mut done = 0;
    loop {
        let job = mailbox.job.load(Ordering::SeqCst);
        if job == done {
            interrupts::wait(&mailbox.job, done, 0);
        } else {
            done = job;
            mailbox.done.store(done, Ordering::SeqCst);
        }
    }
}

impl Mailbox {
    /// The processor behind this mailbox when it runs, waited for so long.
    pub fn answer(&'static self, ms: u64) -> Option<Processor> {
        let deadline = Deadline::after_ms(ms);
        while deadline.left().is_some() {
            if let id @ 1.. = self.started.load(Ordering::SeqCst) {
                return Some(Processor {
                    id: id - 1,
                    mailbox: self,
                });
            }
            core::hint::spin_loop();
        }
        None
    }
}

impl Processor {
    /// Gives it a job by an interrupt and waits until it is done.
    pub fn ping(&self) -> Result<(), String> {
        let job = self.mailbox.job.fetch_add(1, Ordering::SeqCst) + 1;
        interrupts::wake(self.id);
        let deadline = Deadline::after_ms(2000);
        while self.mailbox.done.load(Ordering::SeqCst) != job {
            if deadline.left().is_none() {
                return Err(format!("processor {} does not answer an interrupt", self.id));
            }
            core::hint::spin_loop();
        }
        Ok(())
    }
}

/// Starts every processor of `ids` but the one we run on.
pub fn start_all(ids: &[u64]) -> Result<Vec<Processor>, String> {
    let own = interrupts::processor_id();
    ids.iter()
        .filter(|id| **id != own)
        .enumerate()
        .map(|(n, id)| arch::start(n + 1, *id))
        .collect()
}
