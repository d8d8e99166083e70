//! A guest's end of a port: its queues, while a front end is connected.

use triarch_virtio::{Chain, RingFault, VirtQueue};

use super::packet::{Rest, Scatter};
use crate::features;
use crate::offload::{Accepts, HEADER, LEGACY_HEADER, NUM_BUFFERS_AT};
use crate::switch::Drop;

/// Flows that are remembered to be on one of several queues.
const FLOWS: usize = 256;

/// A queue the guest receives from.
pub(super) struct Rx {
    queue: VirtQueue,
    /// Chains of the packet at hand; empty in between.
    chains: Vec<Chain>,
    used: Vec<(u16, u32)>,
    /// Something was completed since the guest was told.
    pub(super) unsignalled: bool,
}

impl Rx {
    fn new(mut queue: VirtQueue) -> Self {
        // What finds no buffer is lost; nobody waits for buffers.
        queue.disarm();
        Self {
            queue,
            chains: Vec::new(),
            used: Vec::new(),
            unsignalled: false,
        }
    }

    /// Tells the guest of what was completed.
    pub(super) fn signal(&mut self) {
        if std::mem::take(&mut self.unsignalled) {
            self.queue.signal();
        }
    }

    /// Gives the guest one packet: `header`, whose number of buffers is filled in here, then `head`, then `rest`.
    fn deliver(&mut self, mut header: [u8; HEADER], kind: Kind, head: &[u8], rest: Rest<'_>) -> Result<(), Drop> {
        let need = kind.header + head.len() + rest.len();
        let mut room = 0;
        let result = loop {
            if room >= need {
                break Ok(());
            }
            if !self.chains.is_empty() && !kind.mergeable {
                break Err(Drop::TooLong);
            }
            let Some(chain) = self.queue.pop() else {
                break Err(Drop::NoBuffers);
            };
            if (chain.writable_len() as usize) < kind.header || !chain.readable().is_empty() {
                self.queue
                    .fault(&RingFault::Request("a receive buffer is no place for a header"));
                self.chains.clear();
                return Err(Drop::NoBuffers);
            }
            room += chain.writable_len() as usize;
            self.chains.push(chain);
        };
        if let Err(reason) = result {
            for _ in self.chains.drain(..) {
                self.queue.unpop();
            }
            return Err(reason);
        }
        header[NUM_BUFFERS_AT..].copy_from_slice(&(self.chains.len() as u16).to_le_bytes());
        let memory = self.queue.memory();
        let mut scatter = Scatter::new(&memory, &self.chains);
        let written = scatter
            .write(&header[..kind.header])
            .and_then(|()| scatter.write(head))
            .and_then(|()| scatter.write_rest(rest));
        if written.is_err() {
            // Not one byte too many was written; and whose memory it was that went away below the packet cannot be told.
            for _ in self.chains.drain(..) {
                self.queue.unpop();
            }
            return Err(Drop::Malformed);
        }
        let mut left = need as u32;
        self.used.clear();
        for chain in self.chains.drain(..) {
            let n = chain.writable_len().min(left);
            left -= n;
            self.used.push((chain.head(), n));
        }
        self.queue.complete_all(&self.used);
        self.unsignalled = true;
        Ok(())
    }
}

/// A queue the guest sends on.
pub(super) struct Tx {
    pub(super) queue: VirtQueue,
    /// What it is called among all that can have work.
    pub(super) source: u64,
    /// The guest notifies of the next packet.
    pub(super) armed: bool,
    /// When (ns) it had a packet last.
    pub(super) busy_at: u64,
}

/// How packets look to a guest.
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// Bytes of header.
    header: usize,
    /// A packet may fill several buffers.
    mergeable: bool,
}

/// A guest that is there.
pub(super) struct Guest {
    /// What was agreed on.
    pub(super) features: u64,
    kind: Kind,
    /// What it takes undone.
    pub(super) accepts: Accepts,
    /// What it may leave undone.
    pub(super) leaves: Accepts,
    rx: Vec<Option<Rx>>,
    tx: Vec<Option<Tx>>,
    /// The pair each flow was last sent on.
    flows: Box<[u8; FLOWS]>,
}

impl Guest {
    /// One whose driver agreed to `features`, with at most `pairs` pairs of queues.
    pub(super) fn new(features: u64, pairs: usize) -> Self {
        let modern = features & (features::VERSION_1 | features::MRG_RXBUF) != 0;
        Self {
            features,
            kind: Kind {
                header: if modern { HEADER } else { LEGACY_HEADER },
                mergeable: features & features::MRG_RXBUF != 0,
            },
            accepts: features::accepts(features),
            leaves: features::leaves(features),
            rx: (0..pairs).map(|_| None).collect(),
            tx: (0..pairs).map(|_| None).collect(),
            flows: Box::new([0; FLOWS]),
        }
    }

    /// Bytes of header before each packet.
    pub(super) fn header_len(&self) -> usize {
        self.kind.header
    }

    pub(super) fn start_rx(&mut self, pair: usize, queue: VirtQueue) {
        if let Some(slot) = self.rx.get_mut(pair) {
            *slot = Some(Rx::new(queue));
        }
    }

    pub(super) fn stop_rx(&mut self, pair: usize) -> Option<VirtQueue> {
        let mut rx = self.rx.get_mut(pair)?.take()?;
        rx.signal();
        Some(rx.queue)
    }

    /// The place of a queue the guest sends on.
    pub(super) fn tx(&mut self, pair: usize) -> Option<&mut Option<Tx>> {
        self.tx.get_mut(pair)
    }

    /// Queues that run: to receive from, to send on.
    pub(super) fn running(&self) -> (usize, usize) {
        (self.rx.iter().flatten().count(), self.tx.iter().flatten().count())
    }

    /// Queues that the guest broke.
    pub(super) fn broken(&self) -> usize {
        let rx = self.rx.iter().flatten().filter(|rx| rx.queue.faulted());
        let tx = self.tx.iter().flatten().filter(|tx| tx.queue.faulted());
        rx.count() + tx.count()
    }

    /// Whether it matters which flow a packet belongs to.
    pub(super) fn has_flows(&self) -> bool {
        self.rx.len() > 1
    }

    /// Remembers that a flow is on `pair`.
    pub(super) fn saw_flow(&mut self, flow: u8, pair: usize) {
        self.flows[usize::from(flow)] = pair as u8;
    }

    /// Gives the guest a packet that suits it, on the queue of its flow. Returns that queue's pair.
    pub(super) fn deliver(
        &mut self,
        flow: u8,
        header: [u8; HEADER],
        head: &[u8],
        rest: Rest<'_>,
    ) -> Result<usize, Drop> {
        let wanted = usize::from(self.flows[usize::from(flow)]);
        let pair = match self.rx.get(wanted) {
            Some(Some(_)) => wanted,
            _ => self.rx.iter().position(Option::is_some).ok_or(Drop::Down)?,
        };
        let rx = self.rx.get_mut(pair).and_then(Option::as_mut).ok_or(Drop::Down)?;
        rx.deliver(header, self.kind, head, rest).map(|()| pair)
    }

    /// A queue to receive from.
    pub(super) fn rx(&mut self, pair: usize) -> Option<&mut Rx> {
        self.rx.get_mut(pair)?.as_mut()
    }
}
