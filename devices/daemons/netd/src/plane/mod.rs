//! The data plane: one thread that owns the switch and all queues, so that nothing on the way of a packet is locked.
//!
//! Whatever can have work is a *source*: a queue a guest sends on, or a queue of an interface of the host. Sources with work have their
//! turn one after the other, each for a bounded number of packets and bytes. Without work the thread sleeps. Other threads give it work
//! with [`PlaneHandle::call`], and wait until it is done.

mod announce;
mod forward;
mod guest;
mod host;
mod info;
mod mailbox;
mod packet;
#[cfg(test)]
mod tests;
mod turn;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use thiserror::Error;
use triarch_virtio::{DeviceContext, VirtQueue};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use crate::switch::table::{Known, TableLimits};
use crate::switch::{PortId, Rules, Switch};
use forward::{End, Port, Scratch};
use guest::{Guest, Tx};
use host::Host;
pub use host::HostEnd;
pub use info::{PortInfo, PortState};
pub use mailbox::{PlaneGone, PlaneHandle};

/// What the epoll descriptor calls the mailbox and the timer; sources count from there on.
const MAILBOX: u64 = 0;
const TIMER: u64 = 1;
const FIRST_SOURCE: u64 = 2;
/// Events taken from the kernel in one go.
const EVENTS: usize = 64;

/// A port, and that it is still the one that was meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortKey {
    /// Its number in the switch.
    pub id: PortId,
    serial: u32,
}

/// Why a port could not be added or changed.
#[derive(Debug, Error)]
pub enum PortError {
    /// Names are for one port each.
    #[error("there is a port {0} already")]
    NameTaken(String),
    /// So are hardware addresses.
    #[error("the hardware address of port {0} is another port's")]
    MacTaken(String),
    /// It went away.
    #[error("there is no such port")]
    NoPort,
    /// The kernel refuses to watch it.
    #[error("cannot watch the queues of port {name}")]
    Watch {
        /// The port.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// What the plane is told at its start.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlaneOptions {
    /// The forwarding table.
    pub table: TableLimits,
    /// How long a queue that became empty is looked at before its guest is asked for a notification. Costs a CPU while packets come.
    pub poll: Duration,
}

/// A source of packets.
#[derive(Debug, Clone, Copy)]
struct Source {
    port: PortId,
    /// Queue pair of a guest, or queue of an interface.
    queue: usize,
    /// It waits for its turn.
    ready: bool,
}

/// The plane. It lives on its thread.
pub struct Plane {
    switch: Switch,
    /// Indexed by [`PortId`], like the switch's.
    ports: Vec<Option<Port>>,
    sources: HashMap<u64, Source>,
    next_source: u64,
    next_serial: u32,
    ready: VecDeque<u64>,
    /// Sources that used up what they may send, and until when (ns).
    parked: BinaryHeap<Reverse<(u64, u64)>>,
    /// What the timer is set to (ns).
    alarm: Option<u64>,
    epoll: Epoll,
    timer: TimerFd,
    scratch: Scratch,
    /// A packet of the host.
    buffer: Vec<u8>,
    unsignalled: Vec<(PortId, usize)>,
    used: Vec<(u16, u32)>,
    start: Instant,
    poll: u64,
}

impl Plane {
    fn new(options: &PlaneOptions) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let timer = TimerFd::new()?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, TIMER);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
        Ok(Self {
            switch: Switch::new(options.table),
            ports: Vec::new(),
            sources: HashMap::new(),
            next_source: FIRST_SOURCE,
            next_serial: 0,
            ready: VecDeque::new(),
            parked: BinaryHeap::new(),
            alarm: None,
            epoll,
            timer,
            scratch: Scratch::default(),
            buffer: vec![0; triarch_net::MAX_PACKET + 1],
            unsignalled: Vec::new(),
            used: Vec::new(),
            start: Instant::now(),
            poll: options.poll.as_nanos() as u64,
        })
    }

    /// Nanoseconds since the plane began.
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn port(&mut self, key: PortKey) -> Option<&mut Port> {
        let port = self.ports.get_mut(key.id.0 as usize)?.as_mut()?;
        (port.serial == key.serial).then_some(port)
    }

    /// The port called `name`.
    pub fn find(&self, name: &str) -> Option<PortKey> {
        let ports = self.ports.iter().enumerate();
        let mut named =
            ports.filter_map(|(index, port)| Some((index, port.as_ref().filter(|port| port.name == name)?)));
        named.next().map(|(index, port)| PortKey {
            id: PortId(index as u32),
            serial: port.serial,
        })
    }

    /// Adds a port where guests with up to `pairs` pairs of queues can be.
    pub fn add_guest_port(&mut self, name: &str, rules: Rules, pairs: usize) -> Result<PortKey, PortError> {
        self.add(name, rules, End::Guest(None), pairs)
    }

    /// Adds a port for an interface of the host.
    pub fn add_host_port(&mut self, name: &str, rules: Rules, end: HostEnd) -> Result<PortKey, PortError> {
        let queues = end.queues.len();
        let key = self.add(name, rules, End::Host(Box::new(Host::new(end))), 0)?;
        for queue in 0..queues {
            let fd = match self.port(key).map(|port| &port.end) {
                Some(End::Host(host)) => host.fd(queue),
                _ => None,
            };
            let Some(fd) = fd else { continue };
            let watched = self.watch(key.id, queue, fd);
            match (watched, self.port(key).map(|port| &mut port.end)) {
                (Ok(source), Some(End::Host(host))) => host.sources.push(source),
                (Err(source), _) => {
                    self.remove(key);
                    return Err(PortError::Watch {
                        name: name.to_owned(),
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(key)
    }

    fn add(&mut self, name: &str, rules: Rules, end: End, pairs: usize) -> Result<PortKey, PortError> {
        if self.find(name).is_some() {
            return Err(PortError::NameTaken(name.to_owned()));
        }
        let now = self.now();
        let id = self
            .switch
            .add(rules, now)
            .ok_or_else(|| PortError::MacTaken(name.to_owned()))?;
        let serial = self.next_serial;
        self.next_serial += 1;
        let port = Port {
            serial,
            name: name.to_owned(),
            end,
            pairs,
        };
        let index = id.0 as usize;
        if self.ports.len() <= index {
            self.ports.resize_with(index + 1, || None);
        }
        self.ports[index] = Some(port);
        Ok(PortKey { id, serial })
    }

    /// Removes a port, with what it has.
    pub fn remove(&mut self, key: PortKey) -> bool {
        if self.port(key).is_none() {
            return false;
        }
        self.detach(key);
        if let Some(End::Host(host)) = self.port(key).map(|port| &port.end) {
            let all: Vec<_> = host
                .sources
                .iter()
                .enumerate()
                .map(|(queue, source)| (*source, host.fd(queue)))
                .collect();
            for (source, fd) in all {
                self.unwatch(source, fd);
            }
        }
        self.ports[key.id.0 as usize] = None;
        self.switch.remove(key.id);
        true
    }

    /// The rules of a port.
    pub fn rules(&self, key: PortKey) -> Option<Rules> {
        self.switch.rules(key.id).cloned()
    }

    /// Other rules for a port.
    pub fn set_rules(&mut self, key: PortKey, rules: Rules) -> Result<(), PortError> {
        let name = self.port(key).ok_or(PortError::NoPort)?.name.clone();
        let now = self.now();
        if !self.switch.set_rules(key.id, rules, now) {
            return Err(PortError::MacTaken(name));
        }
        // What waits for the old limits need not.
        let parked = std::mem::take(&mut self.parked);
        for Reverse((_, source)) in parked {
            self.make_ready(source);
        }
        Ok(())
    }

    /// The forwarding table, with names of ports.
    pub fn table(&self) -> Vec<(Known, String)> {
        let name = |id: PortId| {
            self.ports
                .get(id.0 as usize)
                .and_then(Option::as_ref)
                .map_or("", |port| &port.name)
        };
        let known = self.switch.table(self.now()).into_iter();
        known.map(|known| (known, name(known.port).to_owned())).collect()
    }

    /// A driver is there behind a port.
    pub fn attach(&mut self, key: PortKey, context: &DeviceContext) -> Result<(), PortError> {
        self.detach(key);
        let port = self.port(key).ok_or(PortError::NoPort)?;
        port.end = End::Guest(Some(Box::new(Guest::new(context.features, port.pairs))));
        Ok(())
    }

    /// It is gone, and with it its queues.
    pub fn detach(&mut self, key: PortKey) {
        let Some(port) = self.port(key) else { return };
        let pairs = port.pairs;
        for queue in 0..2 * pairs {
            self.stop_queue(key, queue as u16);
        }
        if let Some(port) = self.port(key)
            && let End::Guest(guest) = &mut port.end
        {
            *guest = None;
        }
    }

    /// Starts a queue of a guest: even ones it receives from, odd ones it sends on.
    pub fn start_queue(&mut self, key: PortKey, queue: VirtQueue) -> Result<(), PortError> {
        let index = queue.index();
        let pair = usize::from(index / 2);
        let guest = self.port(key).and_then(Port::guest).ok_or(PortError::NoPort)?;
        if index.is_multiple_of(2) {
            guest.start_rx(pair, queue);
            return Ok(());
        }
        let fd = queue.kick().as_raw_fd();
        let source = self.watch(key.id, pair, fd).map_err(|source| PortError::Watch {
            name: index.to_string(),
            source,
        })?;
        if let Some(slot) = self.port(key).and_then(Port::guest).and_then(|guest| guest.tx(pair)) {
            *slot = Some(Tx {
                queue,
                source,
                armed: true,
                busy_at: 0,
            });
        }
        // What it offered before is not announced again.
        self.make_ready(source);
        Ok(())
    }

    /// Stops a queue of a guest and gives it back.
    pub fn stop_queue(&mut self, key: PortKey, index: u16) -> Option<VirtQueue> {
        let pair = usize::from(index / 2);
        let guest = self.port(key)?.guest()?;
        if index.is_multiple_of(2) {
            return guest.stop_rx(pair);
        }
        let tx = guest.tx(pair)?.take()?;
        self.unwatch(tx.source, Some(tx.queue.kick().as_raw_fd()));
        Some(tx.queue)
    }

    /// Makes a source of what becomes readable when there is work.
    fn watch(&mut self, port: PortId, queue: usize, fd: RawFd) -> io::Result<u64> {
        let source = self.next_source;
        // Each event wakes once: the descriptors of guests need not be read then.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, source);
        self.epoll.ctl(ControlOperation::Add, fd, event)?;
        self.next_source += 1;
        let ready = false;
        self.sources.insert(source, Source { port, queue, ready });
        Ok(source)
    }

    fn unwatch(&mut self, source: u64, fd: Option<RawFd>) {
        if let Some(fd) = fd {
            // It may be closed at the other end, but not here.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        self.sources.remove(&source);
        self.ready.retain(|other| *other != source);
    }

    fn make_ready(&mut self, id: u64) {
        if let Some(source) = self.sources.get_mut(&id)
            && !std::mem::replace(&mut source.ready, true)
        {
            self.ready.push_back(id);
        }
    }
}
