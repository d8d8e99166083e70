//! virtio-net (virtio 1.2 §5.1): frames in, frames out, control queue.

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Feature bits used here.
pub mod feature {
    /// The device completes checksums.
    pub const CSUM: u64 = 1;
    /// The guest takes frames with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// MTU in the configuration.
    pub const MTU: u64 = 1 << 3;
    /// MAC in the configuration.
    pub const MAC: u64 = 1 << 5;
    /// The guest takes large TCP segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The device segments TCP.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// A received frame may span buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// Link status in the configuration.
    pub const STATUS: u64 = 1 << 16;
    /// Control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// Receive-mode control.
    pub const CTRL_RX: u64 = 1 << 18;
    /// Several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// MAC by control queue.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
}

/// Length of `virtio_net_hdr` with VIRTIO_F_VERSION_1.
pub const HEADER: usize = 12;
const BUFFER: usize = 2048;
const TRANSMIT_BYTES: usize = 1 << 17;
/// How long the device may take to take a frame: a daemon that was killed is back by then, also on a busy emulated host.
const TAKEN_MS: u64 = 30_000;

pub(super) struct Pair {
    pub(super) receive: Queue,
    pub(super) transmit: Queue,
    /// The buffer of each head.
    owners: Vec<usize>,
    input: Dma,
}

/// Offloads asked for in a frame's header.
#[derive(Clone, Copy, Default)]
pub struct Offload {
    /// Where the checksum begins and where, from there, it is put.
    pub checksum: Option<(u16, u16)>,
    /// Segmentation type (1 = TCPv4), header length, payload bytes a segment.
    pub segment: Option<(u8, u16, u16)>,
}

impl Offload {
    /// The header that says so (virtio 1.2 §5.1.6).
    pub fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        if let Some((start, offset)) = self.checksum {
            header[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        if let Some((kind, headers, size)) = self.segment {
            header[1] = kind;
            header[2..4].copy_from_slice(&headers.to_le_bytes());
            header[4..6].copy_from_slice(&size.to_le_bytes());
        }
        header
    }
}

/// A NIC.
pub struct Net {
    pub(super) transport: Transport,
    /// Agreed features.
    pub features: u64,
    pub(super) pairs: Vec<Pair>,
    control: Option<Queue>,
    output: Dma,
    /// Its address.
    pub mac: [u8; 6],
}

impl Driver for Net {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        use feature::{
            CSUM, CTRL_MAC_ADDR, CTRL_RX, CTRL_VQ, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MAC, MQ, MRG_RXBUF, MTU, STATUS,
        };
        let transport = Transport::new(function)?;
        let receive_offload = if setup.offload {
            GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF
        } else {
            0
        };
        let wanted = CSUM | MTU | MAC | HOST_TSO4 | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | receive_offload;
        let wanted = wanted | if setup.queues > 1 { MQ } else { 0 };
        let features = transport.negotiate(wanted | setup.features())?;
        let most = if features & MQ != 0 {
            transport.config_number(8, 2)? as u16
        } else {
            1
        };
        let options = Options::of(features);
        let mut pairs = Vec::new();
        for pair in 0..setup.queues.min(most) {
            let receive = transport.queue(2 * pair, setup.size, options)?;
            let transmit = transport.queue(2 * pair + 1, setup.size, options)?;
            pairs.push(Pair {
                owners: alloc::vec![usize::MAX; receive.size.into()],
                receive,
                transmit,
                input: Dma::new(setup.buffers * BUFFER)?,
            });
        }
        let control = if features & CTRL_VQ != 0 {
            Some(transport.queue(2 * most, setup.size, options)?)
        } else {
            None
        };
        let mut mac = [0x52, 0x54, 0, 0, 0, 1];
        if features & MAC != 0 {
            mac.copy_from_slice(&transport.config(0, 6)?);
        }
        transport.run();
        let mut net = Self {
            transport,
            features,
            pairs,
            control,
            output: Dma::new(TRANSMIT_BYTES)?,
            mac,
        };
        for pair in &mut net.pairs {
            for buffer in 0..setup.buffers.min(usize::from(pair.receive.size)) {
                pair.give(buffer);
            }
            pair.receive.kick();
        }
        if net.pairs.len() > 1 {
            let pairs = net.pairs.len() as u16;
            net.command(4, 0, &pairs.to_le_bytes())?;
        }
        Ok(net)
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        let pairs = self
            .pairs
            .iter_mut()
            .flat_map(|pair| [&mut pair.receive, &mut pair.transmit]);
        pairs.chain(&mut self.control).collect()
    }

    fn victim(&self) -> u16 {
        1
    }

    fn prove(&mut self) -> Result<(), String> {
        // An experimental ethertype (IEEE 802 local experimental 1) that no stack answers.
        let mut frame = [0; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&self.mac);
        frame[12..14].copy_from_slice(&0x88b5u16.to_be_bytes());
        self.send(0, &frame, Offload::default())
    }

    fn remap(&mut self) -> Result<(), String> {
        let pairs = self
            .pairs
            .iter_mut()
            .flat_map(|pair| [&mut pair.receive, &mut pair.transmit]);
        let mut queues: Vec<_> = pairs.chain(&mut self.control).collect();
        self.transport.remap(&mut queues)
    }
}

impl Pair {
    fn give(&mut self, buffer: usize) {
        if let Some(head) = self
            .receive
            .add(&[Segment::write(&self.input, buffer * BUFFER, BUFFER)])
        {
            self.owners[usize::from(head)] = buffer;
        }
    }

    /// The buffer that the device was given as `head`.
    pub(super) fn peek(&mut self, head: u16) -> Option<&[u8]> {
        let buffer = *self.owners.get(usize::from(head))?;
        self.input.bytes().get(buffer.checked_mul(BUFFER)?..)?.get(..BUFFER)
    }

    /// Gives the buffer behind `head` to the device again.
    pub(super) fn give_back(&mut self, head: u16) {
        let owner = self.owners.get_mut(usize::from(head));
        let buffer = owner.map_or(usize::MAX, |owner| core::mem::replace(owner, usize::MAX));
        if buffer != usize::MAX {
            self.give(buffer);
        }
    }

    /// Takes the buffer behind `head` back: its first `len` bytes.
    fn take(&mut self, head: u16, len: u32) -> Option<Vec<u8>> {
        let bytes = self.peek(head)?[..(len as usize).min(BUFFER)].to_vec();
        self.give_back(head);
        Some(bytes)
    }
}

impl Net {
    /// Number of queue pairs in use.
    pub fn pairs(&self) -> usize {
        self.pairs.len()
    }

    /// The registers.
    pub fn registers(&self) -> &Transport {
        &self.transport
    }

    /// Sends one frame on a queue pair and waits until the device has taken it.
    pub fn send(&mut self, pair: usize, frame: &[u8], offload: Offload) -> Result<(), String> {
        if frame.len() + HEADER > TRANSMIT_BYTES {
            return Err("frame too long".into());
        }
        self.output.bytes()[..HEADER].copy_from_slice(&offload.header());
        self.output.bytes()[HEADER..HEADER + frame.len()].copy_from_slice(frame);
        let mut chain = alloc::vec![Segment::read(&self.output, 0, HEADER)];
        chain.extend(
            (0..frame.len())
                .step_by(16384)
                .map(|at| Segment::read(&self.output, HEADER + at, (frame.len() - at).min(16384))),
        );
        let queue = &mut self.pairs.get_mut(pair).ok_or("no such queue pair")?.transmit;
        queue.want_interrupt(true);
        queue.add(&chain).ok_or("queue is full")?;
        queue.kick();
        queue
            .wait(Deadline::after_ms(TAKEN_MS))
            .ok_or_else(|| format!("frame not taken, device status {:#x}", self.transport.status()))?;
        Ok(())
    }

    /// The next frame on any pair with its header, until `deadline`.
    pub fn receive(&mut self, deadline: Deadline) -> Option<Vec<u8>> {
        let several = self.pairs.len() > 1;
        loop {
            for pair in &mut self.pairs {
                let done = if several {
                    pair.receive.poll()
                } else {
                    pair.receive.wait(deadline)
                };
                let Some((head, len)) = done else { continue };
                let mut frame = pair.take(head, len)?;
                let buffers = u16::from_le_bytes([*frame.get(10)?, *frame.get(11)?]).max(1);
                for _ in 1..buffers {
                    let (head, len) = pair.receive.wait(deadline)?;
                    frame.extend_from_slice(&pair.take(head, len)?);
                }
                pair.receive.kick();
                return Some(frame);
            }
            deadline.left()?;
        }
    }

    /// A command on the control queue; refused or unanswered is an error.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> Result<(), String> {
        let queue = self.control.as_mut().ok_or("no control queue")?;
        let mut dma = Dma::new(4096)?;
        dma.put(0, [class, command]);
        dma.bytes()[64..64 + data.len()].copy_from_slice(data);
        dma.put(1024, [0xff]);
        queue.want_interrupt(true);
        queue
            .add(&[
                Segment::read(&dma, 0, 2),
                Segment::read(&dma, 64, data.len()),
                Segment::write(&dma, 1024, 1),
            ])
            .ok_or("queue is full")?;
        queue.kick();
        if queue.wait(Deadline::after_ms(5000)).is_none() {
            // The buffer stays the device's.
            core::mem::forget(dma);
            return Err("control command unanswered".into());
        }
        match dma.bytes()[1024] {
            0 => Ok(()),
            other => Err(format!("control command refused ({other})")),
        }
    }
}
