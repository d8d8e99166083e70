//! A front end that says what it is told to.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use triarch_block::{Disk, DiskOptions};
use triarch_daemon::backend::{Session, SessionError, SessionStats, borrow};
use triarch_device_core::NoSandbox;
use triarch_virtio::{Block, BlockHandle};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of the guest's memory.
pub const MEMORY: u64 = 1 << 20;
/// Bytes of the disk.
pub const DISK: u64 = 1 << 20;
/// Queues of the device.
pub const QUEUES: u16 = 2;

/// A back end in a thread of its own, and the socket that leads to it.
pub struct BackEnd {
    /// The disk.
    pub handle: BlockHandle,
    socket: Option<UnixStream>,
    thread: Option<JoinHandle<(SessionError, SessionStats)>>,
}

impl BackEnd {
    /// One for a disk with this image.
    pub fn start(image: &std::path::Path) -> Self {
        let disk = Disk::open(&DiskOptions::new(image)).expect("disk");
        let (socket, theirs) = UnixStream::pair().expect("sockets");
        theirs.set_nonblocking(true).expect("non-blocking");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        let mut block = Block::new("test", disk, QUEUES, 64).expect("device");
        let handle = block.handle();
        let thread = std::thread::spawn(move || {
            let stop = EventFd::new(EFD_NONBLOCK).expect("event");
            let mut session = Session::new(OwnedFd::from(theirs), &mut block, Arc::new(NoSandbox));
            let end = session.run(borrow(&stop));
            (end, session.stats())
        });
        Self {
            handle,
            socket: Some(socket),
            thread: Some(thread),
        }
    }

    /// Sends bytes with descriptors; false if nobody takes them.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let socket = self.socket.as_ref().expect("connected");
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok()
    }

    /// Sends a request that is not answered.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(self.send(&message(request, 1, payload), fds), "request {request}");
    }

    /// Sends one and returns the answer's payload.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.tell(request, payload, &[]);
        let mut socket = self.socket.as_ref().expect("connected");
        let mut header = [0; 12];
        socket.read_exact(&mut header).expect("an answer");
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((word(0), word(4)), (request, 5));
        let mut payload = vec![0; word(8) as usize];
        socket.read_exact(&mut payload).expect("the rest");
        payload
    }

    /// Closes the connection and returns how the session ended.
    pub fn end(mut self) -> (SessionError, SessionStats) {
        drop(self.socket.take());
        self.thread.take().expect("it runs").join().expect("no panic")
    }
}

/// A message.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, flags, payload.len() as u32];
    head.iter()
        .flat_map(|v| v.to_le_bytes())
        .chain(payload.iter().copied())
        .collect()
}

/// Numbers of 64 bits.
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A number of a ring, and a number for it.
pub fn ring(index: u32, number: u32) -> Vec<u8> {
    [index, number].iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The guest's memory, sealed if it is to be.
pub fn memory(sealed: bool) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("guest", flags).expect("memfd");
    rustix::fs::ftruncate(&file, MEMORY).expect("size");
    if sealed {
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).expect("seal");
    }
    file.into()
}

/// An image of pseudo-random content.
pub fn image() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("file");
    let content: Vec<u8> = (0..DISK).map(|n| (n / 512 * 31 + n) as u8).collect();
    file.write_all(&content).expect("write");
    file
}

/// Descriptors as they are sent.
pub fn fds<'a, const N: usize>(fds: [&'a dyn AsFd; N]) -> [BorrowedFd<'a>; N] {
    fds.map(AsFd::as_fd)
}
