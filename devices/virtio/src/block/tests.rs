//! The device against a fake driver and a real file.

mod lifecycle;
mod random;
mod worker;

use std::time::Duration;

use tempfile::NamedTempFile;
use triarch_block::{Backend, Disk, DiskOptions};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mock::{Desc, FakeDriver};

const DATA: u64 = 0x40_0000;
const TABLE: u64 = 0x30_0000;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECTORS: u64 = 256;

/// What a request came back with.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u8,
    data: Vec<u8>,
    used: u32,
}

/// How a request's bytes are laid out.
#[derive(Debug, Clone, Default)]
struct Shape {
    /// Where the readable and the writable stream are cut into buffers.
    cuts: Vec<usize>,
    indirect: bool,
}

struct Rig {
    file: NamedTempFile,
    driver: FakeDriver,
    device: Block,
    /// Where the next buffer goes.
    next: u64,
}

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * 512).unwrap();
    file
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (seed.wrapping_mul(31).wrapping_add(i.wrapping_mul(2_654_435_761)) >> 7) as u8)
        .collect()
}

/// Waits up to five seconds for something to become true.
fn eventually(mut what: impl FnMut() -> bool) -> bool {
    for _ in 0..5000 {
        if what() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

impl Rig {
    fn with(readonly: bool, backend: Backend, event_idx: bool, features: u64) -> Self {
        let file = image();
        let mut options = DiskOptions::new(file.path());
        (options.readonly, options.backend, options.serial) = (readonly, backend, Some("serial-1".into()));
        let disk = Disk::open(&options).unwrap();
        let mut device = Block::new("_disk0", disk, 1, 256).unwrap();
        let driver = FakeDriver::new(256, event_idx);
        device.activate(driver.context(features & device.features())).unwrap();
        device.start_queue(driver.queue()).unwrap();
        Self {
            file,
            driver,
            device,
            next: DATA,
        }
    }

    fn new() -> Self {
        Self::with(false, Backend::Auto, false, u64::MAX)
    }

    /// Cuts `len` bytes into buffers that are apart from each other in guest memory.
    fn place(&mut self, len: usize, cuts: &[usize]) -> Vec<(u64, usize)> {
        let mut ends: Vec<usize> = cuts.iter().copied().filter(|c| (1..len).contains(c)).collect();
        ends.push(len);
        ends.sort_unstable();
        ends.dedup();
        let mut start = 0;
        let mut pieces = Vec::new();
        for end in ends {
            if self.next > DATA + (8 << 20) {
                self.next = DATA;
            }
            pieces.push((self.next, end - start));
            self.next += (end - start) as u64 + 13;
            start = end;
        }
        pieces
    }

    /// Offers a request and returns where its writable bytes are.
    fn offer(&mut self, readable: &[u8], writable: usize, shape: &Shape) -> Vec<(u64, usize)> {
        let mut descriptors = Vec::new();
        let mut rest = readable;
        for (at, len) in self.place(readable.len(), &shape.cuts) {
            self.driver.ram().write_slice(&rest[..len], GuestAddress(at)).unwrap();
            rest = &rest[len..];
            descriptors.push(Desc::readable(at, len as u32));
        }
        let places = if writable == 0 {
            Vec::new()
        } else {
            self.place(writable, &shape.cuts)
        };
        for (at, len) in &places {
            self.driver
                .ram()
                .write_slice(&vec![0xee; *len], GuestAddress(*at))
                .unwrap();
            descriptors.push(Desc::writable(*at, *len as u32));
        }
        if shape.indirect {
            let last = descriptors.len() - 1;
            let table: Vec<Desc> = (1..)
                .zip(&descriptors)
                .map(|(i, d)| if i <= last { d.next(i as u16) } else { *d })
                .collect();
            self.driver.write_table(TABLE, &table);
            self.driver.add(&[Desc::indirect(TABLE, 16 * table.len() as u32)]);
        } else {
            self.driver.add(&descriptors);
        }
        places
    }

    fn collect(&self, places: &[(u64, usize)], used: u32) -> Answer {
        let mut data = Vec::new();
        for (at, len) in places {
            let mut piece = vec![0; *len];
            self.driver.ram().read_slice(&mut piece, GuestAddress(*at)).unwrap();
            data.extend(piece);
        }
        let status = data.pop().unwrap();
        Answer { status, data, used }
    }

    fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize, shape: &Shape) -> Answer {
        let places = self.offer(&[&header(kind, sector)[..], out].concat(), room + 1, shape);
        if self.driver.wants_kick() {
            self.driver.kick();
        }
        let (_, used) = self.driver.wait_used().expect("an answer");
        self.collect(&places, used)
    }

    fn simple(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Answer {
        self.request(kind, sector, out, room, &Shape::default())
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn data_goes_to_the_file_and_comes_back() {
    for backend in [Backend::Auto, Backend::Sync] {
        let mut rig = Rig::with(false, backend, false, u64::MAX);
        let data = pattern(1, 8192);
        assert_eq!(
            rig.simple(OUT, 3, &data, 0),
            Answer {
                status: OK,
                data: vec![],
                used: 1
            }
        );
        assert!(rig.content()[3 * 512..3 * 512 + 8192] == data);
        assert_eq!(
            rig.simple(IN, 3, &[], 8192),
            Answer {
                status: OK,
                data,
                used: 8193
            }
        );
        assert_eq!(rig.simple(FLUSH, 0, &[], 0).status, OK);
        let counters = rig.device.handle().counters();
        let (reads, writes) = (counters.reads, counters.writes);
        assert_eq!((reads.count, writes.count, counters.flushes.count), (1, 1, 1));
        assert_eq!((reads.bytes, writes.bytes, counters.errors), (8192, 8192, 0));
        assert!(eventually(|| rig.driver.interrupt.queue_count(0) == 3));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rig.driver.interrupt.queue_count(0), 3, "one interrupt for one answer");
    }
}

#[test]
fn the_serial_number_is_padded_and_cut() {
    let mut rig = Rig::new();
    let answer = rig.simple(GET_ID, 0, &[], 20);
    assert_eq!(answer.data, b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!((answer.status, answer.used), (OK, 21));
    assert_eq!(rig.simple(GET_ID, 0, &[], 6).data, b"serial");
    assert_eq!(
        rig.simple(GET_ID, 0, &[], 24).data[18..],
        [0, 0, 0xee, 0xee, 0xee, 0xee]
    );
}

#[test]
fn what_does_not_fit_the_disk_is_an_error() {
    let mut rig = Rig::new();
    let before = rig.content();
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(
            rig.simple(IN, sector, &[], 1024),
            Answer {
                status: IOERR,
                data: vec![0xee; 1024],
                used: 0
            }
        );
        assert_eq!(rig.simple(OUT, sector, &[1; 1024], 0).status, IOERR);
        assert_eq!(rig.simple(WRITE_ZEROES, 0, &range(sector, 2, 0), 0).status, IOERR);
    }
    assert_eq!(rig.simple(IN, 0, &[], 100).status, IOERR);
    assert_eq!(rig.simple(OUT, 0, &[1; 513], 0).status, IOERR);
    assert!(rig.content() == before);
    assert_eq!(rig.simple(IN, SECTORS - 1, &[], 512).status, OK);
    assert_eq!(rig.driver.interrupt.needs_reset_count(), 0);
}

#[test]
fn discard_and_write_zeroes_change_what_they_say() {
    let mut rig = Rig::new();
    assert_eq!(rig.simple(OUT, 0, &[7; 16384], 0).status, OK);
    assert_eq!(rig.simple(DISCARD, 0, &range(8, 8, 0), 0).status, OK);
    assert_eq!(rig.simple(WRITE_ZEROES, 0, &range(1, 2, 0), 0).status, OK);
    assert_eq!(rig.simple(WRITE_ZEROES, 0, &range(16, 8, 1), 0).status, OK);
    let content = rig.content();
    let zero = |at: usize| (512..1536).contains(&at) || (4096..12288).contains(&at) || at >= 16384;
    assert!(content.iter().enumerate().all(|(at, byte)| (*byte == 0) == zero(at)));

    assert_eq!(rig.simple(DISCARD, 0, &range(0, 1, 1), 0).status, UNSUPP, "unmap");
    assert_eq!(
        rig.simple(WRITE_ZEROES, 0, &range(0, 1, 2), 0).status,
        UNSUPP,
        "unknown flag"
    );
    assert_eq!(
        rig.simple(DISCARD, 0, &range(0, u32::MAX, 0), 0).status,
        IOERR,
        "above the maximum"
    );
    assert_eq!(
        rig.simple(DISCARD, 0, &[range(0, 1, 0), range(2, 1, 0)].concat(), 0)
            .status,
        IOERR,
        "two ranges"
    );
    assert_eq!(rig.simple(DISCARD, 0, &[0; 15], 0).status, IOERR, "no whole range");
    assert!(rig.content() == content);
}

#[test]
fn what_was_not_offered_or_negotiated_is_unsupported() {
    let mut rig = Rig::new();
    for kind in [2, 3, 5, 7, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(
            rig.simple(kind, 0, &[], 512),
            Answer {
                status: UNSUPP,
                data: vec![0xee; 512],
                used: 0
            }
        );
    }
    let mut rig = Rig::with(false, Backend::Auto, false, !(feature::DISCARD | feature::WRITE_ZEROES));
    assert_eq!(rig.simple(DISCARD, 0, &range(0, 1, 0), 0).status, UNSUPP);
    assert_eq!(rig.simple(WRITE_ZEROES, 0, &range(0, 1, 0), 0).status, UNSUPP);
}

#[test]
fn a_readonly_disk_stays_as_it_is() {
    let mut rig = Rig::with(true, Backend::Auto, false, u64::MAX);
    let features = rig.device.features();
    assert_ne!(features & feature::RO, 0);
    assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(rig.simple(OUT, 0, &[1; 512], 0).status, IOERR);
    assert_eq!(
        rig.simple(IN, 0, &[], 512),
        Answer {
            status: OK,
            data: vec![0; 512],
            used: 513
        }
    );
    assert_eq!(rig.simple(FLUSH, 0, &[], 0).status, OK);
    assert!(rig.content().iter().all(|b| *b == 0));
}
