//! One console port at work: moves bytes between its queues and the host.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use triarch_legacy::console::Console;
use vmm_sys_util::eventfd::EventFd;

use super::{RECEIVE, TRANSMIT};
use crate::wait::{Waiter, stopping};
use crate::{ActivateError, Chain, RingFault, VirtQueue};

/// Bytes moved at once.
const PIECE: usize = 4096;
/// Bytes put out of one chain. The rest would only push these out of the console's ring, and takes a malicious driver's time, not
/// ours.
const CHAIN_MAX: u32 = 1 << 20;
/// Chains put out before input gets its turn.
const TURN: usize = 64;

/// A pair of queues and the console they belong to.
pub(super) struct Port {
    console: Arc<Console>,
    receive: Option<VirtQueue>,
    transmit: Option<VirtQueue>,
}

enum Next {
    /// Everything is done that could be.
    Wait,
    Again,
    Stop,
}

impl Port {
    pub(super) fn new(console: Arc<Console>) -> Self {
        Self {
            console,
            receive: None,
            transmit: None,
        }
    }

    /// Whether it has no queue.
    pub(super) fn is_idle(&self) -> bool {
        self.receive.is_none() && self.transmit.is_none()
    }

    /// Takes over a queue.
    pub(super) fn give(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        match self.slot(queue.index()) {
            Some(slot) if slot.is_none() => {
                *slot = Some(queue);
                Ok(())
            }
            Some(_) => Err(ActivateError::Driver("the queue runs already")),
            None => Err(ActivateError::Driver("a console has two queues")),
        }
    }

    /// Hands a queue back.
    pub(super) fn take(&mut self, index: u16) -> Option<VirtQueue> {
        self.slot(index)?.take()
    }

    fn slot(&mut self, index: u16) -> Option<&mut Option<VirtQueue>> {
        match index {
            RECEIVE => Some(&mut self.receive),
            TRANSMIT => Some(&mut self.transmit),
            _ => None,
        }
    }

    /// Serves the queues until `stop`.
    pub(super) fn run(&mut self, stop: &EventFd) {
        let waiter = match Waiter::new(&self.sources(stop)) {
            Ok(waiter) => waiter,
            Err(error) => {
                tracing::error!("the console cannot wait for its driver and stops: {error}");
                return;
            }
        };
        loop {
            match self.turn(stop) {
                Next::Stop => return,
                Next::Again => {}
                Next::Wait => waiter.wait(),
            }
            for queue in self.queues() {
                // A notification is answered by looking at the queue.
                let _ = queue.kick().read();
            }
        }
    }

    fn sources(&self, stop: &EventFd) -> Vec<RawFd> {
        let kicks = self.receive.iter().chain(&self.transmit).map(|q| q.kick().as_raw_fd());
        kicks.chain([stop.as_raw_fd(), self.console.as_raw_fd()]).collect()
    }

    fn queues(&mut self) -> impl Iterator<Item = &mut VirtQueue> {
        self.receive.iter_mut().chain(&mut self.transmit)
    }

    fn turn(&mut self, stop: &EventFd) -> Next {
        for _ in 0..TURN {
            if stopping(stop) {
                return Next::Stop;
            }
            if !self.transmit_one() {
                self.receive();
                let more = self.transmit.as_mut().is_some_and(VirtQueue::arm);
                return if more { Next::Again } else { Next::Wait };
            }
        }
        self.receive();
        Next::Again
    }

    /// Puts out one chain; returns whether there was one.
    fn transmit_one(&mut self) -> bool {
        let Some(queue) = &mut self.transmit else { return false };
        let Some(chain) = queue.pop() else { return false };
        if chain.writable_len() != 0 || chain.readable_len() == 0 {
            queue.fault(&RingFault::Request(
                "a console output request is not a buffer to be read",
            ));
            return false;
        }
        let memory = queue.memory();
        let mut bytes = [0; PIECE];
        let mut reader = chain.reader(&memory).take(CHAIN_MAX.into());
        // An error means that the region went away between the check and the copy: its bytes are gone with it.
        while let Ok(n @ 1..) = reader.read(&mut bytes) {
            self.console.write(&bytes[..n]);
        }
        drop(memory);
        queue.complete(chain.head(), 0);
        queue.signal();
        true
    }

    /// Does what there is to do for the host's end, and hands its input to the driver as far as that has buffers.
    fn receive(&mut self) {
        let delivered = match &mut self.receive {
            Some(queue) => deliver(&self.console, queue),
            None => {
                self.console.service(&mut []);
                false
            }
        };
        if delivered && let Some(queue) = &mut self.receive {
            queue.signal();
        }
    }
}

/// Fills the buffers of `queue` with input. Returns whether any was.
fn deliver(console: &Console, queue: &mut VirtQueue) -> bool {
    let mut bytes = [0; PIECE];
    let mut delivered = false;
    for _ in 0..TURN {
        let Some(chain) = queue.pop() else {
            if queue.arm() {
                continue;
            }
            // The input stays where it is until the driver notifies us of a buffer.
            console.service(&mut []);
            return delivered;
        };
        if !is_input(&chain) {
            queue.fault(&RingFault::Request(
                "a console input request is not a buffer to be filled",
            ));
            console.service(&mut []);
            return delivered;
        }
        let room = (chain.writable_len() as usize).min(PIECE);
        let n = console.service(&mut bytes[..room]);
        if n == 0 {
            // Kept for the next input, without wanting to hear of further buffers.
            queue.unpop();
            return delivered;
        }
        let memory = queue.memory();
        let written = match chain.writer(&memory).write_all(&bytes[..n]) {
            Ok(()) => n as u32,
            // The region went away between the check and the copy.
            Err(_) => 0,
        };
        drop(memory);
        queue.complete(chain.head(), written);
        delivered = true;
    }
    // More may be waiting: look again after the output had its turn.
    console.room();
    delivered
}

fn is_input(chain: &Chain) -> bool {
    chain.readable_len() == 0 && chain.writable_len() != 0
}
