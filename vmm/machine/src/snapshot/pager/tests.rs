//! The pager with a snapshot, and with somebody who fetches memory.

use procfs_core::FromBufRead as _;
use procfs_core::process::MemoryMaps;
use triarch_memory::{Discarder, GuestMemoryHandle, RamOptions, allocate};
use triarch_migration::Lacking as _;
use triarch_state::{About, Part, Payloads, Snapshot, SnapshotWriter, Source};
use vm_memory::{Bytes, GuestAddressSpace};

use super::*;

const MIB: u64 = 1 << 20;
const START: u64 = 1 << 32;
const SIZE: u64 = 3 * CHUNK as u64 / 2;
const RANGE: Range<u64> = START..START + SIZE;

struct Sevens;

impl Source for Sevens {
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range.start..range.end.min(START + SIZE - 4096)).filter(|run| !run.is_empty()))
    }

    fn read(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(7);
        Ok(())
    }
}

/// A snapshot whose bytes are 7, but for its last page.
fn saved(dir: &std::path::Path) -> Snapshot {
    let mut writer = SnapshotWriter::create(dir).expect("a directory");
    let part = Part {
        range: RANGE,
        pages: None,
    };
    writer.memory(vec![part], &Sevens, |_, _| {}).expect("memory");
    let about = About {
        vmm: "1".into(),
        arch: "x".into(),
        id: None,
        base: None,
    };
    writer.finish(b"{}", &about, Payloads::default()).expect("a snapshot");
    Snapshot::open(dir, "x").expect("a snapshot")
}

/// What the thread would own, in the hands of a test; `None` where the host does not let us.
fn work(snapshot: &Snapshot, memory: &GuestMemory) -> Option<Work> {
    let userfault = match Userfault::new() {
        Err(UserfaultError::Forbidden(error)) => {
            eprintln!("not tried: {error}");
            return None;
        }
        other => other.expect("userfaultfd"),
    };
    let mut work = Work {
        userfault,
        supply: Supply::Saved {
            saved: snapshot.saved_memory().expect("a file"),
            buffer: vec![0; CHUNK],
        },
        page: Userfault::page_size(),
        places: Vec::new(),
        faults: VecDeque::new(),
        next: (0, 0),
        runs: 0,
        sealed: true,
        wake: EventFd::new(EFD_NONBLOCK).expect("an event"),
        shared: Arc::default(),
        events: EventLog::new(),
        report: Arc::new(|_| {}),
    };
    let range = snapshot.ranges()[0].clone();
    let lacks = PageSet::all(range.size / work.page);
    let memory = memory.clone();
    let place = Place {
        memory,
        start: 0,
        released: PageSet::none(range.size.div_ceil(CHUNK as u64)),
        range: What::Saved(range),
        lacks,
    };
    work.add(place).expect("registered");
    Some(work)
}

fn memory(shared: bool) -> (GuestMemoryHandle, RamOptions) {
    let options = RamOptions {
        shared,
        ..RamOptions::default()
    };
    let memory = allocate(&[(GuestAddress(START), SIZE)], &options).expect("memory");
    (GuestMemoryHandle::new(memory), options)
}

#[test]
fn what_is_given_back_before_it_came_is_zeroes() {
    let dir = tempfile::tempdir().expect("a directory");
    let snapshot = saved(dir.path());
    for shared in [false, true] {
        let (memory, options) = memory(shared);
        let Some(mut work) = work(&snapshot, &memory.memory()) else {
            return;
        };
        let discarder = Discarder::new(memory.clone(), options).expect("a page size");
        let discard = thread::spawn(move || {
            let first = discarder.discard(GuestAddress(START + 8192), 8192);
            (first.expect("discard"), discarder)
        });
        while work.places[0].lacks.contains(2) {
            work.look().expect("faults");
        }
        let (len, discarder) = discard.join().expect("discarded");
        assert_eq!(len, 8192);
        while let Some((place, chunk)) = work.pending() {
            work.provide(place, chunk).expect("provided");
        }
        let map = memory.memory();
        let byte = |at| map.read_obj::<u8>(GuestAddress(START + at)).expect("memory");
        let found = [0, 8191, 8192, 16383, 16384, SIZE - 4097, SIZE - 4096].map(byte);
        assert_eq!(found, [7, 7, 0, 0, 7, 7, 0], "shared {shared}");
        // Afterwards nobody is asked.
        discarder.discard(GuestAddress(START + MIB), 4096).expect("discard");
        assert_eq!([MIB - 1, MIB, MIB + 4096].map(byte), [7, 0, 7]);
        assert!(work.userfault.faults().expect("faults").is_empty());
    }
}

#[test]
fn whoever_waits_for_lost_memory_gets_none() {
    let dir = tempfile::tempdir().expect("a directory");
    let snapshot = saved(dir.path());
    let (memory, _) = memory(false);
    let Some(mut work) = work(&snapshot, &memory.memory()) else {
        return;
    };
    let file = std::fs::File::options()
        .write(true)
        .open(dir.path().join("memory-ranges"));
    file.expect("a file").set_len(CHUNK as u64 + 5).expect("cut");
    let waiting = thread::spawn(move || memory.memory().read_obj::<u8>(GuestAddress(START + SIZE - 1)));
    while work.faults.is_empty() {
        work.look().expect("faults");
    }
    let at = work.faults.pop_front().expect("a fault");
    let lost = work.fault(at).expect_err("cut short");
    assert!(triarch_api::chain(&lost).contains("memory-ranges"), "{lost}");
    assert!(!waiting.is_finished(), "it read something");
    // What is lost is lost when the process ends; here the kernel provides it.
    drop(work);
    waiting.join().expect("no panic").expect("memory");
}

/// A pager of memory that comes, of which pages 1, 2 and the last are missing; `None` where the host does not let us.
fn coming(memory: &GuestMemory) -> Option<(Pager, Arc<Coming>)> {
    if let Err(UserfaultError::Forbidden(error)) = Userfault::new() {
        eprintln!("not tried: {error}");
        return None;
    }
    let sandbox: Arc<dyn Sandbox> = Arc::new(triarch_device_core::NoSandbox);
    let missing = [START + PAGE..START + 3 * PAGE, START + SIZE - PAGE..START + SIZE];
    let report: Report = Arc::new(|_| {});
    let made = Pager::coming(memory, &missing, &sandbox, &EventLog::new(), &report);
    Some(made.expect("a pager"))
}

#[test]
fn memory_comes_page_by_page() {
    for shared in [false, true] {
        let (memory, _) = memory(shared);
        let Some((pager, coming)) = coming(&memory.memory()) else {
            return;
        };
        let read = |at: u64| {
            let memory = memory.clone();
            thread::spawn(move || {
                memory
                    .memory()
                    .read_obj::<u8>(GuestAddress(START + at))
                    .expect("memory")
            })
        };
        let wait = Duration::from_secs(10);
        assert_eq!(coming.remaining(), Some(3 * PAGE));
        // Nobody is asked for what was never written.
        assert_eq!(read(0).join().expect("read"), 0);
        let waits = read(PAGE + 5);
        assert_eq!(coming.wanted(8, wait), [START + PAGE]);
        assert!(coming.wanted(8, Duration::ZERO).is_empty());
        // After a connection was lost everything is told again.
        let missing = coming.missing().expect("missing");
        assert_eq!(
            missing,
            [START + PAGE..START + 3 * PAGE, START + SIZE - PAGE..START + SIZE]
        );
        assert_eq!(coming.wanted(8, wait), [START + PAGE]);
        // Nobody lacks the first of these.
        coming.provide(START, &[7; 3 * PAGE as usize]).expect("provided");
        assert_eq!(waits.join().expect("read"), 7);
        let map = memory.memory();
        map.write_obj(9_u8, GuestAddress(START + PAGE)).expect("memory");
        coming.provide(START + PAGE, &[7; PAGE as usize]).expect("ignored");
        coming.provide_zeroes(START, 3 * PAGE).expect("ignored");
        let found = [0, 1, 2].map(|page| map.read_obj::<u8>(GuestAddress(START + page * PAGE)).expect("memory"));
        assert_eq!((found, coming.remaining()), ([0, 9, 7], Some(PAGE)));
        assert!(coming.provide(START + SIZE, &[7; PAGE as usize]).is_err() && !pager.is_complete());
        let waits = read(SIZE - 1);
        assert_eq!(coming.wanted(8, wait), [START + SIZE - PAGE]);
        coming.provide_zeroes(START + SIZE - PAGE, PAGE).expect("provided");
        assert_eq!(waits.join().expect("read"), 0);
        pager.complete().expect("complete");
        assert_eq!(coming.remaining(), Some(0));
        assert!(coming.wanted(8, wait).is_empty());
    }
}

#[test]
fn nobody_waits_for_what_is_given_up() {
    let (memory, _) = memory(false);
    let Some((pager, coming)) = coming(&memory.memory()) else {
        return;
    };
    let theirs = memory.clone();
    let waits = thread::spawn(move || theirs.memory().read_obj::<u8>(GuestAddress(START + PAGE)));
    assert_eq!(coming.wanted(8, Duration::from_secs(10)).len(), 1);
    coming.abandon();
    assert_eq!(waits.join().expect("no panic").expect("memory"), 0);
    assert_eq!(coming.remaining(), None);
    // Nor for the thread, which has ended and is still owned.
    assert!(coming.provide(START + PAGE, &[7; PAGE as usize]).is_err());
    assert!(coming.missing().is_err());
    let added = pager.place(&memory.memory(), What::Region(START, SIZE), PageSet::none(SIZE / PAGE));
    for ended in [added, pager.complete()] {
        let error = ended.expect_err("it will never be whole").to_string();
        assert!(error.contains("not waited for"), "{error}");
    }
    drop(pager);
    assert!(coming.missing().is_err());
}

/// Mappings of the process within these addresses.
fn mappings(addresses: &Range<u64>) -> usize {
    let maps = std::fs::File::open("/proc/self/maps").expect("maps");
    let maps = MemoryMaps::from_buf_read(io::BufReader::new(maps)).expect("maps");
    maps.0.iter().filter(|map| addresses.contains(&map.address.0)).count()
}

#[test]
fn what_is_there_here_and_there_does_not_take_all_mappings_of_the_process() {
    const CHUNKS: u64 = 8 * MAX_RUNS as u64;
    let len = CHUNKS * CHUNK as u64;
    let memory = allocate(&[(GuestAddress(START), len)], &RamOptions::default()).expect("memory");
    let memory = GuestMemoryHandle::new(memory);
    if let Err(UserfaultError::Forbidden(error)) = Userfault::new() {
        return eprintln!("not tried: {error}");
    }
    let sandbox: Arc<dyn Sandbox> = Arc::new(triarch_device_core::NoSandbox);
    // A page of every second chunk is missing, and comes in an order that leaves gaps.
    let odd = |n: u64| START + (2 * n + 1) * CHUNK as u64;
    let missing: Vec<_> = (0..CHUNKS / 2).map(|n| odd(n)..odd(n) + PAGE).collect();
    let report: Report = Arc::new(|_| {});
    let map = memory.memory();
    let (pager, coming) = Pager::coming(&map, &missing, &sandbox, &EventLog::new(), &report).expect("a pager");
    let first = map.find_region(GuestAddress(START)).expect("a region").as_ptr() as u64;
    let most = || assert!(mappings(&(first..first + len)) <= 2 * MAX_RUNS + 1);
    most();
    let byte = |gpa: u64| map.read_obj::<u8>(GuestAddress(gpa)).expect("memory");
    // Never written, whoever provides it.
    assert!((0..CHUNKS / 2).all(|n| byte(odd(n) - 1) == 0 && byte(odd(n) + PAGE) == 0));
    for n in (0..CHUNKS / 2).step_by(2).chain((1..CHUNKS / 2).step_by(2)) {
        coming.provide(odd(n), &[7; PAGE as usize]).expect("provided");
        most();
    }
    pager.complete().expect("complete");
    assert!((0..CHUNKS / 2).all(|n| byte(odd(n)) == 7 && byte(odd(n) - 1) == 0));
    most();
}
