//! The switch itself: which frame goes where. It does no I/O and reads no clock; times are nanoseconds since any moment.

pub mod bucket;
pub mod counters;
pub mod frame;
pub mod guard;
pub mod rules;
pub mod table;
#[cfg(test)]
mod tests;

use bucket::Limiter;
pub use counters::{Counters, Drop};
use frame::{Frame, MIN_FRAME, is_group, is_reserved};
pub use rules::Rules;
use table::{Known, Learned, Table, TableLimits};

/// A port of the switch. The number of one that is gone may be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u32);

/// A frame that may pass, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passage {
    /// Its VLAN.
    pub vlan: u16,
    /// What it is.
    pub frame: Frame,
    /// Its only destination; `None`: every other port of its VLAN ([`Switch::next_flooded`]).
    pub to: Option<PortId>,
}

/// The tag with which a frame leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Contents of the tag; `None`: it has none.
    pub tci: Option<u16>,
}

struct Port {
    rules: Rules,
    tx: Limiter,
    rx: Limiter,
    counters: Counters,
}

/// The switch.
pub struct Switch {
    /// Indexed by [`PortId`].
    ports: Vec<Option<Port>>,
    table: Table,
}

impl Switch {
    /// One without ports.
    pub fn new(limits: TableLimits) -> Self {
        Self {
            ports: Vec::new(),
            table: Table::new(limits),
        }
    }

    /// Adds a port, at time `now`. `None`: its address is another port's.
    pub fn add(&mut self, rules: Rules, now: u64) -> Option<PortId> {
        let free = self.ports.iter().position(Option::is_none);
        let index = free.unwrap_or(self.ports.len());
        let id = PortId(u32::try_from(index).ok()?);
        if !self.fix(id, &rules) {
            return None;
        }
        let port = Port {
            tx: Limiter::new(&rules.tx, now),
            rx: Limiter::new(&rules.rx, now),
            rules,
            counters: Counters::default(),
        };
        match self.ports.get_mut(index) {
            Some(slot) => *slot = Some(port),
            None => self.ports.push(Some(port)),
        }
        Some(id)
    }

    fn fix(&mut self, id: PortId, rules: &Rules) -> bool {
        let Some(mac) = rules.mac else { return true };
        if rules.vlans.all().into_iter().all(|vlan| self.table.fix(vlan, &mac, id)) {
            return true;
        }
        self.table.remove_port(id);
        false
    }

    /// Takes a port away.
    pub fn remove(&mut self, id: PortId) {
        if let Some(slot) = self.ports.get_mut(id.0 as usize) {
            *slot = None;
            self.table.remove_port(id);
        }
    }

    /// Other rules for a port, from `now` on. `false`: the address is another port's, and nothing changed.
    pub fn set_rules(&mut self, id: PortId, rules: Rules, now: u64) -> bool {
        let Some(old) = self.port(id).map(|port| port.rules.clone()) else {
            return false;
        };
        if (old.mac, &old.vlans) != (rules.mac, &rules.vlans) {
            // What is known about it may be about VLANs it is no longer in.
            self.table.remove_port(id);
            if !self.fix(id, &rules) {
                self.fix(id, &old);
                return false;
            }
        }
        if let Some(port) = self.port_mut(id) {
            if old.tx != rules.tx {
                port.tx = Limiter::new(&rules.tx, now);
            }
            if old.rx != rules.rx {
                port.rx = Limiter::new(&rules.rx, now);
            }
            port.rules = rules;
        }
        true
    }

    fn port(&self, id: PortId) -> Option<&Port> {
        self.ports.get(id.0 as usize)?.as_ref()
    }

    fn port_mut(&mut self, id: PortId) -> Option<&mut Port> {
        self.ports.get_mut(id.0 as usize)?.as_mut()
    }

    /// The rules of a port.
    pub fn rules(&self, id: PortId) -> Option<&Rules> {
        self.port(id).map(|port| &port.rules)
    }

    /// What a port counted.
    pub fn counters(&self, id: PortId) -> Option<&Counters> {
        self.port(id).map(|port| &port.counters)
    }

    /// The forwarding table.
    pub fn table(&self, now: u64) -> Vec<Known> {
        self.table.list(now)
    }

    /// Whether `from` may send a packet now; if not, in how many nanoseconds.
    pub fn may_send(&mut self, from: PortId, now: u64) -> Result<(), u64> {
        self.port_mut(from).map_or(Ok(()), |port| port.tx.check(now))
    }

    /// Looks at a frame of `len` bytes that came in at `from`: learns from it and finds out where it goes. `head` are its first bytes, up
    /// to [`HEAD`](frame::HEAD). `packets` is how many it is on a wire: a segment to be cut counts as what it is cut into.
    pub fn enter(&mut self, from: PortId, head: &[u8], len: usize, packets: u32, now: u64) -> Result<Passage, Drop> {
        let Some(port) = self.ports.get_mut(from.0 as usize).and_then(Option::as_mut) else {
            return Err(Drop::NoPort);
        };
        port.tx.take(packets.into(), len as u64);
        let table = &mut self.table;
        let result = Self::judge(&port.rules, table, from, head, len, packets, now);
        match &result {
            Ok(_) => port.counters.sent(packets, len),
            Err(reason) => port.counters.dropped(*reason),
        }
        result
    }

    fn judge(
        rules: &Rules,
        table: &mut Table,
        from: PortId,
        head: &[u8],
        len: usize,
        packets: u32,
        now: u64,
    ) -> Result<Passage, Drop> {
        let frame = Frame::parse(head).ok_or(Drop::Malformed)?;
        if is_group(&frame.src) || frame.src == [0; 6] {
            return Err(Drop::Malformed);
        }
        if is_reserved(&frame.dst) {
            return Err(Drop::Reserved);
        }
        if let Some(mtu) = rules.mtu
            && packets == 1
            && len > MIN_FRAME + frame.tag_len() + usize::from(mtu)
        {
            return Err(Drop::TooLong);
        }
        if let Some(guard) = &rules.guard {
            guard.check(&frame, head)?;
        }
        let vlan = rules.vlans.classify(frame.tci).ok_or(Drop::Vlan)?;
        if table.learn(vlan, &frame.src, from, rules.max_macs, now) == Learned::Taken {
            return Err(Drop::SpoofedMac);
        }
        let to = match is_group(&frame.dst) {
            true => None,
            false => table.find(vlan, &frame.dst, now),
        };
        if to == Some(from) {
            // It has been where it was to go.
            return Err(Drop::Hairpin);
        }
        Ok(Passage { vlan, frame, to })
    }

    /// The next port at or behind `at` that a frame without a known destination goes to.
    pub fn next_flooded(&self, passage: &Passage, from: PortId, at: u32) -> Option<PortId> {
        let candidates = self.ports.iter().enumerate().skip(at as usize);
        candidates
            .filter_map(|(index, port)| Some((PortId(u32::try_from(index).ok()?), port.as_ref()?)))
            .find(|(id, port)| *id != from && port.rules.vlans.admits(passage.vlan).is_some())
            .map(|(id, _)| id)
    }

    /// Whether a frame may go out at `to`, and how. What comes of it is told by [`left`](Self::left) and [`lost`](Self::lost).
    pub fn leave(&mut self, to: PortId, passage: &Passage, now: u64) -> Result<Exit, Drop> {
        let port = self.port_mut(to).ok_or(Drop::NoPort)?;
        let judged = match port.rules.vlans.admits(passage.vlan) {
            None => Err(Drop::Vlan),
            Some(_) if port.rx.check(now).is_err() => Err(Drop::Rate),
            Some(true) => {
                let priority = passage.frame.tci.unwrap_or(0) & 0xf000;
                Ok(Exit {
                    tci: Some(priority | passage.vlan),
                })
            }
            Some(false) => Ok(Exit { tci: None }),
        };
        if let Err(reason) = judged {
            port.counters.dropped(reason);
        }
        judged
    }

    /// A frame of `len` bytes, `packets` on a wire, went out at `to`.
    pub fn left(&mut self, to: PortId, packets: u32, len: usize) {
        if let Some(port) = self.port_mut(to) {
            port.rx.take(packets.into(), len as u64);
            port.counters.received(packets, len);
        }
    }

    /// A frame of or for `port` was lost.
    pub fn lost(&mut self, port: PortId, reason: Drop) {
        if let Some(port) = self.port_mut(port) {
            port.counters.dropped(reason);
        }
    }
}
