//! What a worker asks of the disk engine, and what it makes of the answers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use triarch_block::{Disk, DiskOptions, Full, IoQueue, OnCompletion, Op};

use super::*;

/// An engine queue that writes down what it is asked and answers as told, without a disk.
struct Recorder {
    inner: Box<dyn IoQueue>,
    log: Arc<Mutex<Vec<String>>>,
    fail: Arc<AtomicBool>,
    most: Arc<AtomicUsize>,
    waiting: VecDeque<u64>,
    depth: usize,
}

impl IoQueue for Recorder {
    fn submit(&mut self, op: &Op<'_>, tag: u64) -> Result<(), Full> {
        assert!(self.waiting.len() < self.depth && !self.waiting.contains(&tag));
        self.waiting.push_back(tag);
        self.most.fetch_max(self.waiting.len(), Ordering::Relaxed);
        let line = match op {
            Op::Read { offset, .. } => format!("read {offset}"),
            Op::Write { offset, durable, .. } => format!("write {offset} {durable}"),
            Op::Flush => "flush".into(),
            Op::Discard { offset, len, durable } => format!("discard {offset}+{len} {durable}"),
            Op::WriteZeroes {
                offset,
                len,
                unmap,
                durable,
            } => format!("zeroes {offset}+{len} {unmap} {durable}"),
        };
        self.log.lock().unwrap().push(line);
        // Makes the completion descriptor readable once kicked.
        self.inner.submit(&Op::Flush, tag)
    }

    fn kick(&mut self) -> io::Result<()> {
        self.inner.kick()
    }

    fn completions(&mut self, done: &mut OnCompletion<'_>) -> usize {
        self.inner.completions(&mut |_, _| {});
        let count = self.waiting.len();
        // In reverse: the order of completions means nothing.
        while let Some(tag) = self.waiting.pop_back() {
            match self.fail.load(Ordering::Relaxed) {
                true => done(tag, Err(io::Error::from_raw_os_error(libc::ENOSPC))),
                false => done(tag, Ok(0)),
            }
        }
        count
    }

    fn drain(&mut self, done: &mut OnCompletion<'_>) -> io::Result<()> {
        self.completions(done);
        Ok(())
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.inner.completion_fd()
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn backend(&self) -> &'static str {
        "recorder"
    }
}

struct Bench {
    rig: Rig,
    log: Arc<Mutex<Vec<String>>>,
    fail: Arc<AtomicBool>,
    most: Arc<AtomicUsize>,
    cache: Arc<Cache>,
    worker: Option<Worker<QueueWorker>>,
}

impl Bench {
    /// A worker on an engine queue of `depth`, in place of the device's own.
    fn new(depth: usize, features: u64) -> Self {
        let mut rig = Rig::new();
        rig.device.stop_queue(0);
        let file = super::image();
        let mut options = DiskOptions::new(file.path());
        options.backend = Backend::Sync;
        let disk = Disk::open(&options).unwrap();
        let (log, fail, most) = (Arc::default(), Arc::default(), Arc::default());
        let recorder = Recorder {
            inner: disk.queue(0, depth).unwrap(),
            log: Arc::clone(&log),
            fail: Arc::clone(&fail),
            most: Arc::clone(&most),
            waiting: VecDeque::new(),
            depth,
        };
        let cache = Arc::new(Cache {
            writeback: AtomicBool::new(true),
            flush: AtomicBool::new(false),
        });
        let common = Common {
            disk,
            id: "_test".into(),
            features,
            cache: Arc::clone(&cache),
            look: Duration::ZERO,
            looks: Arc::default(),
        };
        let state = QueueWorker::new(rig.driver.queue(), Box::new(recorder), &common).unwrap();
        let sandbox = rig.driver.context(0).sandbox;
        let worker = Worker::spawn("_test_q0", ThreadClass::Disk, &sandbox, state, QueueWorker::run).unwrap();
        Self {
            rig,
            log,
            fail,
            most,
            cache,
            worker: Some(worker),
        }
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.worker.take().unwrap().stop();
    }
}

#[test]
fn writes_are_durable_when_the_cache_is_off() {
    let mut bench = Bench::new(16, u64::MAX);
    for durable in [false, true, false] {
        bench.cache.writeback.store(!durable, Ordering::Relaxed);
        assert_eq!(bench.rig.simple(OUT, 2, &[1; 512], 0).status, OK);
        assert_eq!(bench.rig.simple(DISCARD, 0, &range(1, 3, 0), 0).status, OK);
        assert_eq!(bench.rig.simple(WRITE_ZEROES, 0, &range(1, 3, 1), 0).status, OK);
        let expected = [
            format!("write 1024 {durable}"),
            format!("discard 512+1536 {durable}"),
            format!("zeroes 512+1536 true {durable}"),
        ];
        assert_eq!(bench.take_log(), expected);
    }
}

#[test]
fn switching_the_cache_off_flushes_once() {
    let mut bench = Bench::new(16, u64::MAX);
    bench.cache.flush.store(true, Ordering::Relaxed);
    bench.rig.driver.kick();
    assert!(eventually(|| !bench.log.lock().unwrap().is_empty()));
    assert_eq!(bench.rig.simple(IN, 1, &[], 512).status, OK);
    assert_eq!(bench.take_log(), ["flush", "read 512"]);
    assert_eq!(bench.rig.driver.used(), None, "the driver did not ask for it");
}

#[test]
fn errors_of_the_host_reach_the_guest_as_errors() {
    let mut bench = Bench::new(16, u64::MAX);
    bench.fail.store(true, Ordering::Relaxed);
    for kind in [IN, OUT, FLUSH] {
        assert_eq!(bench.rig.simple(kind, 0, &[], 0).status, IOERR);
    }
    let answer = bench.rig.simple(IN, 0, &[], 512);
    assert_eq!((answer.status, answer.used), (IOERR, 0));
    bench.fail.store(false, Ordering::Relaxed);
    assert_eq!(bench.rig.simple(FLUSH, 0, &[], 0).status, OK);
}

#[test]
fn more_requests_than_the_engine_takes_wait_their_turn() {
    let mut bench = Bench::new(3, u64::MAX);
    for _ in 0..5 {
        for i in 0..40 {
            bench.rig.offer(&header(IN, i), 513, &Shape::default());
        }
        if bench.rig.driver.wants_kick() {
            bench.rig.driver.kick();
        }
        for _ in 0..40 {
            assert!(bench.rig.driver.wait_used().is_some());
        }
    }
    assert_eq!(bench.take_log().len(), 200);
    assert!(bench.most.load(Ordering::Relaxed) <= 3);
    assert_eq!(bench.rig.driver.interrupt.needs_reset_count(), 0);
}

#[test]
fn one_round_serves_a_queue_full_at_most() {
    let file = super::image();
    let disk = Disk::open(&DiskOptions::new(file.path())).unwrap();
    let mut driver = FakeDriver::new(8, false);
    let common = Common {
        id: "_test".into(),
        features: u64::MAX,
        cache: Arc::new(Cache {
            writeback: AtomicBool::new(true),
            flush: AtomicBool::new(false),
        }),
        disk: Arc::clone(&disk),
        look: Duration::ZERO,
        looks: Arc::default(),
    };
    let mut worker = QueueWorker::new(driver.queue(), disk.queue(0, 64).unwrap(), &common).unwrap();
    driver
        .ram()
        .write_slice(&header(GET_ID, 0), GuestAddress(DATA))
        .unwrap();
    driver.write_descriptors(&[Desc::readable(DATA, 16).next(1), Desc::writable(DATA + 64, 21)]);
    let mut vecs = Vec::new();
    for _ in 0..2 {
        (0..8).for_each(|_| driver.offer(0));
        assert!(worker.serve(&mut vecs), "there may be more");
        assert!(!driver.wants_kick());
        (0..8).for_each(|_| assert_eq!(driver.used(), Some((0, 21))));
    }
    assert!(!worker.serve(&mut vecs));
    assert!(driver.wants_kick(), "the ring is empty");
}
