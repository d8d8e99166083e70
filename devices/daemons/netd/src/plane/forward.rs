//! From one port to others.

use super::guest::Guest;
use super::host::Host;
use super::packet::Rest;
use crate::offload::checksum::finish;
use crate::offload::segment::cut;
use crate::offload::{Accepts, HEADER, Offload};
use crate::switch::frame::{Frame, HEAD, TAG, TAG_AT, bytes_at, ethertype, u16_at};
use crate::switch::{Drop, Exit, Passage, PortId, Switch};

/// What is behind a port.
pub(super) enum End {
    /// A guest, if one is there.
    Guest(Option<Box<Guest>>),
    /// An interface of the host.
    Host(Box<Host>),
}

/// A port of the plane.
pub(super) struct Port {
    /// Tells it from others that had its number before.
    pub(super) serial: u32,
    pub(super) name: String,
    pub(super) end: End,
    /// Pairs of queues a guest may have.
    pub(super) pairs: usize,
}

impl Port {
    pub(super) fn guest(&mut self) -> Option<&mut Guest> {
        match &mut self.end {
            End::Guest(guest) => guest.as_deref_mut(),
            End::Host(_) => None,
        }
    }

    fn accepts(&self) -> Option<Accepts> {
        match &self.end {
            End::Guest(guest) => guest.as_ref().map(|guest| guest.accepts),
            End::Host(host) => Some(host.end.accepts),
        }
    }

    fn has_flows(&self) -> bool {
        match &self.end {
            End::Guest(guest) => guest.as_ref().is_some_and(|guest| guest.has_flows()),
            End::Host(host) => host.end.queues.len() > 1,
        }
    }

    fn deliver(&mut self, flow: u8, header: &[u8; HEADER], head: &[u8], rest: Rest<'_>) -> Result<usize, Drop> {
        match &mut self.end {
            End::Guest(Some(guest)) => guest.deliver(flow, *header, head, rest),
            End::Guest(None) => Err(Drop::Down),
            End::Host(host) => host.write(flow, header, head, rest),
        }
    }
}

/// Memory that is used again for each packet.
#[derive(Default)]
pub(super) struct Scratch {
    whole: Vec<u8>,
    piece: Vec<u8>,
}

/// A frame that came in. `head` is a copy of its first bytes: they are what was checked, so they are what goes out.
#[derive(Clone, Copy)]
pub(super) struct Packet<'a> {
    pub(super) head: &'a [u8],
    pub(super) rest: Rest<'a>,
    pub(super) offload: Offload,
}

impl Packet<'_> {
    fn len(&self) -> usize {
        self.head.len() + self.rest.len()
    }
}

/// Everything it takes to pass a packet on.
pub(super) struct Work<'a> {
    pub(super) switch: &'a mut Switch,
    pub(super) ports: &'a mut [Option<Port>],
    pub(super) scratch: &'a mut Scratch,
    /// Queues whose guests are to be told.
    pub(super) unsignalled: &'a mut Vec<(PortId, usize)>,
    pub(super) now: u64,
}

impl Work<'_> {
    fn port(&mut self, id: PortId) -> Option<&mut Port> {
        self.ports.get_mut(id.0 as usize)?.as_mut()
    }

    /// Passes a packet on that came in at `from`, on pair `pair` of its queues. Returns how many packets it is on a wire.
    pub(super) fn forward(&mut self, from: PortId, pair: usize, packet: &Packet<'_>) -> u32 {
        let len = packet.len();
        let packets = packet.offload.packets(len);
        let Ok(passage) = self.switch.enter(from, packet.head, len, packets, self.now) else {
            return packets;
        };
        // Computed when somebody needs it.
        let mut flow = None;
        if self.port(from).is_some_and(|port| port.has_flows()) {
            let flow = *flow.get_or_insert_with(|| flow_of(&passage.frame, packet.head));
            if let Some(guest) = self.port(from).and_then(Port::guest) {
                guest.saw_flow(flow, pair);
            }
        }
        if let Some(to) = passage.to {
            self.send(to, &passage, packet, &mut flow);
            return packets;
        }
        let mut at = 0;
        while let Some(to) = self.switch.next_flooded(&passage, from, at) {
            self.send(to, &passage, packet, &mut flow);
            at = to.0 + 1;
        }
        packets
    }

    fn send(&mut self, to: PortId, passage: &Passage, packet: &Packet<'_>, flow: &mut Option<u8>) {
        let Ok(exit) = self.switch.leave(to, passage, self.now) else {
            return;
        };
        let Some(port) = self.ports.get_mut(to.0 as usize).and_then(Option::as_mut) else {
            return;
        };
        let Some(accepts) = port.accepts() else {
            return self.switch.lost(to, Drop::Down);
        };
        let flow = match port.has_flows() {
            true => *flow.get_or_insert_with(|| flow_of(&passage.frame, packet.head)),
            false => 0,
        };
        let mut space = [0; HEAD + TAG];
        let (head, shift) = retag(packet.head, &passage.frame, exit, &mut space);
        let mut out = Out {
            switch: self.switch,
            unsignalled: self.unsignalled,
            port,
            to,
            flow,
        };
        if packet.offload.suits(accepts) {
            let header = packet.offload.write(accepts, shift);
            let packets = packet.offload.packets(packet.len());
            return out.deliver(&header, head, packet.rest, packets);
        }
        let Scratch { whole, piece } = self.scratch;
        whole.clear();
        whole.extend_from_slice(head);
        if packet.rest.append(whole).is_err() {
            return out.switch.lost(to, Drop::Malformed);
        }
        let moved = |at: u16| at.wrapping_add_signed(shift as i16);
        let Some(mut csum) = packet.offload.csum else { return };
        csum.start = moved(csum.start);
        let header = Offload::default().write(accepts, 0);
        match packet.offload.gso {
            None => {
                finish(whole, csum);
                out.deliver(&header, &[], Rest::Own(whole), 1);
            }
            Some(mut gso) => {
                gso.headers = gso.headers.wrapping_add_signed(shift);
                let l3 = passage.frame.l3.wrapping_add_signed(shift);
                cut(whole, l3, &gso, csum, piece, |piece| {
                    out.deliver(&header, &[], Rest::Own(piece), 1);
                });
            }
        }
    }
}

/// The way out of a port.
struct Out<'a> {
    switch: &'a mut Switch,
    unsignalled: &'a mut Vec<(PortId, usize)>,
    port: &'a mut Port,
    to: PortId,
    flow: u8,
}

impl Out<'_> {
    fn deliver(&mut self, header: &[u8; HEADER], head: &[u8], rest: Rest<'_>, packets: u32) {
        let len = head.len() + rest.len();
        match self.port.deliver(self.flow, header, head, rest) {
            Err(reason) => self.switch.lost(self.to, reason),
            Ok(pair) => {
                self.switch.left(self.to, packets, len);
                let here = (self.to, pair);
                // Mostly it is the one from before.
                if self.unsignalled.last() != Some(&here) {
                    self.unsignalled.push(here);
                }
            }
        }
    }
}

/// The head as it leaves, and by how much what is behind the addresses moved.
fn retag<'a>(head: &'a [u8], frame: &Frame, exit: Exit, space: &'a mut [u8; HEAD + TAG]) -> (&'a [u8], isize) {
    if frame.tci == exit.tci {
        return (head, 0);
    }
    let (addresses, behind) = head.split_at(TAG_AT.min(head.len()));
    let behind = behind.get(frame.tag_len()..).unwrap_or_default();
    let mut len = 0;
    let mut put = |bytes: &[u8]| {
        if let Some(room) = space.get_mut(len..len + bytes.len()) {
            room.copy_from_slice(bytes);
            len += bytes.len();
        }
    };
    put(addresses);
    if let Some(tci) = exit.tci {
        put(&ethertype::VLAN.to_be_bytes());
        put(&tci.to_be_bytes());
    }
    put(behind);
    let tag = if exit.tci.is_some() { TAG } else { 0 };
    (&space[..len], tag as isize - frame.tag_len() as isize)
}

/// A number that is the same for all packets between two ends, in both directions.
fn flow_of(frame: &Frame, head: &[u8]) -> u8 {
    let l3 = head.get(frame.l3..).unwrap_or_default();
    let number = |at| bytes_at::<4>(l3, at).map_or(0, u32::from_be_bytes);
    let ports = |at| u32::from(u16_at(l3, at).unwrap_or(0) ^ u16_at(l3, at + 2).unwrap_or(0));
    let mut hash = match frame.ethertype {
        ethertype::IPV4 => {
            let at = usize::from(l3.first().copied().unwrap_or(0) & 15) * 4;
            let whole = u16_at(l3, 6).is_some_and(|fragment| fragment & 0x3fff == 0);
            let transport = matches!(l3.get(9), Some(6 | 17)) && whole;
            number(12) ^ number(16) ^ if transport { ports(at) } else { 0 }
        }
        ethertype::IPV6 => {
            let addresses = (8..40).step_by(4).fold(0, |hash, at| hash ^ number(at));
            let transport = matches!(l3.get(6), Some(6 | 17));
            addresses ^ if transport { ports(40) } else { 0 }
        }
        _ => (0..6).fold(0, |hash, i| (hash << 5) ^ u32::from(frame.dst[i] ^ frame.src[i])),
    };
    // What differs in any place should show in eight bits.
    hash = hash.wrapping_mul(0x9e37_79b1);
    (hash >> 24) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_come_and_go() {
        let mut head = vec![7; 12];
        head.extend([8, 0, 0x45, 1, 2, 3]);
        let plain = Frame::parse(&head).expect("a frame");
        let mut space = [0; HEAD + TAG];
        let (tagged, shift) = retag(&head, &plain, Exit { tci: Some(0x2005) }, &mut space);
        assert_eq!(shift, 4);
        let tagged = tagged.to_vec();
        assert_eq!(tagged, [&head[..12], &[0x81, 0, 0x20, 5], &head[12..]].concat());
        let frame = Frame::parse(&tagged).expect("a frame");
        let mut space = [0; HEAD + TAG];
        let (other, shift) = retag(&tagged, &frame, Exit { tci: Some(9) }, &mut space);
        assert_eq!((other[14], other[15], other.len(), shift), (0, 9, 22, 0));
        let mut space = [0; HEAD + TAG];
        assert_eq!(
            retag(&tagged, &frame, Exit { tci: None }, &mut space),
            (head.as_slice(), -4)
        );
    }

    #[test]
    fn a_flow_is_the_same_in_both_directions() {
        let packet = |a: [u8; 4], b: [u8; 4], from: u16, to: u16| {
            let mut head = vec![2; 12];
            head.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
            head.extend(a.into_iter().chain(b));
            head.extend(from.to_be_bytes().into_iter().chain(to.to_be_bytes()));
            flow_of(&Frame::parse(&head).expect("a frame"), &head)
        };
        let (a, b) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        assert_eq!(packet(a, b, 1000, 80), packet(b, a, 80, 1000));
        let mut flows: Vec<_> = (0..100).map(|port| packet(a, b, port, 80)).collect();
        flows.sort_unstable();
        flows.dedup();
        assert!(flows.len() > 50, "{} flows of 100", flows.len());
    }
}
