//! Which station is behind which port: learnt, forgotten with time, and never more than there is room for.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use super::PortId;
use super::frame::Mac;

/// How many addresses are remembered, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableLimits {
    /// Addresses of all ports together, configured ones aside.
    pub total: usize,
    /// How long (ns) one that is not seen is remembered.
    pub age: u64,
}

impl Default for TableLimits {
    /// What bridges do: 16384 addresses, five minutes.
    fn default() -> Self {
        Self {
            total: 16 << 10,
            age: 300_000_000_000,
        }
    }
}

/// What looking at a source address led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// It was known to be there.
    Known,
    /// It is known now.
    New,
    /// It was known behind another port and is here now.
    Moved,
    /// There is no room for it; its frames go everywhere.
    Full,
    /// It is configured at another port.
    Taken,
}

#[derive(Debug, Clone, Copy)]
struct Station {
    port: PortId,
    seen: u64,
    fixed: bool,
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// VLAN.
    pub vlan: u16,
    /// Address.
    pub mac: Mac,
    /// Where it is.
    pub port: PortId,
    /// How long ago (ns) it was seen; `None` if it is configured.
    pub age: Option<u64>,
}

/// The forwarding table.
#[derive(Debug)]
pub struct Table {
    limits: TableLimits,
    stations: HashMap<(u16, Mac), Station>,
    /// How many each port has, configured ones aside.
    counts: HashMap<PortId, usize>,
    /// When what is too old was last thrown out.
    swept: u64,
}

/// What is too old is looked for at most this often (ns): it takes a walk through the table, and a guest can cause it.
const SWEEP_PAUSE: u64 = 1_000_000_000;

impl Table {
    /// An empty one.
    pub fn new(limits: TableLimits) -> Self {
        Self {
            limits,
            stations: HashMap::new(),
            counts: HashMap::new(),
            swept: 0,
        }
    }

    fn is_old(&self, station: &Station, now: u64) -> bool {
        !station.fixed && now.saturating_sub(station.seen) >= self.limits.age
    }

    /// Where `mac` is.
    pub fn find(&self, vlan: u16, mac: &Mac, now: u64) -> Option<PortId> {
        let station = self.stations.get(&(vlan, *mac))?;
        (!self.is_old(station, now)).then_some(station.port)
    }

    /// Notes that `mac` sent something from `port`, which may have `most` addresses.
    pub fn learn(&mut self, vlan: u16, mac: &Mac, port: PortId, most: usize, now: u64) -> Learned {
        let key = (vlan, *mac);
        if let Some(station) = self.stations.get_mut(&key) {
            if station.port == port {
                station.seen = now;
                return Learned::Known;
            }
            if station.fixed {
                return Learned::Taken;
            }
        }
        if !self.has_room(port, most, self.stations.contains_key(&key), now) {
            return Learned::Full;
        }
        let station = Station {
            port,
            seen: now,
            fixed: false,
        };
        let before = self.stations.insert(key, station);
        *self.counts.entry(port).or_default() += 1;
        match before {
            Some(before) => {
                self.uncount(before.port);
                Learned::Moved
            }
            None => Learned::New,
        }
    }

    fn has_room(&mut self, port: PortId, most: usize, moves: bool, now: u64) -> bool {
        for sweep in [true, false] {
            let mine = self.counts.get(&port).copied().unwrap_or(0);
            let all: usize = self.counts.values().sum();
            if mine < most && (moves || all < self.limits.total) {
                return true;
            }
            if !sweep || now.saturating_sub(self.swept) < SWEEP_PAUSE {
                return false;
            }
            self.sweep(now);
        }
        false
    }

    fn sweep(&mut self, now: u64) {
        self.swept = now;
        let old: Vec<_> = self
            .stations
            .iter()
            .filter(|(_, s)| self.is_old(s, now))
            .map(|(key, _)| *key)
            .collect();
        for key in old {
            self.forget(&key);
        }
    }

    fn forget(&mut self, key: &(u16, Mac)) {
        if let Some(station) = self.stations.remove(key)
            && !station.fixed
        {
            self.uncount(station.port);
        }
    }

    fn uncount(&mut self, port: PortId) {
        if let Slot::Occupied(mut slot) = self.counts.entry(port) {
            *slot.get_mut() -= 1;
            if *slot.get() == 0 {
                slot.remove();
            }
        }
    }

    /// Notes that `mac` is configured at `port`: it is never forgotten, and no other port can take it. `false`: another has it so.
    pub fn fix(&mut self, vlan: u16, mac: &Mac, port: PortId) -> bool {
        let key = (vlan, *mac);
        if self.stations.get(&key).is_some_and(|s| s.fixed && s.port != port) {
            return false;
        }
        self.forget(&key);
        let station = Station {
            port,
            seen: 0,
            fixed: true,
        };
        self.stations.insert(key, station);
        true
    }

    /// Forgets everything about `port`.
    pub fn remove_port(&mut self, port: PortId) {
        self.stations.retain(|_, station| station.port != port);
        self.counts.remove(&port);
    }

    /// Everything that is known, sorted.
    pub fn list(&self, now: u64) -> Vec<Known> {
        let valid = self.stations.iter().filter(|(_, s)| !self.is_old(s, now));
        let mut all: Vec<_> = valid
            .map(|((vlan, mac), s)| Known {
                vlan: *vlan,
                mac: *mac,
                port: s.port,
                age: (!s.fixed).then(|| now.saturating_sub(s.seen)),
            })
            .collect();
        all.sort_by_key(|known| (known.vlan, known.mac));
        all
    }

    /// How many addresses are stored, old ones included.
    pub fn len(&self) -> usize {
        self.stations.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.stations.is_empty()
    }
}
