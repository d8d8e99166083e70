//! One stream between a program of the host and one of the guest.
//!
//! ```text
//!  host connects:  [greeting] --CONNECT line--> [requested] --RESPONSE--> [open]
//!  guest connects:                                     REQUEST ---------> [open]
//!  [open] --both directions over--> RST to the guest, gone
//!  [open] --RST from the guest--> gone, or [draining] until the host took what the guest had sent before its end
//! ```

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::packet::{SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, op};

/// Bytes from the guest kept for a program of the host that does not read: the guest's credit, and so the most it can make us hold.
pub(super) const BUFFER: u32 = 64 << 10;
/// The guest is told of the room again when it believes to have less than this.
const LOW_CREDIT: u32 = BUFFER / 2;
/// The longest line: `CONNECT 4294967295\n`.
const MAX_GREETING: usize = 19;

/// The ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host's program has yet to say which port it wants.
    Greeting,
    /// The guest has yet to answer.
    Requested,
    Open,
    /// The guest has forgotten it; the host still gets the rest.
    Draining,
}

/// The guest broke the rules of the stream: it is reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// A packet to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes of data in the scratch buffer.
    pub(super) len: usize,
}

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) phase: Phase,
    pub(super) ports: Ports,
    /// When to give up waiting for the next phase.
    pub(super) deadline: Option<Instant>,
    /// It waits in the list of those that have something for the guest.
    pub(super) queued: bool,
    /// What the socket said last; edges are reported once, so these hold until a call would block.
    pub(super) readable: bool,
    pub(super) writable: bool,
    greeting: Vec<u8>,
    /// From the guest to the host.
    to_host: VecDeque<u8>,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    guest_sends: bool,
    host_receives: bool,
    /// From the host to the guest.
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,
    credit_requested: bool,
    host_sends: bool,
    guest_receives: bool,
    told_shutdown: u32,
    /// Packets owed, as a set of `1 << op`.
    owed: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, phase: Phase, ports: Ports) -> Self {
        Self {
            stream,
            phase,
            ports,
            deadline: None,
            queued: false,
            readable: false,
            writable: true,
            greeting: Vec::new(),
            to_host: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            guest_sends: true,
            host_receives: true,
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            credit_requested: false,
            host_sends: true,
            guest_receives: true,
            told_shutdown: 0,
            owed: 0,
        }
    }

    pub(super) fn owe(&mut self, op: u16) {
        self.owed |= 1 << op;
    }

    fn owes(&mut self, op: u16) -> bool {
        let owed = self.owed & (1 << op) != 0;
        self.owed &= !(1 << op);
        owed
    }

    /// Reads the line that names the guest's port. `None` until it is complete.
    pub(super) fn read_greeting(&mut self) -> io::Result<Option<u32>> {
        // A byte at a time: what follows the line is for the guest.
        let mut byte = [0];
        while self.greeting.last() != Some(&b'\n') {
            if self.greeting.len() == MAX_GREETING {
                return Err(io::ErrorKind::InvalidData.into());
            }
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => self.greeting.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let line = std::str::from_utf8(&self.greeting).map_err(|_| io::ErrorKind::InvalidData)?;
        let port = line.trim_end().strip_prefix("CONNECT ");
        let port = port.and_then(|p| p.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        self.greeting = Vec::new();
        Ok(Some(port))
    }

    /// Tells the host's program that the guest accepted.
    pub(super) fn write_answer(&mut self) -> io::Result<()> {
        let line = format!("OK {}\n", self.ports.host);
        // It is the first thing written to the socket, so there is room for all of it.
        match self.stream.write(line.as_bytes())? {
            n if n == line.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Takes what every packet of the guest says about its buffer.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buffer = buf_alloc;
        self.guest_forwarded = fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Bytes the guest has room for. A guest that counts wrongly has none.
    fn credit(&self) -> u32 {
        self.guest_buffer
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Takes data from the guest.
    pub(super) fn deliver(&mut self, data: &[u8]) -> Result<(), Violation> {
        let waiting = self.received.wrapping_sub(self.forwarded);
        let room = BUFFER.saturating_sub(waiting) as usize;
        if self.phase != Phase::Open || !self.guest_sends || data.len() > room {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(data.len() as u32);
        let direct = if self.to_host.is_empty() { self.write(data) } else { 0 };
        if direct < data.len() {
            if self.to_host.capacity() == 0 {
                self.to_host.reserve_exact(BUFFER as usize);
            }
            self.to_host.extend(&data[direct..]);
        }
        self.check_credit();
        Ok(())
    }

    /// Writes what waits for the host, as much as it takes.
    pub(super) fn flush(&mut self) {
        while !self.to_host.is_empty() && self.writable {
            let mut waiting = std::mem::take(&mut self.to_host);
            let n = self.write(waiting.as_slices().0);
            waiting.drain(..n);
            self.to_host = waiting;
        }
        if self.to_host.is_empty() {
            self.to_host = VecDeque::new();
            if !self.guest_sends && self.host_receives {
                // The host's program sees the end of the guest's stream now. That it may be gone is found out by reading.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        self.check_credit();
    }

    /// Writes to the host and returns how much of `data` is done with.
    fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        while done < data.len() && self.host_receives && self.writable {
            match self.stream.write(&data[done..]) {
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.host_receives = false,
            }
        }
        if !self.host_receives {
            // Nobody will read it, and it must not hold up what the host had to say before it left.
            done = data.len();
        }
        self.forwarded = self.forwarded.wrapping_add(done as u32);
        done
    }

    fn check_credit(&mut self) {
        let believed = BUFFER.saturating_sub(self.received.wrapping_sub(self.told_forwarded));
        if believed < LOW_CREDIT && self.forwarded != self.told_forwarded {
            self.owe(op::CREDIT_UPDATE);
        }
    }

    /// The guest ends one direction or both.
    pub(super) fn guest_shuts(&mut self, flags: u32) {
        if flags & SHUT_RECEIVE != 0 {
            self.guest_receives = false;
            // The host's program learns it when it writes.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUT_SEND != 0 {
            self.guest_sends = false;
            self.flush();
        }
    }

    /// The guest reset it. Whether there is something left to give to the host.
    pub(super) fn guest_resets(&mut self) -> bool {
        self.phase = Phase::Draining;
        self.owed = 0;
        // A guest that announced its end just did not wait for us; one that did not wants the stream cut.
        !self.guest_sends && !self.drained()
    }

    /// The host's program closed its end altogether.
    pub(super) fn host_hung_up(&mut self) {
        self.host_receives = false;
        // What it wrote before is still there to read.
        self.readable = true;
        self.flush_into_void();
    }

    fn flush_into_void(&mut self) {
        let n = self.to_host.len();
        self.to_host = VecDeque::new();
        self.forwarded = self.forwarded.wrapping_add(n as u32);
        self.check_credit();
    }

    /// Whether the host took all there was.
    pub(super) fn drained(&self) -> bool {
        self.to_host.is_empty()
    }

    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_sends { 0 } else { SHUT_SEND };
        let receive = if self.host_receives { 0 } else { SHUT_RECEIVE };
        send | receive
    }

    /// Whether nothing will go either way any more and the guest knows. When the host's side alone ended both, the guest may still
    /// be reading, and says when it is done.
    fn over(&self) -> bool {
        let to_host = !self.guest_sends && self.drained() || self.told_shutdown & SHUT_RECEIVE != 0;
        let to_guest = !self.guest_receives || self.told_shutdown & SHUT_SEND != 0;
        to_host && to_guest && !(self.closing() && self.guest_sends && self.guest_receives)
    }

    fn can_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && self.host_sends && self.guest_receives
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let open = self.phase == Phase::Open;
        let shut = open && self.shutdown_flags() & !self.told_shutdown != 0;
        let read = self.can_read() && (self.credit() > 0 || !self.credit_requested);
        self.phase != Phase::Draining && (self.owed != 0 || shut || read || (open && self.over()))
    }

    /// The next packet for the guest, with at most `room` bytes of data, which are put into `scratch`. After an RST the connection
    /// is gone.
    pub(super) fn next_packet(&mut self, room: usize, scratch: &mut [u8]) -> Option<Outgoing> {
        let bare = |op| Some(Outgoing { op, flags: 0, len: 0 });
        if self.phase == Phase::Draining {
            return None;
        }
        for op in [op::RST, op::REQUEST, op::RESPONSE] {
            if self.owes(op) {
                return bare(op);
            }
        }
        if self.can_read() {
            match self.read(room, scratch) {
                Ok(0) => {}
                Ok(len) => {
                    return Some(Outgoing {
                        op: op::RW,
                        flags: 0,
                        len,
                    });
                }
                Err(_) => return bare(op::RST),
            }
        }
        if self.phase == Phase::Open {
            let flags = self.shutdown_flags();
            if flags & !self.told_shutdown != 0 {
                self.told_shutdown |= flags;
                return Some(Outgoing {
                    op: op::SHUTDOWN,
                    flags: self.told_shutdown,
                    len: 0,
                });
            }
            if self.over() {
                return bare(op::RST);
            }
        }
        for op in [op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
            if self.owes(op) {
                return bare(op);
            }
        }
        None
    }

    /// Reads from the host; 0 when there is nothing to read, no credit, or no more to come.
    fn read(&mut self, room: usize, scratch: &mut [u8]) -> io::Result<usize> {
        if self.credit() == 0 {
            if !self.credit_requested {
                self.credit_requested = true;
                self.owe(op::CREDIT_REQUEST);
            }
            return Ok(0);
        }
        let most = (self.credit() as usize).min(room).min(scratch.len());
        if most == 0 {
            return Ok(0);
        }
        loop {
            match self.stream.read(&mut scratch[..most]) {
                Ok(0) => {
                    self.host_sends = false;
                    return Ok(0);
                }
                Ok(n) => {
                    self.sent = self.sent.wrapping_add(n as u32);
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The count of bytes forwarded, for a packet that is about to tell the guest.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.owed &= !(1 << op::CREDIT_UPDATE);
        self.told_forwarded = self.forwarded;
        self.forwarded
    }

    /// Whether it is closing and waits only for the guest's last word.
    pub(super) fn closing(&self) -> bool {
        self.told_shutdown == SHUT_BOTH
    }
}
