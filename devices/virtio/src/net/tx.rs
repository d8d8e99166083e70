//! From the guest to the host: packets go straight out of the guest's buffers (virtio 1.2, 5.1.6.2).

use std::io;

use triarch_memory::GuestMemory;
use triarch_net::{HEADER_LEN, MAX_PACKET, PacketQueue};

use super::counters::Direction;
use super::vectors::{GuestVectors, Recycled};
use crate::{Chain, VirtQueue};

/// Packets before the other direction gets its turn.
const BUDGET: usize = 128;
/// The shortest frame the kernel takes: an Ethernet header.
const MIN_PACKET: usize = HEADER_LEN + 14;

/// Why sending paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TxPause {
    /// The guest has nothing more: wait for its notification.
    NoPacket,
    /// The host takes no more: wait until it is writable.
    HostFull,
    /// There may be more at once.
    Budget,
}

/// A transmit queue at work.
pub(super) struct Tx {
    queue: VirtQueue,
    recycled: Recycled,
    notified: bool,
}

impl Tx {
    pub(super) fn new(queue: VirtQueue) -> Self {
        Self {
            queue,
            recycled: Recycled::default(),
            notified: true,
        }
    }

    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    pub(super) fn into_queue(self) -> VirtQueue {
        self.queue
    }

    /// Sends packets until something is missing.
    pub(super) fn transmit(&mut self, host: &PacketQueue, counters: &Direction) -> TxPause {
        let mut completed = false;
        let mut pause = TxPause::Budget;
        for _ in 0..BUDGET {
            let Some(chain) = self.queue.pop() else {
                if self.queue.arm() {
                    continue;
                }
                self.notified = true;
                pause = TxPause::NoPacket;
                break;
            };
            if self.notified {
                self.queue.disarm();
                self.notified = false;
            }
            let memory = self.queue.memory();
            match send(&memory, &chain, host, &mut self.recycled) {
                Ok(()) => counters.passed(chain.readable_len() as usize - HEADER_LEN),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.unpop();
                    pause = TxPause::HostFull;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.queue.unpop();
                    continue;
                }
                // Malformed, or the interface is down or gone: lost, as on a wire.
                Err(_) => counters.dropped(),
            }
            self.queue.complete(chain.head(), 0);
            completed = true;
        }
        if completed {
            self.queue.signal();
        }
        pause
    }
}

fn send(memory: &GuestMemory, chain: &Chain, host: &PacketQueue, recycled: &mut Recycled) -> io::Result<()> {
    let len = chain.readable_len() as usize;
    if !(MIN_PACKET..=MAX_PACKET).contains(&len) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut vectors = GuestVectors::new(memory, recycled);
    let sent = vectors.push(chain.readable()).and_then(|_| vectors.write(host));
    vectors.recycle(recycled);
    sent.map(|_| ())
}
