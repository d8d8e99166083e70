//! Sources have their turns.

use std::cmp::Reverse;
use std::time::Duration;

use triarch_memory::GuestMemory;
use triarch_virtio::Chain;

use super::Plane;
use super::forward::{End, Packet, Work};
use super::guest::Tx;
use super::host::Read;
use super::packet::{Rest, behind, read_front};
use crate::offload::{Accepts, HEADER, LEGACY_HEADER, Offload};
use crate::switch::frame::{Frame, HEAD, MIN_FRAME};
use crate::switch::{Drop, PortId};

/// Packets of a source, as on a wire, before the next one has its turn.
const BUDGET: u32 = 64;
/// Bytes of it.
const BYTE_BUDGET: usize = 256 << 10;

/// What became of a source.
enum Next {
    /// It has nothing, and will tell.
    Idle,
    /// It may have more.
    Again,
    /// It has more, but not before this time (ns).
    At(u64),
}

impl Plane {
    /// Gives each source that has work one turn.
    pub(super) fn turn(&mut self) {
        let now = self.now();
        while let Some(Reverse((at, source))) = self.parked.peek().copied() {
            if at > now {
                break;
            }
            self.parked.pop();
            self.make_ready(source);
        }
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(source) = self.sources.get_mut(&id) else {
                continue;
            };
            source.ready = false;
            let (port, queue) = (source.port, source.queue);
            let next = match self
                .ports
                .get(port.0 as usize)
                .and_then(Option::as_ref)
                .map(|port| &port.end)
            {
                Some(End::Guest(_)) => self.run_guest(port, queue),
                Some(End::Host(_)) => self.run_host(port, queue),
                None => Next::Idle,
            };
            self.signal();
            match next {
                Next::Idle => {}
                Next::Again => self.make_ready(id),
                Next::At(time) => self.parked.push(Reverse((time, id))),
            }
        }
        self.set_alarm();
    }

    /// Tells guests of what they received.
    pub(super) fn signal(&mut self) {
        for (port, pair) in self.unsignalled.drain(..) {
            let port = self.ports.get_mut(port.0 as usize).and_then(Option::as_mut);
            if let Some(rx) = port.and_then(|port| port.guest()).and_then(|guest| guest.rx(pair)) {
                rx.signal();
            }
        }
    }

    fn set_alarm(&mut self) {
        let Some(Reverse((first, _))) = self.parked.peek().copied() else {
            return;
        };
        if self.alarm.is_some_and(|alarm| alarm <= first) {
            return;
        }
        let left = first.saturating_sub(self.now()).max(1);
        // It only fails for times that do not exist.
        if self.timer.reset(Duration::from_nanos(left), None).is_ok() {
            self.alarm = Some(first);
        }
    }

    fn run_guest(&mut self, port: PortId, pair: usize) -> Next {
        let slot = |plane: &mut Self| {
            let port = plane.ports.get_mut(port.0 as usize)?.as_mut()?;
            let guest = port.guest()?;
            let (leaves, header) = (guest.leaves, guest.header_len());
            Some((guest.tx(pair)?.take()?, leaves, header))
        };
        let Some((mut tx, leaves, header)) = slot(self) else {
            return Next::Idle;
        };
        let next = self.transmit(&mut tx, port, pair, leaves, header);
        if !self.used.is_empty() {
            tx.queue.complete_all(&self.used);
            self.used.clear();
            tx.queue.signal();
        }
        // Nothing in between takes ports away.
        let guest = self
            .ports
            .get_mut(port.0 as usize)
            .and_then(Option::as_mut)
            .and_then(|port| port.guest());
        if let Some(slot) = guest.and_then(|guest| guest.tx(pair)) {
            *slot = Some(tx);
        }
        next
    }

    /// Sends what a guest has, until its turn is over.
    fn transmit(&mut self, tx: &mut Tx, port: PortId, pair: usize, leaves: Accepts, header: usize) -> Next {
        let now = self.now();
        let (mut packets, mut bytes) = (0, 0);
        while packets < BUDGET && bytes < BYTE_BUDGET {
            if let Err(wait) = self.switch.may_send(port, now) {
                return Next::At(now.saturating_add(wait));
            }
            let Some(chain) = tx.queue.pop() else {
                if now.saturating_sub(tx.busy_at) < self.poll && !tx.queue.faulted() {
                    return Next::Again;
                }
                tx.armed = true;
                if tx.queue.arm() {
                    continue;
                }
                return Next::Idle;
            };
            if std::mem::take(&mut tx.armed) {
                tx.queue.disarm();
            }
            tx.busy_at = now;
            let memory = tx.queue.memory();
            packets += self.transmit_one(&memory, &chain, port, pair, leaves, header, now);
            bytes += chain.readable_len() as usize;
            self.used.push((chain.head(), 0));
        }
        Next::Again
    }

    #[allow(clippy::too_many_arguments)] // what is known about the queue, on the hot path
    fn transmit_one(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        port: PortId,
        pair: usize,
        leaves: Accepts,
        header: usize,
        now: u64,
    ) -> u32 {
        let len = chain.readable_len() as usize;
        let whole = header + MIN_FRAME..=triarch_net::MAX_PACKET;
        let mut front = [0; HEADER + HEAD];
        let front = &mut front[..header + HEAD];
        let read = match whole.contains(&len) {
            true => read_front(memory, chain.readable(), front),
            false => Ok(0),
        };
        let Some((raw, head)) = read.ok().and_then(|n| front[..n].split_at_checked(header)) else {
            self.switch.lost(port, Drop::Malformed);
            return 1;
        };
        let Some(offload) = self.offload(port, raw, head, len - header, leaves) else {
            self.switch.lost(port, Drop::Malformed);
            return 1;
        };
        let rest = behind(chain.readable(), header + head.len());
        let packet = Packet {
            head,
            rest: if rest.is_empty() {
                Rest::Own(&[])
            } else {
                Rest::Guest(memory, &rest)
            },
            offload,
        };
        self.work(now).forward(port, pair, &packet)
    }

    /// What is undone in a guest's frame; `None`: its header is wrong.
    fn offload(&self, port: PortId, raw: &[u8], head: &[u8], len: usize, leaves: Accepts) -> Option<Offload> {
        let raw = raw.first_chunk::<LEGACY_HEADER>()?;
        let frame = Frame::parse(head)?;
        let offload = Offload::read(raw, &frame, head, len, leaves, false).ok()?;
        if offload.csum.is_some()
            && let Some(guard) = self.switch.rules(port).and_then(|rules| rules.guard.as_ref())
            && !guard.allows_partial_checksum(&frame, head)
        {
            return None;
        }
        Some(offload)
    }

    pub(super) fn work(&mut self, now: u64) -> Work<'_> {
        Work {
            switch: &mut self.switch,
            ports: &mut self.ports,
            scratch: &mut self.scratch,
            unsignalled: &mut self.unsignalled,
            now,
        }
    }

    /// Takes what the host has, until its turn is over.
    fn run_host(&mut self, port: PortId, queue: usize) -> Next {
        let now = self.now();
        let mut buffer = std::mem::take(&mut self.buffer);
        let (mut packets, mut bytes) = (0, 0);
        let next = loop {
            if packets >= BUDGET || bytes >= BYTE_BUDGET {
                break Next::Again;
            }
            if let Err(wait) = self.switch.may_send(port, now) {
                break Next::At(now.saturating_add(wait));
            }
            let Some(End::Host(host)) = self
                .ports
                .get(port.0 as usize)
                .and_then(Option::as_ref)
                .map(|port| &port.end)
            else {
                break Next::Idle;
            };
            let header = host.end.header;
            packets += match host.read(queue, &mut buffer) {
                Read::Nothing => break Next::Idle,
                Read::Lost => {
                    self.switch.lost(port, Drop::Host);
                    1
                }
                Read::Packet(range) => {
                    bytes += range.len();
                    self.receive_one(port, queue, &buffer[range], header, now)
                }
            };
        };
        self.buffer = buffer;
        next
    }

    fn receive_one(&mut self, port: PortId, queue: usize, packet: &[u8], header: usize, now: u64) -> u32 {
        let (raw, frame) = packet.split_at(header.min(packet.len()));
        let (head, rest) = frame.split_at(frame.len().min(HEAD));
        let offload = raw
            .first_chunk::<LEGACY_HEADER>()
            .zip(Frame::parse(head))
            .and_then(|(raw, parsed)| Offload::read(raw, &parsed, head, frame.len(), Accepts::ALL, true).ok());
        let Some(offload) = offload else {
            self.switch.lost(port, Drop::Malformed);
            return 1;
        };
        let packet = Packet {
            head,
            rest: Rest::Own(rest),
            offload,
        };
        self.work(now).forward(port, queue, &packet)
    }
}
