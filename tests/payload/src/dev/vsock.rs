//! virtio-vsock streams (virtio 1.2 §5.10).

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const HEADER: usize = 44;
const BUFFERS: usize = 32;
const BUFFER: usize = 4096;
const WINDOW: u32 = 65536;
const HOST: u64 = 2;

/// Operations.
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Open,
    /// The peer sends no more.
    PeerDone,
    Closed,
}

struct Stream {
    local: u32,
    peer: u32,
    state: State,
    input: VecDeque<u8>,
    /// Bytes given to the user: our `fwd_cnt`.
    taken: u32,
    /// What the peer last knew of `taken`.
    told: u32,
    sent: u32,
    peer_window: u32,
    peer_taken: u32,
}

/// A socket device.
pub struct Vsock {
    transport: Transport,
    /// Our context id.
    pub cid: u64,
    receive: Queue,
    transmit: Queue,
    event: Queue,
    input: Dma,
    output: Dma,
    heads: Vec<(u16, usize)>,
    streams: Vec<Stream>,
    listening: Option<u32>,
    accepted: VecDeque<usize>,
    next_port: u32,
}

impl Driver for Vsock {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(setup.features())?;
        let options = Options::of(features);
        let receive = transport.queue(0, setup.size, options)?;
        let transmit = transport.queue(1, setup.size, options)?;
        let event = transport.queue(2, setup.size, options)?;
        let cid = transport.config_number(0, 8)?;
        transport.run();
        let mut vsock = Self {
            transport,
            cid,
            receive,
            transmit,
            event,
            input: Dma::new(BUFFERS * BUFFER)?,
            output: Dma::new(2 * BUFFER)?,
            heads: Vec::new(),
            streams: Vec::new(),
            listening: None,
            accepted: VecDeque::new(),
            next_port: 1024,
        };
        for buffer in 0..BUFFERS.min(usize::from(vsock.receive.size)) {
            vsock.give(buffer);
        }
        vsock.receive.kick();
        Ok(vsock)
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        alloc::vec![&mut self.receive, &mut self.transmit, &mut self.event]
    }

    fn victim(&self) -> u16 {
        1
    }

    fn prove(&mut self) -> Result<(), String> {
        // A stray packet: the device has to take it, whatever it answers.
        self.packet(1, 1, op::RST, &[], (0, 0))
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport
            .remap(&mut [&mut self.receive, &mut self.transmit, &mut self.event])
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

impl Vsock {
    fn give(&mut self, buffer: usize) {
        if let Some(head) = self
            .receive
            .add(&[Segment::write(&self.input, buffer * BUFFER, BUFFER)])
        {
            self.heads.push((head, buffer));
        }
    }

    /// Sends one packet; `credit` is (buf_alloc, fwd_cnt).
    fn packet(&mut self, local: u32, peer: u32, op: u16, data: &[u8], credit: (u32, u32)) -> Result<(), String> {
        let cid = self.cid;
        let header = &mut self.output;
        header.put(0, cid.to_le_bytes());
        header.put(8, HOST.to_le_bytes());
        header.put(16, local.to_le_bytes());
        header.put(20, peer.to_le_bytes());
        header.put(24, (data.len() as u32).to_le_bytes());
        header.put(28, 1u16.to_le_bytes());
        header.put(30, op.to_le_bytes());
        header.put(32, if op == op::SHUTDOWN { 3u32 } else { 0 }.to_le_bytes());
        header.put(36, credit.0.to_le_bytes());
        header.put(40, credit.1.to_le_bytes());
        header.bytes()[HEADER..HEADER + data.len()].copy_from_slice(data);
        let mut chain = alloc::vec![Segment::read(&self.output, 0, HEADER)];
        if !data.is_empty() {
            chain.push(Segment::read(&self.output, HEADER, data.len()));
        }
        self.transmit.want_interrupt(true);
        self.transmit.add(&chain).ok_or("queue is full")?;
        self.transmit.kick();
        let done = self.transmit.wait(Deadline::after_ms(5000));
        done.ok_or_else(|| format!("packet not taken, device status {:#x}", self.transport.status()))?;
        Ok(())
    }

    fn tell(&mut self, id: usize, op: u16, data: &[u8]) -> Result<(), String> {
        let stream = &mut self.streams[id];
        stream.told = stream.taken;
        let (local, peer, credit) = (stream.local, stream.peer, (WINDOW, stream.taken));
        self.packet(local, peer, op, data, credit)
    }

    /// Takes in packets: at least one, if one comes before `deadline`.
    fn pump(&mut self, deadline: Deadline) -> Result<(), String> {
        let mut done = self.receive.wait(deadline);
        while let Some((head, len)) = done {
            let place = self
                .heads
                .iter()
                .position(|(known, _)| *known == head)
                .ok_or("unknown head completed")?;
            let (_, buffer) = self.heads.swap_remove(place);
            let packet = self.input.bytes()[buffer * BUFFER..][..(len as usize).min(BUFFER)].to_vec();
            self.give(buffer);
            self.receive.kick();
            if packet.len() < HEADER {
                return Err(format!("packet of {len} bytes"));
            }
            self.handle(&packet)?;
            done = self.receive.poll();
        }
        Ok(())
    }

    fn handle(&mut self, packet: &[u8]) -> Result<(), String> {
        let (peer, local) = (
            u32::from_le_bytes(number(packet, 16)),
            u32::from_le_bytes(number(packet, 20)),
        );
        let len = u32::from_le_bytes(number(packet, 24)) as usize;
        let op = u16::from_le_bytes(number(packet, 30));
        if (
            u64::from_le_bytes(number(packet, 0)),
            u64::from_le_bytes(number(packet, 8)),
        ) != (HOST, self.cid)
        {
            return Err("packet with wrong addresses".into());
        }
        let known = self
            .streams
            .iter()
            .position(|stream| (stream.local, stream.peer) == (local, peer) && stream.state != State::Closed);
        let Some(id) = known else {
            if op == op::REQUEST && self.listening == Some(local) {
                let id = self.open(local, peer, State::Open);
                self.credit(id, packet);
                self.accepted.push_back(id);
                return self.tell(id, op::RESPONSE, &[]);
            }
            return if op == op::RST {
                Ok(())
            } else {
                self.packet(local, peer, op::RST, &[], (0, 0))
            };
        };
        self.credit(id, packet);
        let stream = &mut self.streams[id];
        match op {
            op::RESPONSE => stream.state = State::Open,
            op::RST => stream.state = State::Closed,
            op::SHUTDOWN if packet[32] & 2 != 0 => stream.state = State::PeerDone,
            op::RW => {
                let data = packet
                    .get(HEADER..HEADER + len)
                    .ok_or("packet shorter than its length")?;
                stream.input.extend(data);
                if stream.input.len() > WINDOW as usize {
                    return Err("the peer sends more than its credit".into());
                }
            }
            op::CREDIT_REQUEST => self.tell(id, op::CREDIT_UPDATE, &[])?,
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, local: u32, peer: u32, state: State) -> usize {
        self.streams.push(Stream {
            local,
            peer,
            state,
            input: VecDeque::new(),
            taken: 0,
            told: 0,
            sent: 0,
            peer_window: 0,
            peer_taken: 0,
        });
        self.streams.len() - 1
    }

    fn credit(&mut self, id: usize, packet: &[u8]) {
        let stream = &mut self.streams[id];
        stream.peer_window = u32::from_le_bytes(number(packet, 36));
        stream.peer_taken = u32::from_le_bytes(number(packet, 40));
    }

    fn state(&self, id: usize) -> Result<State, String> {
        self.streams
            .get(id)
            .map(|stream| stream.state)
            .ok_or_else(|| format!("no connection {id}"))
    }

    /// Connects to a port of the host; the connection's number.
    pub fn connect(&mut self, port: u32, deadline: Deadline) -> Result<usize, String> {
        self.next_port += 1;
        let id = self.open(self.next_port, port, State::Connecting);
        self.tell(id, op::REQUEST, &[])?;
        while self.state(id)? == State::Connecting {
            if deadline.left().is_none() {
                return Err("connect: no answer".into());
            }
            self.pump(deadline)?;
        }
        if self.state(id)? == State::Open {
            Ok(id)
        } else {
            Err("connect: refused".into())
        }
    }

    /// Waits for a connection from the host to `port`.
    pub fn accept(&mut self, port: u32, deadline: Deadline) -> Result<usize, String> {
        self.listening = Some(port);
        loop {
            if let Some(id) = self.accepted.pop_front() {
                return Ok(id);
            }
            if deadline.left().is_none() {
                return Err("accept: nobody came".into());
            }
            self.pump(deadline)?;
        }
    }

    /// Sends as much of `data` as the peer has room for; the number of bytes.
    pub fn send_some(&mut self, id: usize, data: &[u8]) -> Result<usize, String> {
        if !matches!(self.state(id)?, State::Open | State::PeerDone) {
            return Err("connection is closed".into());
        }
        let stream = &mut self.streams[id];
        let room = stream
            .peer_window
            .wrapping_sub(stream.sent.wrapping_sub(stream.peer_taken)) as usize;
        let len = data.len().min(room).min(BUFFER);
        if len > 0 {
            stream.sent = stream.sent.wrapping_add(len as u32);
            self.tell(id, op::RW, &data[..len])?;
        }
        Ok(len)
    }

    /// Sends all of `data`.
    pub fn send(&mut self, id: usize, mut data: &[u8], deadline: Deadline) -> Result<(), String> {
        while !data.is_empty() {
            let sent = self.send_some(id, data)?;
            data = &data[sent..];
            if sent == 0 {
                if deadline.left().is_none() {
                    return Err("send: no credit".into());
                }
                self.pump(deadline)?;
            }
        }
        Ok(())
    }

    /// Up to `len` bytes; fewer when the peer ended or the time did.
    pub fn receive(&mut self, id: usize, len: usize, deadline: Deadline) -> Result<Vec<u8>, String> {
        let mut data = Vec::new();
        loop {
            data.extend(self.take(id, len - data.len())?);
            if data.len() == len || self.ended(id)? || deadline.left().is_none() {
                return Ok(data);
            }
            self.pump(deadline)?;
        }
    }

    /// What has come in, at most `len` bytes, without waiting.
    pub fn take(&mut self, id: usize, len: usize) -> Result<Vec<u8>, String> {
        self.state(id)?;
        let stream = &mut self.streams[id];
        let data: Vec<u8> = stream.input.drain(..len.min(stream.input.len())).collect();
        stream.taken = stream.taken.wrapping_add(data.len() as u32);
        if stream.taken.wrapping_sub(stream.told) > WINDOW / 2 && stream.state == State::Open {
            self.tell(id, op::CREDIT_UPDATE, &[])?;
        }
        Ok(data)
    }

    /// Lets packets in until `deadline` at the latest.
    pub fn wait(&mut self, deadline: Deadline) -> Result<(), String> {
        self.pump(deadline)
    }

    /// Whether nothing more will come.
    pub fn ended(&self, id: usize) -> Result<bool, String> {
        Ok(matches!(self.state(id)?, State::PeerDone | State::Closed) && self.streams[id].input.is_empty())
    }

    /// Says that we neither send nor receive any more, and waits for the peer to agree.
    pub fn close(&mut self, id: usize, deadline: Deadline) -> Result<(), String> {
        if self.state(id)? == State::Closed {
            return Ok(());
        }
        self.tell(id, op::SHUTDOWN, &[])?;
        while self.state(id)? != State::Closed {
            if deadline.left().is_none() {
                return Err("close: no answer".into());
            }
            self.pump(deadline)?;
        }
        Ok(())
    }
}
