//! A network device between a fake driver and a fake host.

mod control;
mod data;
mod tap;

use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use triarch_net::{HEADER_LEN, Offloads, PacketBackend, PacketQueue};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mock::{Desc, FakeDriver};

/// A host whose queues are datagram sockets, and which remembers what it is told.
struct FakeHost {
    queues: Vec<Arc<PacketQueue>>,
    offloads: Mutex<Offloads>,
    active: Mutex<Vec<bool>>,
}

impl FakeHost {
    /// A host with `pairs` queues and the other ends of them.
    fn new(pairs: usize) -> (Arc<Self>, Vec<UnixDatagram>) {
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..pairs).map(|_| UnixDatagram::pair().expect("sockets")).unzip();
        for socket in &theirs {
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        }
        let queue = |socket: UnixDatagram| Arc::new(PacketQueue::new(socket.into()).expect("queue"));
        let host = Self {
            queues: ours.into_iter().map(queue).collect(),
            offloads: Mutex::default(),
            active: Mutex::new(vec![true; pairs]),
        };
        (Arc::new(host), theirs)
    }
}

impl PacketBackend for FakeHost {
    fn queues(&self) -> &[Arc<PacketQueue>] {
        &self.queues
    }
    fn offloads(&self) -> Offloads {
        Offloads::all()
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().expect("lock") = offloads;
        Ok(())
    }
    fn set_queue_active(&self, index: usize, active: bool) -> io::Result<()> {
        let mut states = self.active.lock().expect("lock");
        states[index] = active;
        assert!(states.contains(&true), "the host always has a queue to send to");
        Ok(())
    }
    fn mtu(&self) -> Option<u32> {
        Some(1500)
    }
}

fn options(id: &str) -> NetOptions {
    NetOptions {
        id: id.to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        queue_size: 256,
        offloads: OffloadGroups::default(),
    }
}

/// GPA of a data buffer of queue `queue`: 2 KiB each, but the last may be longer.
fn buffer(queue: u16, index: usize) -> u64 {
    u64::from(queue) * 0x10_0000 + 0x1_0000 + 0x800 * index as u64
}

/// An active device with one pair, its queues running.
struct Rig {
    net: Net,
    wire: UnixDatagram,
    rx: FakeDriver,
    tx: FakeDriver,
}

impl Rig {
    fn new(id: &str, features: u64, event_idx: bool) -> Self {
        let (host, mut wires) = FakeHost::new(1);
        let mut net = Net::new(options(id), host).expect("device");
        let rx = FakeDriver::new(64, event_idx);
        let tx = FakeDriver::beside(&rx, 1);
        net.activate(rx.context(features)).expect("activate");
        net.start_queue(rx.queue()).expect("rx");
        net.start_queue(tx.queue()).expect("tx");
        Self {
            net,
            wire: wires.remove(0),
            rx,
            tx,
        }
    }

    /// Offers a packet in two buffers, the header in the first.
    fn send(&mut self, slot: usize, packet: &[u8]) {
        let at = buffer(1, slot);
        self.tx.ram().write_slice(packet, GuestAddress(at)).expect("packet");
        let header = HEADER_LEN.min(packet.len()) as u32;
        let rest = packet.len() as u32 - header;
        let first = Desc::readable(at, header);
        if rest == 0 {
            self.tx.add(&[first]);
        } else {
            self.tx.add(&[first, Desc::readable(at + u64::from(header), rest)]);
        }
        self.tx.kick();
    }

    fn receive_on_wire(&self) -> Vec<u8> {
        let mut packet = vec![0; 70000];
        let n = self.wire.recv(&mut packet).expect("a packet");
        packet.truncate(n);
        packet
    }

    /// Offers receive buffers `slots` of `len` bytes each.
    fn provide(&mut self, slots: std::ops::Range<usize>, len: u32) {
        for slot in slots {
            self.rx.add(&[Desc::writable(buffer(0, slot), len)]);
        }
        self.rx.kick();
    }

    fn read(&self, slot: usize, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.rx
            .ram()
            .read_slice(&mut data, GuestAddress(buffer(0, slot)))
            .expect("buffer");
        data
    }
}

/// A packet of `len` bytes with a header of zeroes, told apart by `seed`.
fn packet(seed: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER_LEN];
    packet.extend((HEADER_LEN..len).map(|i| seed.wrapping_add((i % 251) as u8)));
    packet
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{what} did not happen");
}

/// Clock ticks (10 ms) that the thread called `name` used in 200 ms.
fn ticks_used(name: &str) -> u64 {
    let mut before = None;
    // A thread gets its name a little after its start.
    eventually("the thread", || {
        before = ticks(name);
        before.is_some()
    });
    std::thread::sleep(Duration::from_millis(200));
    ticks(name).expect("it still runs") - before.expect("it ran")
}

fn ticks(name: &str) -> Option<u64> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    tasks.flatten().find_map(|task| {
        let read = |file| std::fs::read_to_string(task.path().join(file)).ok();
        if read("comm")?.trim_end() != name {
            return None;
        }
        let stat = read("stat")?;
        let fields: Vec<&str> = stat.rsplit(") ").next()?.split(' ').collect();
        Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?)
    })
}
