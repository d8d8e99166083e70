//! A front end that has written pages logged.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use triarch_device_core::{Event, NoSandbox};
use triarch_vhost_protocol::{
    HEADER, Header, LOG_ALL, LogArea, NEED_REPLY, PROTOCOL_FEATURES, Payload, Region, Request, message, protocol,
};
use triarch_virtio::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Served, Session, SessionError, borrow};

const MEMORY: u64 = 1 << 20;
/// Where the device writes when a driver comes: in page 5.
const WRITTEN: u64 = 0x5678;

/// A device without queues.
struct Pen;

impl VirtioDevice for Pen {
    fn id(&self) -> DeviceId {
        DeviceId::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        triarch_virtio::feature::VERSION_1
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        let memory = context.memory.memory();
        memory.write_obj(7u8, GuestAddress(WRITTEN)).expect("memory");
        Ok(())
    }

    fn start_queue(&mut self, _queue: VirtQueue) -> Result<(), ActivateError> {
        Err(ActivateError::Driver("it has none"))
    }

    fn stop_queue(&mut self, _index: u16) -> Option<VirtQueue> {
        None
    }

    fn reset(&mut self) {}
}

impl Served for Pen {}

/// The front end of one, which gave it its memory.
struct Front {
    socket: UnixStream,
    log: File,
    thread: JoinHandle<SessionError>,
}

impl Front {
    fn new(features: u64) -> Self {
        let (socket, theirs) = UnixStream::pair().expect("sockets");
        theirs.set_nonblocking(true).expect("non-blocking");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        let thread = std::thread::spawn(move || {
            let stop = EventFd::new(EFD_NONBLOCK).expect("event");
            Session::new(OwnedFd::from(theirs), &mut Pen, Arc::new(NoSandbox)).run(borrow(&stop))
        });
        let log = file(4096);
        let front = Self { socket, log, thread };
        front.tell(Request::SET_PROTOCOL_FEATURES, &features.encode(), &[], 0);
        let region = Region {
            gpa: 0,
            size: MEMORY,
            user: 0,
            offset: 0,
        };
        let memory = file(MEMORY);
        front.tell(Request::SET_MEM_TABLE, &vec![region].encode(), &[memory.as_fd()], 0);
        front
    }

    fn tell(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>], flags: u32) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let bytes = message(request as u32, flags, payload);
        let sent = rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// The number it answers.
    fn answer(&self, request: Request) -> u64 {
        let mut answer = [0; HEADER + 8];
        (&self.socket).read_exact(&mut answer).expect("an answer");
        let (head, number) = answer.split_first_chunk().expect("a header");
        let head = Header::decode(head);
        assert_eq!((head.request, head.size), (request as u32, 8));
        u64::from_le_bytes(number.try_into().expect("8 bytes"))
    }

    /// Tells, and hears whether it worked.
    fn confirmed(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.tell(request, payload, fds, NEED_REPLY);
        self.answer(request) == 0
    }

    fn log(&self) {
        let area = LogArea { bytes: 4096, offset: 0 };
        self.tell(Request::SET_LOG_BASE, &area.encode(), &[self.log.as_fd()], 0);
        assert_eq!(self.answer(Request::SET_LOG_BASE), 0);
    }

    /// The first pages' bits.
    fn pages(&self) -> u8 {
        let mut byte = [0];
        self.log.read_exact_at(&mut byte, 0).expect("the log");
        byte[0]
    }

    fn end(self) -> SessionError {
        drop(self.socket);
        self.thread.join().expect("no panic")
    }
}

fn file(size: u64) -> File {
    let file = rustix::fs::memfd_create(c"shared", MemfdFlags::ALLOW_SEALING).expect("memfd");
    rustix::fs::ftruncate(&file, size).expect("size");
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).expect("seal");
    file.into()
}

fn rings_within(event: &Event, ms: u64) -> bool {
    let time = Timespec::try_from(Duration::from_millis(ms)).expect("a time");
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&time)).expect("poll") == 1 && event.clear()
}

#[test]
fn marked_pages_ring_the_logs_event_once() {
    let front = Front::new(protocol::COMMON);
    front.log();
    let event = Event::new().expect("an event");
    assert!(front.confirmed(Request::SET_LOG_FD, &[], &[event.as_fd()]));
    let features = PROTOCOL_FEATURES | triarch_virtio::feature::VERSION_1;
    assert!(front.confirmed(Request::SET_FEATURES, &features.encode(), &[]));
    assert!(!rings_within(&event, 150), "nothing is logged yet");
    // The driver comes, and the device writes.
    assert!(front.confirmed(Request::RESET_DEVICE, &[], &[]));
    assert!(front.confirmed(Request::SET_FEATURES, &(features | LOG_ALL).encode(), &[]));
    assert!(rings_within(&event, 10_000));
    assert_eq!(front.pages(), 1 << (WRITTEN / 4096));
    assert!(!rings_within(&event, 150), "nothing was written since");
    front.end();
}

#[test]
fn an_event_that_cannot_be_is_refused() {
    let front = Front::new(protocol::COMMON);
    assert!(!front.confirmed(Request::SET_LOG_FD, &[], &[]), "there is none");
    let event = Event::new().expect("an event");
    let two = [event.as_fd(), event.as_fd()];
    assert!(!front.confirmed(Request::SET_LOG_FD, &[], &two), "which one?");
    front.end();
    let without = Front::new(protocol::COMMON & !protocol::LOG_SHMFD);
    assert!(!without.confirmed(Request::SET_LOG_FD, &[], &[event.as_fd()]));
    without.end();
}
