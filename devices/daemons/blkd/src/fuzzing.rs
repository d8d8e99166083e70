//! A front end that says anything, to a back end with a disk.
//!
//! Unit tests call it with a fixed sequence of inputs, `cargo xtask fuzz` with those that libFuzzer finds.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use triarch_block::{Backend, Disk, DiskOptions};
use triarch_daemon::backend::{Session, borrow};
use triarch_device_core::NoSandbox;
use triarch_virtio::Block;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of the guest's memory, and of the disk.
const MEMORY: u64 = 256 << 10;
const DISK: u64 = 64 << 10;
/// Where the front end sees that memory.
const USER: u64 = 0x7000_0000_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const RING: u32 = 8;

/// The first byte: what a sound front end says before the rest.
mod sound {
    /// Features, memory and the first ring.
    pub const BEGINNING: u8 = 1;
    /// A read of the first sector in that ring.
    pub const REQUEST: u8 = 1 << 1;
    /// With EVENT_IDX and INDIRECT_DESC.
    pub const FEATURES: u8 = 1 << 2;
    /// With an inflight region.
    pub const INFLIGHT: u8 = 1 << 3;
    /// With a log of written pages.
    pub const LOG: u8 = 1 << 4;
    /// Memory comes region by region.
    pub const SLOTS: u8 = 1 << 5;
    /// Its memory could be cut short.
    pub const UNSEALED: u8 = 1 << 6;
}

/// Bytes of the input, from the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// So many bytes as the next one says, or as there are.
    fn piece(&mut self) -> &'a [u8] {
        let wanted = self.byte().unwrap_or(0).into();
        let (piece, rest) = self.0.split_at(self.0.len().min(wanted));
        self.0 = rest;
        piece
    }
}

/// What a front end has.
struct Front {
    socket: UnixStream,
    memory: File,
    kick: EventFd,
    call: EventFd,
    /// For requests of the back end.
    back: UnixStream,
    null: File,
}

impl Front {
    fn new(socket: UnixStream, sealed: bool) -> std::io::Result<(Self, UnixStream)> {
        let (back, ours) = UnixStream::pair()?;
        let event = || EventFd::new(EFD_NONBLOCK);
        let front = Self {
            socket,
            memory: memfd(MEMORY, sealed)?,
            kick: event()?,
            call: event()?,
            back,
            null: File::open("/dev/null")?,
        };
        Ok((front, ours))
    }

    /// A descriptor, by a number.
    fn fd(&self, number: u8) -> BorrowedFd<'_> {
        match number % 5 {
            0 => self.memory.as_fd(),
            1 => borrow(&self.kick),
            2 => borrow(&self.call),
            3 => self.back.as_fd(),
            _ => self.null.as_fd(),
        }
    }

    /// Sends bytes with descriptors. A back end that does not read them all is none to go on with.
    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let with = !fds.is_empty() && control.push(SendAncillaryMessage::ScmRights(fds));
        assert_eq!(with, !fds.is_empty());
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags);
    }

    fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(&message(request, 1, payload), fds);
    }

    /// What a sound front end says until its first ring runs.
    fn begin(&self, how: u8) {
        let has = |bit| how & bit != 0;
        let event_idx_and_indirect = if has(sound::FEATURES) { 3 << 28 } else { 0 };
        let log = if has(sound::LOG) { 1 << 26 } else { 0 };
        self.tell(2, &words(&[1 << 32 | 1 << 30 | event_idx_and_indirect | log]), &[]);
        // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS, STATUS.
        let protocol = [0, 1, 3, 5, 9, 12, 13, 15, 16]
            .iter()
            .fold(0, |all, bit| all | 1u64 << bit);
        self.tell(16, &words(&[protocol]), &[]);
        self.tell(21, &[], &[self.back.as_fd()]);
        let region = [0, MEMORY, USER, 0];
        match has(sound::SLOTS) {
            true => self.tell(37, &words(&[&[0], &region[..]].concat()), &[self.memory.as_fd()]),
            false => self.tell(5, &words(&[&[1], &region[..]].concat()), &[self.memory.as_fd()]),
        }
        if has(sound::LOG) {
            // Behind what the ring and its buffers take.
            self.tell(6, &words(&[4096, 128 << 10]), &[self.memory.as_fd()]);
        }
        if has(sound::INFLIGHT) {
            let mut shape = words(&[0, 0]);
            shape.extend([2u16, RING as u16, 0, 0].map(u16::to_le_bytes).concat());
            self.tell(31, &shape, &[]);
        }
        self.tell(8, &ring(0, RING), &[]);
        self.tell(10, &ring(0, 0), &[]);
        let addresses = words(&[USER + DESCRIPTORS, USER + USED, USER + AVAILABLE, 0]);
        self.tell(9, &[ring(0, 0), addresses].concat(), &[]);
        self.tell(13, &words(&[0]), &[borrow(&self.call)]);
        self.tell(12, &words(&[0]), &[borrow(&self.kick)]);
        self.tell(18, &ring(0, 1), &[]);
    }

    /// A read of the first sector.
    fn offer(&self) -> std::io::Result<()> {
        let descriptors = [
            (0x10000u64, 16u32, 1u16, 1u16),
            (0x11000, 512, 3, 2),
            (0x12000, 1, 2, 0),
        ];
        for (n, (at, len, flags, next)) in (0..).zip(descriptors) {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend([flags, next].map(u16::to_le_bytes).concat());
            self.memory.write_all_at(&bytes, DESCRIPTORS + 16 * n)?;
        }
        // Its header is zeroes, as is its place in the ring.
        self.memory.write_all_at(&1u16.to_le_bytes(), AVAILABLE + 2)
    }

    /// Carries out one step of the input: changes memory, sends a message, or any bytes.
    fn step(&self, kind: u8, input: &mut Input<'_>) -> std::io::Result<()> {
        let fds = |count: u8, first: u8| -> Vec<_> {
            let numbers = (0..count % 17).map(|n| first.wrapping_add(n));
            numbers.map(|number| self.fd(number)).collect()
        };
        let mut next = || input.byte().unwrap_or(0);
        match kind % 4 {
            0 => {
                let at = u64::from(next()) << 10 | u64::from(next()) << 2;
                let piece = input.piece();
                self.memory.write_all_at(piece, at.min(MEMORY - 256))
            }
            1 => {
                let (request, flags, count, first) = (next(), next(), next(), next());
                let bytes = message(u32::from(request % 48), u32::from(flags ^ 1), input.piece());
                self.send(&bytes, &fds(count, first));
                Ok(())
            }
            2 => {
                // The same with what messages are about: numbers of 64 bits that mean something.
                let (request, count, first, values) = (next(), next(), next(), next());
                let values: Vec<u64> = (0..values % 6).map(|_| meaning(next(), next())).collect();
                self.send(
                    &message(u32::from(request % 48), 1, &words(&values)),
                    &fds(count % 3, first),
                );
                Ok(())
            }
            _ => {
                let (count, first) = (next(), next());
                let piece = input.piece();
                if !piece.is_empty() {
                    self.send(piece, &fds(count, first));
                }
                Ok(())
            }
        }
    }
}

/// A number that means something to a back end.
fn meaning(kind: u8, value: u8) -> u64 {
    let small = u64::from(value);
    match kind % 9 {
        0 => small,
        1 => USER + (small << 10),
        2 => small << 12,
        3 => small << 32,
        4 => 1 << (small % 64),
        5 => u64::MAX - small,
        6 => MEMORY,
        // Whole pages from the end.
        8 => (small << 12).wrapping_neg(),
        _ => 1 << 32 | 1 << 30 | small << 24,
    }
}

fn memfd(size: u64, sealed: bool) -> std::io::Result<File> {
    let file = rustix::fs::memfd_create("fuzzing", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, size)?;
    if sealed {
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK)?;
    }
    Ok(file.into())
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, flags, payload.len() as u32].map(u32::to_le_bytes).concat();
    [&head, payload].concat()
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn ring(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_le_bytes).concat()
}

/// A front end's messages and memory. Whatever they are, the session ends when the front end does and leaves the disk idle, and
/// the next front end is served.
///
/// # Panics
/// It is not so.
pub fn vhost_user(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else {
        return;
    };
    let options = DiskOptions {
        backend: Backend::Sync,
        ..DiskOptions::new("fuzzing")
    };
    let image = memfd(DISK, true).expect("an image");
    let disk = Disk::from_file(image, &options).expect("a disk");
    let mut device = Block::new("fuzzing", disk, 2, 64).expect("a device");
    let handle = device.handle();
    let before = handle.disk().size();
    let says = |front: &Front| {
        // What is in memory is there before a message is read.
        if how & sound::REQUEST != 0 {
            front.offer()?;
        }
        if how & sound::BEGINNING != 0 {
            front.begin(*how);
        }
        let mut input = Input(rest);
        while let Some(kind) = input.byte() {
            front.step(kind, &mut input)?;
        }
        Ok(())
    };
    serve(&mut device, says, how & sound::UNSEALED == 0);
    assert_eq!(handle.counters().in_flight, 0, "operations are left behind");
    assert_eq!(handle.disk().size(), before);
    let asks = |front: &Front| {
        front.tell(1, &[], &[]);
        Ok(())
    };
    let answer = serve(&mut device, asks, true);
    assert_eq!(answer.len(), 20, "GET_FEATURES is not answered any more");
}

/// Serves a front end that says something and leaves; returns what it was answered.
fn serve(device: &mut Block, says: impl FnOnce(&Front) -> std::io::Result<()>, sealed: bool) -> Vec<u8> {
    let (socket, theirs) = UnixStream::pair().expect("sockets");
    theirs.set_nonblocking(true).expect("a socket that does not block");
    let (front, _ours) = Front::new(socket, sealed).expect("a front end");
    says(&front).expect("memory");
    front.socket.shutdown(Shutdown::Write).expect("the end");
    let stop = EventFd::new(EFD_NONBLOCK).expect("an event");
    Session::new(OwnedFd::from(theirs), device, Arc::new(NoSandbox)).run(borrow(&stop));
    front
        .socket
        .set_nonblocking(true)
        .expect("a socket that does not block");
    let mut answers = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = std::io::Read::read(&mut &front.socket, &mut buffer) {
        answers.write_all(&buffer[..count]).expect("memory");
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs that get far.
    fn seeds() -> Vec<Vec<u8>> {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fuzz/seeds/vhost_user");
        let mut paths: Vec<_> = std::fs::read_dir(dir)
            .expect("the seeds")
            .map(|entry| entry.expect("a seed").path())
            .collect();
        paths.sort();
        paths.iter().map(|path| std::fs::read(path).expect("a seed")).collect()
    }

    /// Gives `target` the seeds, changed in a few places, always the same (xorshift).
    fn mutate(target: fn(&[u8]), rounds: usize) {
        let seeds = seeds();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut below = |limit: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % limit.max(1) as u64).expect("small")
        };
        for round in 0..rounds {
            let mut input = seeds[round % seeds.len()].clone();
            for _ in 0..below(6) {
                let at = below(input.len());
                match below(6) {
                    0 => input[at] = below(256) as u8,
                    // A step or two of any kind.
                    4 | 5 => input.extend((0..12).map(|_| below(256) as u8)),
                    1 => drop(input.drain(at..(at + below(9)).min(input.len()))),
                    2 => {
                        let piece = input[at..].to_vec();
                        let to = below(input.len());
                        input.splice(to..to, piece);
                    }
                    _ => input.truncate(at + 1),
                }
                if input.is_empty() {
                    input.push(0);
                }
            }
            target(&input);
        }
    }

    #[test]
    fn front_ends_of_a_fixed_sequence_are_survived() {
        mutate(vhost_user, 1000);
    }

    #[test]
    fn the_seeds_get_far() {
        // A read that is carried out, however the memory came.
        for how in [
            3,
            3 | sound::FEATURES,
            3 | sound::SLOTS,
            3 | sound::LOG,
            3 | sound::INFLIGHT,
            0x7f,
        ] {
            let disk = Disk::from_file(memfd(DISK, true).expect("image"), &DiskOptions::new("fuzzing")).expect("disk");
            let mut device = Block::new("fuzzing", disk, 2, 64).expect("device");
            serve(
                &mut device,
                |front| {
                    front.offer()?;
                    front.begin(how);
                    Ok(())
                },
                how & sound::UNSEALED == 0,
            );
            assert_eq!(device.handle().counters().reads.count, 1, "{how:#x}");
        }
    }

    #[test]
    fn what_must_not_be_is_noticed() {
        let caught = std::panic::catch_unwind(|| mutate(|data| assert!(data.len() < 60, "long"), 1000));
        assert!(caught.is_err());
    }
}
