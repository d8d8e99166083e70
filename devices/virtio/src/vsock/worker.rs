//! The device's thread: moves packets between the queues and the connections.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use triarch_device_core::{Sandbox, ThreadClass, Worker};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::BUFFER;
use super::engine::{Engine, MAX_REFUSALS};
use super::packet::{HEADER_LEN, Header, op};
use crate::{Chain, RingFault, VirtQueue};

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const RX_KICK: u64 = 2;
const TX_KICK: u64 = 3;
const EVENT_KICK: u64 = 4;
/// Packets before the other direction gets its turn.
const BUDGET: usize = 64;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

impl Engine {
    /// Starts the thread. Both queues for packets must be there.
    pub(super) fn spawn(mut self, sandbox: &Arc<dyn Sandbox>) -> io::Result<Worker<Engine>> {
        let epoll = Epoll::new()?;
        let watch = |fd: RawFd, token, set| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token));
        watch(
            self.listener.as_raw_fd(),
            LISTENER,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        )?;
        let queues = [(&self.rx, RX_KICK), (&self.tx, TX_KICK), (&self.event, EVENT_KICK)];
        for (queue, token) in queues {
            if let Some(queue) = queue {
                watch(queue.kick().as_raw_fd(), token, EventSet::IN)?;
            }
        }
        self.watch_all(epoll)?;
        self.scratch.resize(BUFFER as usize, 0);
        let name = self.name.clone();
        Worker::spawn(&name, ThreadClass::Vsock, sandbox, self, |engine, stop| {
            if let Err(error) = engine.run(stop) {
                tracing::error!("{} stopped: {error}", engine.name);
            }
        })
    }

    fn run(&mut self, stop: &EventFd) -> io::Result<()> {
        let added = EpollEvent::new(EventSet::IN, STOP);
        self.control(ControlOperation::Add, stop.as_raw_fd(), added)?;
        if let Some(rx) = &mut self.rx {
            rx.disarm();
        }
        let mut tx_pending = true;
        let mut rx_starved = false;
        loop {
            self.announce_reset();
            tx_pending = tx_pending && self.take_packets();
            rx_starved = rx_starved || self.give_packets();
            let send = tx_pending && self.refusals.len() < MAX_REFUSALS;
            let work = !self.refusals.is_empty() || !self.ready.is_empty();
            let receive = work && !rx_starved;
            let timeout = if send || receive { 0 } else { self.next_deadline() };
            let mut events = [EpollEvent::default(); 32];
            for event in self.wait(timeout, &mut events)? {
                match event.data() {
                    STOP => return Ok(()),
                    LISTENER => self.accept(),
                    RX_KICK => {
                        clear(self.rx.as_ref());
                        rx_starved = false;
                    }
                    TX_KICK => {
                        clear(self.tx.as_ref());
                        tx_pending = true;
                    }
                    EVENT_KICK => clear(self.event.as_ref()),
                    id => self.on_socket(id, event.event_set()),
                }
            }
            self.expire();
            self.accept_waiting();
        }
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, event: EpollEvent) -> io::Result<()> {
        self.epoll
            .as_ref()
            .map_or(Ok(()), |epoll| epoll.ctl(operation, fd, event))
    }

    fn wait<'e>(&self, timeout: i32, events: &'e mut [EpollEvent]) -> io::Result<&'e [EpollEvent]> {
        let Some(epoll) = &self.epoll else { return Ok(&[]) };
        match epoll.wait(timeout, events) {
            Ok(n) => Ok(&events[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(&[]),
            Err(error) => Err(error),
        }
    }

    /// Tells a guest that came from elsewhere that its connections are gone (virtio 1.2, 5.10.6.7).
    fn announce_reset(&mut self) {
        let Some(queue) = self.event.as_mut().filter(|_| self.transport_reset) else {
            return;
        };
        loop {
            if let Some(chain) = queue.pop() {
                let memory = queue.memory();
                if chain.writer(&memory).write_all(&TRANSPORT_RESET.to_le_bytes()).is_err() {
                    return queue.fault(&RingFault::Request("an event buffer is smaller than an event"));
                }
                queue.complete(chain.head(), 4);
                queue.signal();
                self.transport_reset = false;
                return;
            }
            if !queue.arm() {
                return;
            }
        }
    }

    /// Takes packets from the guest; `true` when there may be more.
    fn take_packets(&mut self) -> bool {
        let mut more = true;
        let mut completed = false;
        for _ in 0..BUDGET {
            // A guest that does not take its refusals causes no more of them.
            if self.refusals.len() >= MAX_REFUSALS {
                break;
            }
            let Some(queue) = self.tx.as_mut() else { return false };
            let Some(chain) = queue.pop() else {
                if queue.arm() {
                    continue;
                }
                more = false;
                break;
            };
            self.take_packet(&chain);
            if let Some(queue) = self.tx.as_mut() {
                queue.complete(chain.head(), 0);
                completed = true;
            }
        }
        if let (true, Some(queue)) = (completed, self.tx.as_mut()) {
            queue.signal();
        }
        more
    }

    fn take_packet(&mut self, chain: &Chain) {
        let Some(queue) = &self.tx else { return };
        let memory = queue.memory();
        let mut reader = chain.reader(&memory);
        let mut bytes = [0; HEADER_LEN];
        if reader.read_exact(&mut bytes).is_err() {
            return self.counters.dropped.add(1);
        }
        self.counters.tx_packets.add(1);
        let header = Header::from_bytes(&bytes);
        let mut scratch = std::mem::take(&mut self.scratch);
        let len = if header.op == op::RW { header.len as usize } else { 0 };
        // More than the guest may send is refused as data that is not there.
        let data = match scratch.get_mut(..len) {
            Some(data) => reader.read_exact(data).map(|()| &*data).map_err(|_| ()),
            None => Err(()),
        };
        self.on_packet(&header, data);
        self.scratch = scratch;
    }

    /// Gives packets to the guest; `true` when its buffers ran out before what there was did.
    fn give_packets(&mut self) -> bool {
        let mut starved = false;
        let mut completed = false;
        for _ in 0..BUDGET {
            if self.refusals.is_empty() && self.ready.is_empty() {
                break;
            }
            let Some(chain) = self.next_buffer() else {
                starved = true;
                break;
            };
            completed |= self.give_packet(chain);
        }
        if let (true, Some(queue)) = (completed, self.rx.as_mut()) {
            queue.signal();
        }
        starved
    }

    fn next_buffer(&mut self) -> Option<Chain> {
        if let Some(chain) = self.spare.take() {
            return Some(chain);
        }
        let queue = self.rx.as_mut()?;
        loop {
            match queue.pop() {
                Some(chain) if (chain.writable_len() as usize) < HEADER_LEN => {
                    queue.fault(&RingFault::Request("a receive buffer is smaller than a header"));
                    return None;
                }
                Some(chain) => return Some(chain),
                None if queue.arm() => {}
                None => return None,
            }
        }
    }

    /// Fills `chain` with the next packet, or keeps it; `true` when it was used.
    fn give_packet(&mut self, chain: Chain) -> bool {
        let room = (chain.writable_len() as usize).saturating_sub(HEADER_LEN);
        let mut scratch = std::mem::take(&mut self.scratch);
        let packet = self.next_packet(room, &mut scratch);
        let given = match (packet, &mut self.rx) {
            (Some(header), Some(queue)) => {
                let memory = queue.memory();
                let mut writer = chain.writer(&memory);
                let written = writer
                    .write_all(&header.to_bytes())
                    .and_then(|()| writer.write_all(&scratch[..header.len as usize]));
                if written.is_err() {
                    queue.fault(&RingFault::Inaccessible);
                }
                queue.complete(chain.head(), writer.written());
                self.counters.rx_packets.add(1);
                self.counters.rx_bytes.add(header.len as usize);
                true
            }
            _ => {
                self.spare = Some(chain);
                false
            }
        };
        self.scratch = scratch;
        given
    }

    /// The next packet of whoever's turn it is, with at most `room` bytes of data in `scratch`.
    fn next_packet(&mut self, room: usize, scratch: &mut [u8]) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            let Some(packet) = connection.next_packet(room, scratch) else {
                continue;
            };
            let ports = connection.ports;
            let fwd_cnt = connection.tell_forwarded();
            let closes = packet.op == op::SHUTDOWN && connection.closing();
            if packet.op == op::RST {
                self.remove(id);
            } else if closes {
                self.set_deadline(id, Some(self.limits.close));
            }
            self.wake(id);
            return Some(Header {
                op: packet.op,
                flags: packet.flags,
                len: packet.len as u32,
                fwd_cnt,
                ..self.header(ports)
            });
        }
        None
    }

    /// Gives the receive queue back as far as it was worked off.
    pub(super) fn take_rx(&mut self) -> Option<VirtQueue> {
        let mut queue = self.rx.take()?;
        if self.spare.take().is_some() {
            queue.unpop();
        }
        Some(queue)
    }
}

fn clear(queue: Option<&VirtQueue>) {
    // It is only read to make it unreadable; that it already is does not matter.
    let _ = queue.map(|q| q.kick().read());
}
