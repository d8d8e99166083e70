//! The daemon.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use triarch_vhost_protocol::{
    ConfigRange, HEADER, Header, InflightShape, LOG_ALL, NEED_REPLY, PROTOCOL_FEATURES, Payload, REPLY, Request,
    VringState, message, protocol,
};
use triarch_virtio::{block_feature, feature};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::{DaemonBlock, DataPath, Kind, OnDisconnect, PeerOptions};

/// Bytes of its disk.
pub const SIZE: u64 = 1 << 20;

/// Bytes of its record of requests in flight.
pub const RECORD: u64 = 1088;

/// What says that the record is of so many bytes.
pub fn shape(bytes: u64) -> InflightShape {
    InflightShape {
        bytes,
        offset: 0,
        queues: 1,
        size: 64,
    }
}

/// A message with its descriptors.
pub struct Received {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// One connection.
pub struct Conversation {
    pub stream: UnixStream,
    /// Its number, from 0.
    pub number: usize,
    /// What it was given to map.
    pub memory: Option<GuestMemoryMmap>,
    pub files: Vec<File>,
    /// Ring 0: entries, descriptor table, used and available ring.
    pub size: u16,
    pub addresses: [u64; 3],
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub back: Option<OwnedFd>,
    pub enabled: bool,
    /// Where it was told to begin.
    pub base: u16,
    /// How many requests it says it has taken when asked for the ring back.
    pub taken: u16,
    /// The record of requests in flight.
    pub record: Option<File>,
    /// How often it was given an event for completions.
    pub calls: usize,
    /// What the driver agreed to.
    pub features: u64,
    /// Where it logs the pages it writes.
    pub log: Option<File>,
    /// What it rings when it has.
    pub log_event: Option<OwnedFd>,
}

/// What to do instead of the usual answer: `true` when it was done.
pub type Twist = dyn Fn(&mut Conversation, &Received) -> bool + Send + Sync;

/// A daemon on a thread. It ends with its last connection.
pub struct FakeDaemon {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeDaemon {
    /// Listens in `dir`; each message goes to `twist` first.
    pub fn start(dir: &Path, twist: impl Fn(&mut Conversation, &Received) -> bool + Send + Sync + 'static) -> Self {
        let path = dir.join("daemon");
        let listener = UnixListener::bind(&path).expect("bind");
        let stop = Arc::new(AtomicBool::new(false));
        let (ends, twist) = (stop.clone(), Arc::new(twist));
        let thread = std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if ends.load(Ordering::SeqCst) {
                    break;
                }
                Conversation::new(stream.expect("accept"), number).serve(&*twist);
            }
        });
        Self {
            path,
            stop,
            thread: Some(thread),
        }
    }

    pub fn options(&self) -> PeerOptions {
        PeerOptions {
            endpoint: self.path.clone().into(),
            on_disconnect: OnDisconnect::Stall,
            data_path: DataPath::Auto,
        }
    }
}

/// A disk of one queue.
pub fn disk() -> Arc<dyn Kind> {
    Arc::new(DaemonBlock::new(1, 64, false))
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Ends the wait for a connection.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the daemon panicked");
        }
    }
}

impl Conversation {
    fn new(stream: UnixStream, number: usize) -> Self {
        Self {
            stream,
            number,
            memory: None,
            files: Vec::new(),
            size: 0,
            addresses: [0; 3],
            kick: None,
            call: None,
            back: None,
            enabled: false,
            base: 0,
            taken: 0,
            record: None,
            calls: 0,
            features: 0,
            log: None,
            log_event: None,
        }
    }

    fn serve(&mut self, twist: &Twist) {
        while let Some(received) = self.receive() {
            if !twist(self, &received) {
                self.answer(received);
            }
        }
    }

    /// The next message; `None` when the connection has ended.
    fn receive(&mut self) -> Option<Received> {
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header)];
        let got = rustix::net::recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::WAITALL).ok()?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if got.bytes != HEADER {
            return None;
        }
        let Header { request, flags, size } = Header::decode(&header);
        let mut payload = vec![0; size as usize];
        std::io::Read::read_exact(&mut self.stream, &mut payload).ok()?;
        Some(Received {
            request,
            flags,
            payload,
            fds,
        })
    }

    /// Sends bytes as they are; the connection may have ended.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends bytes with descriptors.
    pub fn send_with(&mut self, bytes: &[u8], count: usize) {
        let file = File::open("/dev/null").expect("/dev/null");
        self.send_fds(bytes, &vec![file.as_fd(); count]);
    }

    /// Sends bytes with these descriptors.
    pub fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [IoSlice::new(bytes)];
        let _ = rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL);
    }

    pub fn reply(&mut self, request: u32, payload: &[u8]) {
        self.send(&message(request, REPLY, payload));
    }

    /// As a daemon should.
    pub fn answer(&mut self, received: Received) {
        let Received {
            request,
            flags,
            payload,
            fds,
        } = received;
        let number = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().expect("8 bytes"));
        let is = |wanted: Request| request == wanted as u32;
        if is(Request::GET_FEATURES) {
            let features = PROTOCOL_FEATURES | feature::VERSION_1 | feature::INDIRECT_DESC | block_feature::FLUSH;
            return self.reply(request, &features.encode());
        }
        if is(Request::GET_PROTOCOL_FEATURES) {
            let offered = protocol::COMMON & !(protocol::CONFIGURE_MEM_SLOTS | protocol::INFLIGHT_SHMFD);
            return self.reply(request, &offered.encode());
        }
        if is(Request::GET_QUEUE_NUM) {
            return self.reply(request, &1u64.encode());
        }
        if is(Request::GET_CONFIG) {
            let mut config = ConfigRange::encode_with(0, &[0; 60]);
            config[ConfigRange::BYTES..][..8].copy_from_slice(&(SIZE / 512).to_le_bytes());
            return self.reply(request, &config);
        }
        if is(Request::GET_VRING_BASE) {
            self.enabled = false;
            let number = self.taken.into();
            return self.reply(request, &VringState { index: 0, number }.encode());
        }
        if is(Request::GET_INFLIGHT_FD) {
            let file = rustix::fs::memfd_create(c"record", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
            rustix::fs::ftruncate(&file, RECORD).expect("size");
            let answer = message(request, REPLY, &shape(RECORD).encode());
            return self.send_fds(&answer, &[file.as_fd()]);
        }
        if is(Request::SET_LOG_BASE) {
            self.log = fds.into_iter().next().map(File::from);
            return self.reply(request, &[]);
        }
        if is(Request::SET_FEATURES) {
            self.features = number(0);
        } else if is(Request::SET_LOG_FD) {
            self.log_event = fds.into_iter().next();
        } else if is(Request::SET_INFLIGHT_FD) {
            self.record = fds.into_iter().next().map(File::from);
        } else if is(Request::SET_VRING_BASE) {
            self.base = u16::from_le_bytes([payload[4], payload[5]]);
        } else if is(Request::SET_MEM_TABLE) {
            self.files = fds.into_iter().map(File::from).collect();
            let regions = (0..self.files.len()).map(|i| {
                let at = |field: usize| number(8 + 32 * i + 8 * field);
                let file = self.files[i].try_clone().expect("a file");
                (GuestAddress(at(0)), at(1) as usize, Some(FileOffset::new(file, at(3))))
            });
            self.memory = Some(GuestMemoryMmap::from_ranges_with_files(regions).expect("map"));
        } else if is(Request::SET_VRING_NUM) {
            self.size = payload[4].into();
        } else if is(Request::SET_VRING_ADDR) {
            self.addresses = [number(8), number(16), number(24)];
        } else if is(Request::SET_VRING_KICK) {
            self.kick = fds.into_iter().next();
        } else if is(Request::SET_VRING_CALL) {
            self.call = fds.into_iter().next();
            self.calls += 1;
        } else if is(Request::SET_BACKEND_REQ_FD) {
            self.back = fds.into_iter().next();
        } else if is(Request::SET_VRING_ENABLE) {
            self.enabled = payload[4] == 1;
        }
        if flags & NEED_REPLY != 0 {
            self.reply(request, &0u64.encode());
        }
    }

    fn memory(&self) -> &GuestMemoryMmap {
        self.memory.as_ref().expect("memory")
    }

    /// How many requests were offered so far.
    pub fn offered(&self) -> u16 {
        self.memory()
            .read_obj(GuestAddress(self.addresses[2] + 2))
            .expect("index")
    }

    /// The head of offered request `n`.
    pub fn head(&self, n: u16) -> u16 {
        let at = self.addresses[2] + 4 + 2 * u64::from(n % self.size);
        self.memory().read_obj(GuestAddress(at)).expect("entry")
    }

    /// Writes used entry `n`.
    pub fn put_used(&self, n: u16, head: u32) {
        let at = self.addresses[1] + 4 + 8 * u64::from(n % self.size);
        self.memory().write_obj([head, 1], GuestAddress(at)).expect("entry");
    }

    /// Lets the driver see `n` used entries.
    pub fn set_used(&self, n: u16) {
        let at = GuestAddress(self.addresses[1] + 2);
        self.memory().store(n, at, Ordering::Release).expect("index");
        rustix::io::write(self.call.as_ref().expect("call"), &1u64.to_ne_bytes()).expect("call");
    }

    /// Says that it can keep a record, and with that work on the guest's rings, whatever else it offers.
    pub fn offer_record(&mut self, received: &Received) -> bool {
        let Received { request, .. } = *received;
        if request == Request::GET_FEATURES as u32 {
            let rings = feature::INDIRECT_DESC | feature::EVENT_IDX | LOG_ALL;
            let features = PROTOCOL_FEATURES | feature::VERSION_1 | rings | block_feature::FLUSH;
            self.reply(request, &features.encode());
        } else if request == Request::GET_PROTOCOL_FEATURES as u32 {
            let offered = protocol::COMMON & !protocol::CONFIGURE_MEM_SLOTS;
            self.reply(request, &offered.encode());
        } else {
            return false;
        }
        true
    }

    /// Notes in the record that it has a request, the `counter`th.
    pub fn note(&self, head: u16, counter: u64) {
        let at = 16 + 16 * u64::from(head);
        let record = self.record.as_ref().expect("a record");
        record.write_all_at(&1u16.to_le_bytes(), 8).expect("version");
        record.write_all_at(&64u16.to_le_bytes(), 10).expect("entries");
        record.write_all_at(&[1], at).expect("entry");
        record.write_all_at(&counter.to_le_bytes(), at + 8).expect("entry");
    }

    /// Strikes it out, when `used` requests are done.
    pub fn strike(&self, head: u16, used: u16) {
        let record = self.record.as_ref().expect("a record");
        record.write_all_at(&[0], 16 + 16 * u64::from(head)).expect("entry");
        record.write_all_at(&used.to_le_bytes(), 14).expect("index");
    }

    /// The requests that the record tells of, and their counters, by heads.
    pub fn noted(&self) -> Vec<(u16, u64)> {
        let mut bytes = vec![0; RECORD as usize];
        let record = self.record.as_ref().expect("a record");
        record.read_exact_at(&mut bytes, 0).expect("record");
        let entry = |head: u16| &bytes[16 + 16 * usize::from(head)..][..16];
        let counter = |head| u64::from_le_bytes(entry(head)[8..].try_into().expect("8 bytes"));
        (0..64)
            .filter(|head| entry(*head)[0] != 0)
            .map(|head| (head, counter(head)))
            .collect()
    }

    /// Waits up to five seconds for the `n`th request.
    pub fn wait_offered(&self, n: u16) {
        for _ in 0..5000 {
            if self.offered() >= n {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("{} requests came, not {n}", self.offered());
    }
}

/// A daemon that connects to `path` again and again, until it is dropped. Each message goes to `twist` first.
pub struct Visitor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Visitor {
    pub fn start(path: PathBuf, twist: impl Fn(&mut Conversation, &Received) -> bool + Send + Sync + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = stop.clone();
        let thread = std::thread::spawn(move || {
            for number in 0.. {
                // Nobody listens, or listens any more.
                while !ends.load(Ordering::SeqCst) {
                    if let Ok(stream) = UnixStream::connect(&path) {
                        Conversation::new(stream, number).serve(&twist);
                        break;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                if ends.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Visitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the daemon panicked");
        }
    }
}
