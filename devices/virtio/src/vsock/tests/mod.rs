//! A socket device between a fake guest and programs on unix sockets.

mod rings;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_LEN, HOST_CID, Header, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, STREAM, op};
use super::*;
use crate::mock::{Desc, FakeDriver};

const CID: u32 = 42;
/// Size of a receive buffer.
const BUFFER: u32 = 4096;
const SLOTS: usize = 64;

fn limits() -> Limits {
    Limits {
        connections: 8,
        greeting: Duration::from_millis(300),
        connect: Duration::from_millis(300),
        close: Duration::from_millis(300),
    }
}

fn options(directory: &TempDir, id: &str) -> VsockOptions {
    VsockOptions {
        id: id.to_owned(),
        cid: CID,
        socket: directory.path().join("v.sock"),
        max_connections: VsockOptions::DEFAULT_CONNECTIONS,
    }
}

/// A running device and the guest's driver.
struct Rig {
    device: Vsock,
    directory: TempDir,
    rx: FakeDriver,
    tx: FakeDriver,
    next_tx: usize,
    /// Slot of each receive chain by its head.
    slots: Vec<usize>,
}

impl Rig {
    fn new(id: &str) -> Self {
        let mut rig = Self::without_buffers(id);
        rig.provide(SLOTS);
        rig
    }

    fn without_buffers(id: &str) -> Self {
        let directory = TempDir::new().expect("directory");
        let mut device = Vsock::with_limits(&options(&directory, id), limits()).expect("device");
        let rx = FakeDriver::new(SLOTS as u16, true);
        let tx = FakeDriver::beside(&rx, 1);
        device.activate(rx.context(0)).expect("activate");
        device.start_queue(rx.queue()).expect("rx");
        device.start_queue(tx.queue()).expect("tx");
        Self {
            device,
            directory,
            rx,
            tx,
            next_tx: 0,
            slots: vec![0; SLOTS],
        }
    }

    /// Offers the first `count` receive buffers.
    fn provide(&mut self, count: usize) {
        for slot in 0..count {
            self.offer(slot);
        }
        self.rx.kick();
    }

    fn offer(&mut self, slot: usize) {
        let at = 0x1_0000 + slot as u64 * u64::from(BUFFER);
        let head = self.rx.add(&[Desc::writable(at, BUFFER)]);
        self.slots[usize::from(head)] = slot;
    }

    /// The next packet for the guest, if one is there; its buffer is offered again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.rx.used()?;
        let slot = self.slots[usize::from(head)];
        let at = 0x1_0000 + slot as u64 * u64::from(BUFFER);
        let mut bytes = [0; HEADER_LEN];
        self.rx.ram().read_slice(&mut bytes, GuestAddress(at)).expect("header");
        let header = Header::from_bytes(&bytes);
        assert_eq!(written, header.len + HEADER_LEN as u32);
        let mut data = vec![0; header.len as usize];
        self.rx
            .ram()
            .read_slice(&mut data, GuestAddress(at + HEADER_LEN as u64))
            .expect("data");
        self.offer(slot);
        self.rx.kick();
        Some((header, data))
    }

    /// Waits for a packet.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..5000 {
            if let Some(packet) = self.poll() {
                let header = packet.0;
                assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(CID)));
                return packet;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no packet came");
    }

    /// Waits for a packet and checks what it does.
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// Sends a packet and waits until the device is through with it.
    fn send(&mut self, header: &Header, data: &[u8]) {
        self.send_raw(&[&header.to_bytes()[..], data].concat());
        assert!(matches!(self.tx.wait_used(), Some((_, 0))), "{header:?}");
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        // Packets may be up to 64 KiB; four of them have places of their own.
        let at = 0x11_0000 + (self.next_tx % 4) as u64 * 0x2_0000;
        self.next_tx += 1;
        self.tx.ram().write_slice(bytes, GuestAddress(at)).expect("packet");
        self.tx.add(&[Desc::readable(at, bytes.len() as u32)]);
        self.tx.kick();
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v.sock_{port}"))).expect("listen")
    }

    fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("v.sock")).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        writeln!(stream, "CONNECT {port}").expect("greeting");
        stream
    }

    /// A stream that the guest opened from port 1000 to port `port`.
    fn open_from_guest(&mut self, port: u32) -> (UnixStream, Peer) {
        let listener = self.listen(port);
        let peer = Peer::new(port, 1000);
        self.send(&peer.header(op::REQUEST), &[]);
        self.expect(op::RESPONSE);
        let (stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        (stream, peer)
    }

    fn eventually(&self, what: &str, mut done: impl FnMut(VsockStats) -> bool) {
        for _ in 0..5000 {
            if done(self.device.handle().stats()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("{what} did not happen: {:?}", self.device.handle().stats());
    }
}

/// The guest's side of a stream.
#[derive(Clone, Copy)]
struct Peer {
    host: u32,
    guest: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Peer {
    fn new(host: u32, guest: u32) -> Self {
        Self {
            host,
            guest,
            buf_alloc: 64 << 10,
            fwd_cnt: 0,
        }
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            kind: STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn data(&self, len: usize) -> Header {
        Header {
            len: len as u32,
            ..self.header(op::RW)
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(op::SHUTDOWN)
        }
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while text.last() != Some(&b'\n') && stream.read(&mut byte).expect("a line") == 1 {
        text.push(byte[0]);
    }
    String::from_utf8(text).expect("text")
}

/// Bytes that are not the same twice within 64 KiB or so.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// Clock ticks (10 ms) that the thread called `name` used in 200 ms.
fn ticks_used(name: &str) -> u64 {
    let before = (0..1000).find_map(|_| {
        std::thread::sleep(Duration::from_millis(1));
        ticks(name)
    });
    std::thread::sleep(Duration::from_millis(200));
    ticks(name).expect("it still runs") - before.expect("a thread of that name")
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

#[test]
fn the_socket_file_is_ours_alone() {
    let directory = TempDir::new().expect("directory");
    let options = options(&directory, "_path");
    let path = options.socket.clone();
    let refuse = |options: &VsockOptions| Vsock::new(options).map(|_| ()).expect_err("refused");
    let first = Vsock::new(&options).expect("device");
    assert!(matches!(refuse(&options), VsockError::InUse(_)));
    drop(first);
    assert!(!path.exists(), "it goes with the device");
    drop(UnixListener::bind(&path).expect("stale"));
    assert!(path.exists());
    let second = Vsock::new(&options).expect("a stale socket is replaced");
    std::fs::remove_file(&path).expect("remove");
    std::fs::write(&path, b"not ours").expect("file");
    drop(second);
    assert!(path.exists(), "what is not ours stays");
    assert!(matches!(refuse(&options), VsockError::NotASocket(_)));
    for cid in [0, 1, 2, u32::MAX] {
        let options = VsockOptions { cid, ..options.clone() };
        assert!(matches!(refuse(&options), VsockError::Cid(c) if c == cid));
    }
    let long = Path::new("/").join("x".repeat(97));
    let options = VsockOptions {
        socket: long,
        ..options.clone()
    };
    assert!(matches!(refuse(&options), VsockError::PathTooLong(_)));
    let options = VsockOptions {
        socket: directory.path().join("none/v.sock"),
        ..options
    };
    assert!(matches!(refuse(&options), VsockError::Socket { .. }));
}

#[test]
fn configuration_is_the_address() {
    let directory = TempDir::new().expect("directory");
    let device = Vsock::new(&options(&directory, "_conf")).expect("device");
    let mut config = [0xee; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [42, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(device.queue_sizes().len(), 3);
}
