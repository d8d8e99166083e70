//! All connections of a device, and what happens to them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{BUFFER, Connection, Phase, Ports};
use super::packet::{HOST_CID, Header, STREAM, op};
use super::socket::Listener;
use super::stats::Counters;
use crate::{Chain, VirtQueue};

/// Refusals the guest has to take before more of its packets are looked at.
pub(super) const MAX_REFUSALS: usize = 256;
/// Where the host's ports start that are made up for its programs.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Connections have event tokens from here on.
pub(super) const FIRST_ID: u64 = 16;

/// How long and how many.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) connections: usize,
    /// For a program of the host to name its port.
    pub(super) greeting: Duration,
    /// For the guest to accept a connection.
    pub(super) connect: Duration,
    /// For the guest to close a connection whose host's side is gone, or the host to take the rest of one whose guest's is.
    pub(super) close: Duration,
}

impl Limits {
    pub(super) fn new(connections: usize) -> Self {
        Self {
            connections,
            greeting: Duration::from_secs(60),
            connect: Duration::from_secs(5),
            close: Duration::from_secs(8),
        }
    }
}

/// What the device's thread owns.
pub(super) struct Engine {
    pub(super) name: String,
    pub(super) cid: u64,
    pub(super) limits: Limits,
    pub(super) counters: Arc<Counters>,
    pub(super) listener: Listener,
    /// Watches the sockets; made anew for each thread.
    pub(super) epoll: Option<Epoll>,
    pub(super) rx: Option<VirtQueue>,
    pub(super) tx: Option<VirtQueue>,
    pub(super) event: Option<VirtQueue>,
    /// A receive buffer that was popped and then not needed.
    pub(super) spare: Option<Chain>,
    /// The guest has yet to learn that it was moved.
    pub(super) transport_reset: bool,
    pub(super) connections: HashMap<u64, Connection>,
    ports: HashMap<Ports, u64>,
    /// Those that may have a packet for the guest, in turn.
    pub(super) ready: VecDeque<u64>,
    /// Answers to packets that belong to no connection.
    pub(super) refusals: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u64)>,
    next_id: u64,
    next_port: u32,
    /// A program of the host waits because the VMM was out of descriptors.
    accept_waits: bool,
    /// Data of one packet on its way.
    pub(super) scratch: Vec<u8>,
}

impl Engine {
    pub(super) fn new(name: String, cid: u64, limits: Limits, listener: Listener) -> Self {
        Self {
            name,
            cid,
            limits,
            counters: Arc::default(),
            listener,
            epoll: None,
            rx: None,
            tx: None,
            event: None,
            spare: None,
            transport_reset: false,
            connections: HashMap::new(),
            ports: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_id: FIRST_ID,
            next_port: FIRST_HOST_PORT,
            accept_waits: false,
            scratch: Vec::new(),
        }
    }

    /// Forgets every connection: the guest did too.
    pub(super) fn reset(&mut self) {
        self.connections.clear();
        self.ports.clear();
        self.ready.clear();
        self.refusals.clear();
        self.deadlines.clear();
        self.spare = None;
        self.transport_reset = false;
        self.counters.open.set(0);
    }

    /// The guest sent a packet with `data` behind the header.
    pub(super) fn on_packet(&mut self, header: &Header, data: Result<&[u8], ()>) {
        if header.src_cid != self.cid {
            return self.counters.dropped.add(1);
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            self.counters.dropped.add(1);
            return self.refuse(header);
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        match self.ports.get(&ports) {
            Some(&id) => self.on_known(id, header, data),
            None if header.op == op::REQUEST => self.guest_connects(ports, header),
            None => self.refuse(header),
        }
    }

    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.refusals.push_back(header.reset());
        }
    }

    fn guest_connects(&mut self, ports: Ports, header: &Header) {
        let full = self.connections.len() >= self.limits.connections;
        let stream = if full {
            None
        } else {
            self.listener.connect_port(ports.host).ok()
        };
        let Some(id) = stream.and_then(|stream| self.insert(stream, Phase::Open, ports)) else {
            self.counters.refused.add(1);
            return self.refuse(header);
        };
        self.ports.insert(ports, id);
        self.counters.opened.add(1);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.update_credit(header.buf_alloc, header.fwd_cnt);
            connection.owe(op::RESPONSE);
        }
        self.wake(id);
    }

    fn on_known(&mut self, id: u64, header: &Header, data: Result<&[u8], ()>) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.update_credit(header.buf_alloc, header.fwd_cnt);
        let fine = match (header.op, connection.phase) {
            (op::RST, _) => return self.guest_resets(id),
            (op::RESPONSE, Phase::Requested) => {
                connection.phase = Phase::Open;
                self.counters.opened.add(1);
                let answered = connection.write_answer().is_ok();
                self.set_deadline(id, None);
                answered
            }
            (op::RW, Phase::Open) => data.is_ok_and(|data| {
                self.counters.tx_bytes.add(data.len());
                connection.deliver(data).is_ok()
            }),
            (op::SHUTDOWN, Phase::Open) => {
                connection.guest_shuts(header.flags);
                true
            }
            (op::CREDIT_UPDATE, Phase::Open) => true,
            (op::CREDIT_REQUEST, Phase::Open) => {
                connection.owe(op::CREDIT_UPDATE);
                true
            }
            _ => false,
        };
        if fine {
            self.wake(id);
        } else {
            self.remove(id);
            self.refuse(header);
        }
    }

    fn guest_resets(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.phase == Phase::Requested {
            self.counters.refused.add(1);
        }
        if connection.guest_resets() {
            // Its ports are free for the guest, but the host has yet to read the rest.
            let ports = connection.ports;
            self.ports.remove(&ports);
            self.set_deadline(id, Some(self.limits.close));
        } else {
            self.remove(id);
        }
    }

    /// Programs of the host wait to be let in.
    pub(super) fn accept(&mut self) {
        self.accept_waits = false;
        loop {
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Out of descriptors or memory: again when a connection has ended.
                    self.accept_waits = error.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            };
            let ports = Ports { host: 0, guest: 0 };
            if self.connections.len() >= self.limits.connections {
                self.counters.refused.add(1);
            } else if let Some(id) = self.insert(stream, Phase::Greeting, ports) {
                self.set_deadline(id, Some(self.limits.greeting));
            }
        }
    }

    fn insert(&mut self, stream: UnixStream, phase: Phase, ports: Ports) -> Option<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let connection = Connection::new(stream, phase, ports);
        self.watch(&connection, id).ok()?;
        self.connections.insert(id, connection);
        self.counters.open.set(self.connections.len());
        Some(id)
    }

    /// Reports edges: each is noted in the connection, so nothing has to be changed as it fills and empties.
    fn watch(&self, connection: &Connection, id: u64) -> io::Result<()> {
        let Some(epoll) = &self.epoll else { return Ok(()) };
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        epoll.ctl(
            ControlOperation::Add,
            connection.stream.as_raw_fd(),
            EpollEvent::new(events, id),
        )
    }

    /// Watches every socket with `epoll` from now on, which reports what they are ready for at once.
    pub(super) fn watch_all(&mut self, epoll: Epoll) -> io::Result<()> {
        self.epoll = Some(epoll);
        for (id, connection) in &self.connections {
            self.watch(connection, *id)?;
        }
        Ok(())
    }

    /// A connection's socket has news.
    pub(super) fn on_socket(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP) {
            connection.readable = true;
        }
        if events.contains(EventSet::OUT) {
            connection.writable = true;
        }
        if connection.phase == Phase::Greeting {
            return self.greet(id);
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.host_hung_up();
        }
        connection.flush();
        if connection.phase == Phase::Draining && connection.drained() {
            return self.remove(id);
        }
        self.wake(id);
    }

    fn greet(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let guest = match connection.read_greeting() {
            Ok(None) => return,
            Ok(Some(port)) => port,
            Err(_) => {
                self.counters.refused.add(1);
                return self.remove(id);
            }
        };
        let ports = self.free_ports(guest);
        self.ports.insert(ports, id);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.ports = ports;
            connection.phase = Phase::Requested;
            connection.owe(op::REQUEST);
        }
        self.set_deadline(id, Some(self.limits.connect));
        self.wake(id);
    }

    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = host.wrapping_add(1).max(FIRST_HOST_PORT);
            let ports = Ports { host, guest };
            // There are far fewer connections than ports.
            if !self.ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Lines a connection up if it has something for the guest.
    pub(super) fn wake(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Drops a connection; the host's program sees its end.
    pub(super) fn remove(&mut self, id: u64) {
        self.set_deadline(id, None);
        if let Some(connection) = self.connections.remove(&id)
            && self.ports.get(&connection.ports) == Some(&id)
        {
            self.ports.remove(&connection.ports);
        }
        self.counters.open.set(self.connections.len());
    }

    /// Lets those in who had to wait for descriptors, if one came free.
    pub(super) fn accept_waiting(&mut self) {
        if self.accept_waits {
            self.accept();
        }
    }

    pub(super) fn set_deadline(&mut self, id: u64, after: Option<Duration>) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if let Some(old) = connection.deadline.take() {
            self.deadlines.remove(&(old, id));
        }
        if let Some(after) = after {
            let at = Instant::now() + after;
            connection.deadline = Some(at);
            self.deadlines.insert((at, id));
        }
    }

    /// Time until the next deadline in ms, rounded up; -1 when there is none.
    pub(super) fn next_deadline(&self) -> i32 {
        let Some((at, _)) = self.deadlines.first() else {
            return -1;
        };
        let left = at.saturating_duration_since(Instant::now());
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    }

    /// Gives up on connections whose time is over.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        while let Some(&(at, id)) = self.deadlines.first()
            && at <= now
        {
            let known = self.connections.get(&id).map(|c| (c.phase, c.ports));
            self.remove(id);
            let Some((phase, ports)) = known else {
                self.deadlines.pop_first();
                continue;
            };
            if phase == Phase::Requested {
                self.counters.refused.add(1);
            }
            if matches!(phase, Phase::Requested | Phase::Open) {
                let header = self.header(ports);
                self.refusals.push_back(Header { op: op::RST, ..header });
            }
        }
    }

    /// The header of a packet from the host.
    pub(super) fn header(&self, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            buf_alloc: BUFFER,
            ..Header::default()
        }
    }
}
