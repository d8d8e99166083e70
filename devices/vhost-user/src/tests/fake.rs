//! The daemon.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use triarch_virtio::{block_feature, feature};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::message::{self, HEADER, NEED_REPLY, PROTOCOL_FEATURES, REPLY, Request, protocol};
use crate::{DaemonBlock, Kind, OnDisconnect, PeerOptions};

/// Bytes of its disk.
pub const SIZE: u64 = 1 << 20;

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
            socket: self.path.clone(),
            on_disconnect: OnDisconnect::Stall,
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
        let [request, flags, size] = message::decode(&header);
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
        let fds = vec![file.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(bytes)];
        let _ = rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL);
    }

    pub fn reply(&mut self, request: u32, payload: &[u8]) {
        self.send(&message::encode(request, REPLY, payload));
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
            return self.reply(request, &message::numbers(&[features]));
        }
        if is(Request::GET_PROTOCOL_FEATURES) {
            let offered = protocol::ALL & !protocol::CONFIGURE_MEM_SLOTS;
            return self.reply(request, &message::numbers(&[offered]));
        }
        if is(Request::GET_QUEUE_NUM) {
            return self.reply(request, &message::numbers(&[1]));
        }
        if is(Request::GET_CONFIG) {
            let mut config = message::config(0, &[0; 60]);
            config[message::CONFIG_HEAD..][..8].copy_from_slice(&(SIZE / 512).to_le_bytes());
            return self.reply(request, &config);
        }
        if is(Request::GET_VRING_BASE) {
            self.enabled = false;
            return self.reply(request, &message::ring_state(0, 0));
        }
        if is(Request::SET_MEM_TABLE) {
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
        } else if is(Request::SET_BACKEND_REQ_FD) {
            self.back = fds.into_iter().next();
        } else if is(Request::SET_VRING_ENABLE) {
            self.enabled = payload[4] == 1;
        }
        if flags & NEED_REPLY != 0 {
            self.reply(request, &message::numbers(&[0]));
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
