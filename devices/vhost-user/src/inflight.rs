//! The record of requests in flight (protocol feature INFLIGHT_SHMFD): memory in which daemons note which requests of the guest's rings
//! they have, for the daemon after them.
//!
//! A daemon makes the first one. It is copied into a file of the VMM's, which nobody can cut short, and daemons get that one: whoever maps
//! it cannot be ended by a daemon. The VMM reads and writes the file, it never maps it, and it believes nothing it finds there.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use triarch_vhost_protocol::{InflightShape, Payload, Reader};

use crate::LinkError;

/// Bytes of a queue's part before its entries, and of an entry.
const HEAD: usize = 16;
const ENTRY: usize = 16;
/// Version of a part that was begun.
const VERSION: u16 = 1;
/// More than this between the parts of two queues is no layout anybody uses (bytes).
const SLACK: u64 = 4096;
/// Bytes copied at once.
const CHUNK: usize = 64 << 10;

/// Why a queue's record is of no use.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum RecordError {
    /// It was not written as the protocol describes.
    #[error("the daemon's record of requests in flight has version {0}")]
    Version(u16),
    /// It contradicts itself or the queue.
    #[error("the daemon's record of requests in flight is wrong: {0}")]
    Wrong(&'static str),
    /// The file could not be read or written.
    #[error("the record of requests in flight cannot be accessed: {0}")]
    Access(std::io::ErrorKind),
}

/// The record of one device, and where in it each queue's part is.
pub(crate) struct Inflight {
    file: File,
    queues: u16,
    queue_size: u16,
    /// Bytes from one queue's part to the next.
    stride: u64,
}

impl Inflight {
    /// Payload of GET_INFLIGHT_FD for queues of at most `queue_size` entries.
    pub(crate) fn question(queues: u16, queue_size: u16) -> Vec<u8> {
        shape(0, queues, queue_size).encode()
    }

    /// Copies the record that a daemon made, after it answered `payload`.
    pub(crate) fn adopt(payload: &[u8], theirs: OwnedFd, queues: u16, queue_size: u16) -> Result<Self, LinkError> {
        let nonsense = |text: &str| LinkError::Nonsense(format!("its record of requests in flight {text}"));
        let described = InflightShape::read(&mut Reader::new(payload));
        let InflightShape {
            bytes: size, offset, ..
        } = described.ok_or_else(|| nonsense("is not described"))?;
        let least = HEAD as u64 + ENTRY as u64 * u64::from(queue_size);
        let stride = size / u64::from(queues.max(1));
        if queues == 0 || !size.is_multiple_of(u64::from(queues)) || !(least..=least + SLACK).contains(&stride) {
            return Err(LinkError::Nonsense(format!(
                "its record of requests in flight has {size} bytes for {queues} queues of {queue_size}"
            )));
        }
        // Only memory files have seals: reading what else it might be could take for ever.
        rustix::fs::fcntl_get_seals(&theirs).map_err(|_| nonsense("is no memory"))?;
        let host = LinkError::host("a record of requests in flight");
        let file = make(size).map_err(&host)?;
        let (theirs, mut buffer) = (File::from(theirs), vec![0; CHUNK]);
        let mut done = 0;
        while done < size {
            let chunk = &mut buffer[..CHUNK.min((size - done) as usize)];
            let from = offset.checked_add(done).ok_or_else(|| nonsense("lies nowhere"))?;
            theirs
                .read_exact_at(chunk, from)
                .map_err(|_| nonsense("is shorter than it says"))?;
            file.write_all_at(chunk, done).map_err(&host)?;
            done += chunk.len() as u64;
        }
        Ok(Self {
            file,
            queues,
            queue_size,
            stride,
        })
    }

    /// Payload of SET_INFLIGHT_FD.
    pub(crate) fn payload(&self) -> Vec<u8> {
        shape(self.stride * u64::from(self.queues), self.queues, self.queue_size).encode()
    }

    /// The file that goes with it.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Heads of the requests of queue `index` that are in flight, in the order in which they came. The queue has `size` entries, and its
    /// used ring's index is `used`.
    pub(crate) fn read(&self, index: u16, size: u16, used: u16) -> Result<Vec<u16>, RecordError> {
        let part = self.part(index, size)?;
        let half = |at: usize| u16::from_le_bytes([part[at], part[at + 1]]);
        let entry = |head: u16| HEAD + ENTRY * usize::from(head);
        match half(8) {
            // Nobody has worked on it yet.
            0 => return Ok(Vec::new()),
            VERSION => {}
            version => return Err(RecordError::Version(version)),
        }
        if half(10) < size {
            return Err(RecordError::Wrong("it has too few entries"));
        }
        // The last batch may have reached the used ring before its requests were struck out here.
        let batch = used.wrapping_sub(half(14));
        if batch > size {
            return Err(RecordError::Wrong("its used index is not the queue's"));
        }
        let mut done = vec![false; usize::from(size)];
        let mut head = half(12);
        for _ in 0..batch {
            match done.get_mut(usize::from(head)) {
                Some(done) => *done = true,
                None => return Err(RecordError::Wrong("its last batch leaves the queue")),
            }
            head = half(entry(head) + 6);
        }
        let mut open: Vec<(u64, u16)> = Vec::new();
        for head in 0..size {
            let at = entry(head);
            if part[at] != 0 && !done[usize::from(head)] {
                let counter = part[at + 8..at + 16].try_into().map_or(0, u64::from_le_bytes);
                open.push((counter, head));
            }
        }
        open.sort_unstable();
        Ok(open.into_iter().map(|(_, head)| head).collect())
    }

    /// Notes that `heads` are in flight in queue `index`, in this order, and nothing else. Its used ring's index is `used`. No daemon may
    /// work on the queue.
    pub(crate) fn write(&self, index: u16, size: u16, used: u16, heads: &[u16]) -> Result<(), RecordError> {
        let mut part = self.part(index, size)?;
        part.fill(0);
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = part.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(8, &VERSION.to_le_bytes());
        put(10, &self.queue_size.to_le_bytes());
        put(14, &used.to_le_bytes());
        for (counter, head) in (1u64..).zip(heads) {
            let at = HEAD + ENTRY * usize::from(*head);
            put(at, &[1]);
            put(at + 8, &counter.to_le_bytes());
        }
        let done = self.file.write_all_at(&part, self.stride * u64::from(index));
        done.map_err(|error| RecordError::Access(error.kind()))
    }

    /// Head and entries of a queue's part.
    fn part(&self, index: u16, size: u16) -> Result<Vec<u8>, RecordError> {
        if index >= self.queues || size > self.queue_size {
            return Err(RecordError::Wrong("it has no such queue"));
        }
        let mut part = vec![0; HEAD + ENTRY * usize::from(self.queue_size)];
        let done = self.file.read_exact_at(&mut part, self.stride * u64::from(index));
        done.map_err(|error| RecordError::Access(error.kind()))?;
        Ok(part)
    }
}

/// `bytes` from the beginning of a file.
fn shape(bytes: u64, queues: u16, size: u16) -> InflightShape {
    InflightShape {
        bytes,
        offset: 0,
        queues,
        size,
    }
}

/// A file of `size` bytes whose size stays.
fn make(size: u64) -> std::io::Result<File> {
    let file = rustix::fs::memfd_create(c"inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;
    /// As libvhost-user lays it out.
    const STRIDE: u64 = 192;

    fn memory(size: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create(c"theirs", MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&file, size).expect("size");
        file
    }

    fn adopt(size: u64, file: OwnedFd) -> Result<Inflight, LinkError> {
        Inflight::adopt(&shape(size, 2, SIZE).encode(), file, 2, SIZE)
    }

    fn record() -> Inflight {
        adopt(2 * STRIDE, memory(2 * STRIDE)).expect("adopted")
    }

    #[test]
    fn what_a_daemon_made_is_copied_and_cannot_shrink() {
        let file = memory(2 * STRIDE);
        File::from(file.try_clone().expect("clone"))
            .write_all_at(&[7; 4], STRIDE)
            .expect("write");
        let record = adopt(2 * STRIDE, file).expect("adopted");
        let mut bytes = [0; 4];
        record.file.read_exact_at(&mut bytes, STRIDE).expect("read");
        assert_eq!(bytes, [7; 4]);
        assert!(record.file.set_len(1).is_err(), "cut short");
        assert_eq!(record.payload(), shape(2 * STRIDE, 2, SIZE).encode());
    }

    #[test]
    fn no_lie_about_its_size_is_believed() {
        let refused = |size: u64, file: OwnedFd| match adopt(size, file) {
            Err(LinkError::Nonsense(text)) => text,
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("adopted"),
        };
        for size in [0, 1, 2 * 143, 2 * STRIDE + 1, 1 << 40, u64::MAX - 1] {
            assert!(
                refused(size, memory(2 * STRIDE)).contains("bytes for 2 queues of 8"),
                "{size}"
            );
        }
        assert!(refused(2 * STRIDE, memory(2 * STRIDE - 1)).contains("shorter than it says"));
        let (pipe, _other) = std::io::pipe().expect("pipe");
        assert!(refused(2 * STRIDE, pipe.into()).contains("is no memory"));
        let mut far = shape(2 * STRIDE, 2, SIZE).encode();
        far[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        Inflight::adopt(&far, memory(2 * STRIDE), 2, SIZE)
            .map(|_| ())
            .expect_err("past all files");
        Inflight::adopt(&[0; 7], memory(2 * STRIDE), 2, SIZE)
            .map(|_| ())
            .expect_err("no payload");
    }

    #[test]
    fn what_is_written_is_read_in_order() {
        let record = record();
        assert!(record.read(1, SIZE, 77).expect("new").is_empty());
        record.write(1, SIZE, 77, &[5, 0, 7]).expect("write");
        assert_eq!(record.read(1, SIZE, 77).expect("read"), [5, 0, 7]);
        assert!(record.read(0, SIZE, 77).expect("the other queue").is_empty());
        record.write(1, 4, 78, &[]).expect("write");
        assert!(record.read(1, 4, 78).expect("read").is_empty());
        assert!(record.write(2, SIZE, 0, &[]).is_err(), "no such queue");
    }

    #[test]
    fn the_last_batch_counts_as_done() {
        let record = record();
        record.write(0, SIZE, 65535, &[1, 2, 3, 4]).expect("write");
        // Heads 3 and 1 were put into the used ring, its index raised, and then the daemon ended.
        record.file.write_all_at(&3u16.to_le_bytes(), 12).expect("batch");
        let next = (HEAD + 3 * ENTRY + 6) as u64;
        record.file.write_all_at(&1u16.to_le_bytes(), next).expect("next");
        assert_eq!(record.read(0, SIZE, 65535).expect("nothing was done"), [1, 2, 3, 4]);
        assert_eq!(record.read(0, SIZE, 0).expect("one"), [1, 2, 4]);
        assert_eq!(record.read(0, SIZE, 1).expect("two"), [2, 4]);
    }

    #[test]
    fn garbage_is_named() {
        let record = record();
        record.write(0, SIZE, 0, &[]).expect("write");
        assert_eq!(
            record.read(0, SIZE, 9),
            Err(RecordError::Wrong("its used index is not the queue's"))
        );
        record.file.write_all_at(&8u16.to_le_bytes(), 12).expect("batch");
        assert_eq!(
            record.read(0, SIZE, 1),
            Err(RecordError::Wrong("its last batch leaves the queue"))
        );
        record.file.write_all_at(&4u16.to_le_bytes(), 10).expect("entries");
        assert_eq!(
            record.read(0, SIZE, 0),
            Err(RecordError::Wrong("it has too few entries"))
        );
        record.file.write_all_at(&9u16.to_le_bytes(), 8).expect("version");
        assert_eq!(record.read(0, SIZE, 0), Err(RecordError::Version(9)));
        record.file.write_all_at(&[0xff; 2 * STRIDE as usize], 0).expect("all");
        assert_eq!(record.read(1, SIZE, 0), Err(RecordError::Version(0xffff)));
    }
}
