//! A guest and its front end.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use triarch_virtio::mock::{Desc, FakeDriver};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

const SIZE: u16 = 64;
const TX_AT: u64 = 0x20_0000;
const RX_AT: u64 = 0x40_0000;
const BUFFER: u32 = 2048;
const HEADER: usize = 12;
/// VERSION_1, MRG_RXBUF, EVENT_IDX.
const FEATURES: u64 = 1 << 32 | 1 << 15 | 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const SEND_RARP: u32 = 19;

/// The address of guest `n`.
pub fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

/// A guest with one pair of queues.
pub struct Guest {
    mac: [u8; 6],
    rx: FakeDriver,
    tx: FakeDriver,
    front: Option<Frontend>,
    sent: u64,
    used: [u16; 2],
    file: Option<File>,
}

impl Guest {
    pub fn new(n: u8) -> Self {
        Self::with(n, FakeDriver::sharing(SIZE, true), None)
    }

    /// One whose memory is a file that can be cut short.
    pub fn unsealed(n: u8) -> Self {
        let rx = FakeDriver::new(SIZE, true);
        let file = tempfile::tempfile().expect("file");
        file.set_len(triarch_virtio::mock::MEMORY).expect("size");
        let offset = FileOffset::new(file.try_clone().expect("dup"), 0);
        let ranges = [(GuestAddress(0), triarch_virtio::mock::MEMORY as usize, Some(offset))];
        let memory = triarch_memory::GuestMemory::from_ranges_with_files(ranges).expect("memory");
        rx.memory.lock().expect("lock").replace(memory);
        Self::with(n, rx, Some(file))
    }

    fn with(n: u8, rx: FakeDriver, file: Option<File>) -> Self {
        let tx = FakeDriver::beside(&rx, 1);
        let mut guest = Self {
            mac: mac(n),
            rx,
            tx,
            front: None,
            sent: 0,
            used: [0; 2],
            file,
        };
        for n in 0..u64::from(SIZE) {
            guest.rx.add(&[Desc::writable(RX_AT + n * u64::from(BUFFER), BUFFER)]);
        }
        guest
    }

    pub fn connect(&mut self, path: &Path) {
        self.attach(UnixStream::connect(path).expect("connect"));
    }

    /// Does what a front end does on a new connection. Rings go on where the used ring says.
    pub fn attach(&mut self, stream: UnixStream) {
        let mut front = Frontend::from_stream(stream, 2);
        let offered = front.get_features().expect("features");
        assert_eq!(offered & (FEATURES | PROTOCOL_FEATURES), FEATURES | PROTOCOL_FEATURES);
        let protocol = front.get_protocol_features().expect("protocol features");
        assert!(protocol.contains(Protocol::RARP | Protocol::MQ | Protocol::LOG_SHMFD | Protocol::REPLY_ACK));
        front
            .set_protocol_features(Protocol::RARP | Protocol::MQ | Protocol::CONFIG)
            .expect("protocol features");
        assert!(front.get_queue_num().expect("queues") >= 1);
        front.set_owner().expect("owner");
        front.set_features(FEATURES | PROTOCOL_FEATURES).expect("features");
        let regions: Vec<_> = {
            let ram = self.rx.ram();
            let region = |region: &triarch_memory::GuestRegion| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.start_addr().0 + (1 << 40),
                mmap_offset: region.file_offset().expect("shared").start(),
                mmap_handle: region.file_offset().expect("shared").file().as_raw_fd(),
            };
            ram.iter().map(region).collect()
        };
        front.set_mem_table(&regions).expect("memory");
        for (index, driver) in [&self.rx, &self.tx].into_iter().enumerate() {
            let base = (1 << 40) + index as u64 * 0x10_0000;
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: base + 0x1000,
                avail_ring_addr: base + 0x2000,
                used_ring_addr: base + 0x3000,
                log_addr: None,
            };
            front.set_vring_num(index, SIZE).expect("size");
            front.set_vring_addr(index, &config).expect("addresses");
            let ram = driver.ram();
            let used: u16 = ram
                .read_obj(GuestAddress(config.used_ring_addr - (1 << 40) + 2))
                .expect("used index");
            front.set_vring_base(index, used).expect("base");
            front
                .set_vring_call(index, &EventFd::new(0).expect("event"))
                .expect("call");
            front.set_vring_kick(index, &driver.kick).expect("kick");
            front.set_vring_enable(index, true).expect("enable");
        }
        // What is answered comes after everything before it was done.
        front.get_queue_num().expect("queues");
        self.front = Some(front);
    }

    pub fn disconnect(&mut self) {
        self.front = None;
    }

    /// SEND_RARP, which the crate does not know.
    pub fn send_rarp(&self, mac: &[u8; 6]) {
        let front = self.front.as_ref().expect("connected");
        let mut message = [SEND_RARP, 1, 8]
            .iter()
            .flat_map(|n: &u32| n.to_le_bytes())
            .collect::<Vec<_>>();
        message.extend(mac.iter().chain(&[0, 0]));
        let socket = std::mem::ManuallyDrop::new(duplicate(front.as_raw_fd()));
        rustix::io::write(&*socket, &message).expect("send");
    }

    pub fn send(&mut self, dst: &[u8; 6], payload: &[u8]) {
        let packet = [&[0; HEADER], &dst[..], &self.mac, &[0x88, 0xb5], payload].concat();
        let at = TX_AT + (self.sent % 32) * 0x1_0000;
        self.sent += 1;
        self.tx.ram().write_slice(&packet, GuestAddress(at)).expect("write");
        self.tx.add(&[Desc::readable(at, packet.len() as u32)]);
        if self.tx.wants_kick() {
            self.tx.kick();
        }
        self.used[1] = self.used[1].wrapping_add(1);
    }

    /// The next frame within `time`.
    pub fn receive_raw(&mut self, time: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + time;
        loop {
            if let Some((head, len)) = self.rx.used() {
                let mut packet = vec![0; len as usize];
                let at = RX_AT + u64::from(head) * u64::from(BUFFER);
                self.rx.ram().read_slice(&mut packet, GuestAddress(at)).expect("read");
                assert_eq!(packet[10..12], [1, 0]);
                self.rx.offer(head);
                return Some(packet.split_off(HEADER));
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The next frame of the tests' protocol: sender and payload.
    pub fn receive(&mut self, time: Duration) -> Option<([u8; 6], Vec<u8>)> {
        loop {
            let frame = self.receive_raw(time)?;
            if frame[12..14] == [0x88, 0xb5] {
                return Some((frame[6..12].try_into().expect("six"), frame[14..].to_vec()));
            }
        }
    }

    /// Takes the memory away under the daemon's feet.
    pub fn cut_memory(&self) {
        self.file.as_ref().expect("a file").set_len(0).expect("cut");
    }
}

fn duplicate(fd: i32) -> Arc<File> {
    // SAFETY: the descriptor is open, and the caller forgets the file without closing it.
    #[allow(unsafe_code)]
    let file = unsafe { File::from_raw_fd(fd) };
    Arc::new(file)
}
