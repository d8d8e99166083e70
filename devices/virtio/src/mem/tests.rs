use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, MutexGuard};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mock::{Desc, FakeDriver};

const BLOCK: u64 = MIN_BLOCK;
/// Blocks of a part.
const PART: u64 = 4;
/// Blocks of the region: the last part is shorter.
const BLOCKS: u64 = 18;
const AT: u64 = 1 << 32;

const OPTIONS: MemOptions = MemOptions {
    addr: AT,
    size: BLOCKS * BLOCK,
    block: BLOCK,
    part: PART * BLOCK,
    node: None,
    requested: 0,
};

/// What the host was asked for.
#[derive(Default)]
struct Machine {
    open: BTreeMap<u64, u64>,
    filled: BTreeSet<u64>,
    closes: usize,
    /// Requests until one fails.
    fails_after: Option<usize>,
}

#[derive(Clone, Default)]
struct MockHost(Arc<Mutex<Machine>>);

impl MockHost {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().expect("lock")
    }

    fn step(&self) -> io::Result<MutexGuard<'_, Machine>> {
        let mut machine = self.machine();
        match &mut machine.fails_after {
            Some(0) => {
                machine.fails_after = None;
                Err(io::Error::other("no more"))
            }
            Some(left) => {
                *left -= 1;
                Ok(machine)
            }
            None => Ok(machine),
        }
    }
}

fn blocks_of(range: &Range<u64>) -> Range<u64> {
    assert!(range.start < range.end && range.start >= AT, "{range:x?}");
    let block = |at: u64| {
        assert!((at - AT).is_multiple_of(BLOCK));
        (at - AT) / BLOCK
    };
    block(range.start)..block(range.end)
}

impl MemoryHost for MockHost {
    fn open(&mut self, part: Range<u64>) -> io::Result<()> {
        let blocks = blocks_of(&part);
        assert!(blocks.start.is_multiple_of(PART) && blocks.end == (blocks.start + PART).min(BLOCKS));
        let mut machine = self.step()?;
        assert_eq!(machine.open.insert(part.start, part.end), None, "it is open");
        Ok(())
    }

    fn close(&mut self, part: Range<u64>) -> io::Result<()> {
        let mut machine = self.step()?;
        assert_eq!(machine.open.remove(&part.start), Some(part.end), "it is not open");
        machine.closes += 1;
        Ok(())
    }

    fn fill(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut machine = self.step()?;
        let open = machine
            .open
            .iter()
            .any(|(start, end)| *start <= blocks.start && blocks.end <= *end);
        assert!(open, "{blocks:x?} is not open");
        machine.filled.extend(blocks_of(&blocks));
        Ok(())
    }

    fn discard(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut machine = self.step()?;
        for block in blocks_of(&blocks) {
            machine.filled.remove(&block);
        }
        Ok(())
    }
}

struct Rig {
    driver: FakeDriver,
    mem: Mem,
    handle: MemHandle,
    host: MockHost,
    told: Arc<AtomicU64>,
}

/// Where requests and answers are.
const REQUEST_AT: u64 = 0x8_0000;
const ANSWER_AT: u64 = 0x8_1000;

impl Rig {
    fn new(requested: u64) -> Self {
        let (driver, host) = (FakeDriver::new(16, false), MockHost::default());
        let told = Arc::new(AtomicU64::new(0));
        let count = told.clone();
        let observer = Box::new(move || {
            count.fetch_add(1, SeqCst);
        });
        let options = MemOptions {
            requested: requested * BLOCK,
            ..OPTIONS
        };
        let mut mem = Mem::new("_mem", options, Box::new(host.clone()), observer).expect("device");
        mem.activate(driver.context(mem.features())).expect("activate");
        mem.start_queue(driver.queue()).expect("start");
        Self {
            driver,
            handle: mem.handle(),
            mem,
            host,
            told,
        }
    }

    /// Sends a request of `kind` for `count` blocks at `addr`; returns the type of the answer and the state in it.
    fn ask(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
        let request = encode(kind, addr, count);
        self.driver
            .ram()
            .write_slice(&request, GuestAddress(REQUEST_AT))
            .expect("request");
        self.driver
            .ram()
            .write_slice(&[0xff; 10], GuestAddress(ANSWER_AT))
            .expect("room");
        self.driver
            .add(&[Desc::readable(REQUEST_AT, 24), Desc::writable(ANSWER_AT, 10)]);
        self.driver.kick();
        assert_eq!(self.driver.wait_used().map(|(_, written)| written), Some(10));
        let word = |at| self.driver.ram().read_obj::<u16>(GuestAddress(at)).expect("answer");
        (word(ANSWER_AT), word(ANSWER_AT + 8))
    }

    fn plug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(0, AT + block * BLOCK, count).0
    }

    fn unplug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(1, AT + block * BLOCK, count).0
    }

    fn config(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.mem.read_config(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

#[test]
fn blocks_are_plugged_and_unplugged() {
    let mut rig = Rig::new(6);
    assert_eq!((rig.config(0), rig.config(16)), (BLOCK, AT));
    assert_eq!((rig.config(24), rig.config(32)), (BLOCKS * BLOCK, BLOCKS * BLOCK));
    assert_eq!((rig.config(40), rig.config(48), rig.config(56)), (0, 6 * BLOCK, 0));
    assert_eq!(rig.plug(2, 4), ACK, "over the border of two parts");
    assert_eq!(rig.ask(3, AT + 2 * BLOCK, 4), (ACK, 0));
    assert_eq!(rig.ask(3, AT + 6 * BLOCK, 2), (ACK, 1));
    assert_eq!(rig.ask(3, AT, 3), (ACK, 2));
    assert_eq!(rig.config(40), 4 * BLOCK);
    let status = rig.handle.status();
    assert_eq!((status.plugged, status.open), (4 * BLOCK, 8 * BLOCK));
    assert_eq!(rig.host.machine().open.len(), 2);
    assert_eq!(rig.host.machine().filled, BTreeSet::from([2, 3, 4, 5]));
    assert_eq!(rig.unplug(2, 2), ACK);
    assert_eq!(rig.host.machine().open.len(), 1, "nothing of the first part is plugged");
    assert_eq!(rig.handle.open(), 4 * BLOCK);
    assert_eq!(rig.ask(2, 0, 0).0, ACK);
    assert_eq!((rig.handle.plugged(), rig.handle.open()), (0, 0));
    assert!(rig.host.machine().open.is_empty() && rig.host.machine().filled.is_empty());
    let counters = rig.handle.counters();
    assert_eq!((counters.plugged, counters.unplugged), (4 * BLOCK, 4 * BLOCK));
    assert_eq!((counters.nack, counters.busy, counters.error), (0, 0, 0));
}

#[test]
fn what_a_driver_may_not_ask_changes_nothing() {
    let mut rig = Rig::new(8);
    assert_eq!(rig.plug(0, 2), ACK);
    let before = rig.handle.state();
    for (kind, addr, count) in [
        (0, AT + BLOCK, 1),
        (0, AT + BLOCK, 2),
        (0, AT + 2 * BLOCK, 0),
        (0, AT + 2 * BLOCK + 4096, 1),
        (0, AT - BLOCK, 1),
        (0, AT + BLOCKS * BLOCK, 1),
        (0, AT + (BLOCKS - 1) * BLOCK, 2),
        (0, u64::MAX - BLOCK + 1, u16::MAX),
        (0, 0, 1),
        (1, AT + 2 * BLOCK, 1),
        (1, AT + BLOCK, 2),
        (1, AT, 0),
        (1, AT + 1, 1),
        (1, u64::MAX, 1),
        (3, AT, u16::MAX),
        (3, AT, 0),
        (4, AT, 1),
        (u16::MAX, AT, 1),
    ] {
        assert_eq!(rig.ask(kind, addr, count).0, ERROR, "{kind} {addr:#x} {count}");
    }
    assert_eq!(rig.plug(2, 7), NACK, "more than the host wants");
    assert_eq!(rig.handle.state(), before);
    assert_eq!((rig.handle.counters().error, rig.handle.counters().nack), (18, 1));
}

#[test]
fn a_guest_that_spreads_its_blocks_gets_no_further_parts() {
    let mut rig = Rig::new(4);
    assert_eq!(rig.plug(0, 1), ACK);
    assert_eq!(rig.plug(PART, 1), ACK, "one part more than it needs");
    assert_eq!(rig.plug(2 * PART, 1), BUSY);
    assert_eq!(rig.handle.open(), 2 * PART * BLOCK);
    assert_eq!(rig.plug(1, 2), ACK, "where it has a part");
    rig.handle.set_requested(5 * BLOCK).expect("interrupt");
    assert_eq!(rig.plug(2 * PART, 1), ACK);
}

#[test]
fn a_host_that_cannot_leaves_everything_as_it_was() {
    // Plugging of two parts is two times open and fill, unplugging two times close and discard.
    for fails_after in 0..4 {
        let mut rig = Rig::new(16);
        rig.host.machine().fails_after = Some(fails_after);
        assert_eq!(rig.plug(2, 4), BUSY, "{fails_after}");
        assert!(rig.host.machine().open.is_empty() && rig.host.machine().filled.is_empty());
        assert_eq!((rig.handle.plugged(), rig.handle.open()), (0, 0));
        assert_eq!(rig.plug(2, 4), ACK);
        rig.host.machine().fails_after = Some(fails_after);
        assert_eq!(rig.unplug(2, 4), BUSY, "{fails_after}");
        assert_eq!((rig.handle.plugged(), rig.handle.open()), (4 * BLOCK, 8 * BLOCK));
        assert_eq!(rig.host.machine().open.len(), 2);
        assert_eq!(rig.unplug(2, 4), ACK);
        assert!(rig.host.machine().open.is_empty() && rig.host.machine().filled.is_empty());
    }
}

#[test]
fn the_driver_hears_of_another_size_and_the_host_of_what_it_did() {
    let mut rig = Rig::new(0);
    assert_eq!(rig.told.load(SeqCst), 1, "a driver came");
    assert!(rig.handle.status().active);
    assert_eq!(rig.plug(0, 1), NACK);
    rig.handle.set_requested(2 * BLOCK).expect("interrupt");
    assert_eq!((rig.driver.interrupt.config_count(), rig.config(48)), (1, 2 * BLOCK));
    assert_eq!((rig.plug(0, 1), rig.plug(1, 1)), (ACK, ACK));
    assert_eq!(rig.told.load(SeqCst), 2, "once, until it looks");
    rig.handle.status();
    rig.handle.set_requested(0).expect("interrupt");
    assert_eq!(rig.unplug(1, 1), ACK);
    assert_eq!(rig.told.load(SeqCst), 3);
    let odd = rig.handle.check(BLOCK + 1).expect_err("odd");
    assert!(matches!(odd, MemError::Size { .. }));
    assert!(rig.handle.check((BLOCKS + 1) * BLOCK).is_err() && rig.handle.check(BLOCKS * BLOCK).is_ok());
}

#[test]
fn a_reset_of_the_device_keeps_blocks_and_a_pause_keeps_requests() {
    let mut rig = Rig::new(4);
    assert_eq!(rig.plug(0, 4), ACK);
    let queue = rig.mem.stop_queue(0).expect("the queue");
    assert!(rig.mem.stop_queue(0).is_none() && rig.mem.stop_queue(1).is_none());
    rig.mem.start_queue(queue).expect("go on");
    assert_eq!(rig.unplug(0, 1), ACK);
    rig.mem.stop_queue(0).expect("the queue");
    rig.mem.reset();
    assert!(!rig.handle.status().active);
    assert_eq!(rig.handle.plugged(), 3 * BLOCK);
    let driver = FakeDriver::new(16, false);
    rig.mem.activate(driver.context(rig.mem.features())).expect("activate");
    rig.mem.start_queue(driver.queue()).expect("start");
    rig.driver = driver;
    assert_eq!(rig.ask(3, AT, 4), (ACK, 2));
    assert_eq!(rig.ask(2, 0, 0), (ACK, 0));
}

#[test]
fn a_request_that_is_too_short_breaks_the_device() {
    for (read, write) in [(23, 10), (24, 9), (24, 0), (0, 10)] {
        let mut rig = Rig::new(4);
        let buffers = [Desc::readable(REQUEST_AT, read), Desc::writable(ANSWER_AT, write)];
        let some: Vec<_> = buffers.into_iter().filter(|buffer| buffer.len > 0).collect();
        rig.driver.add(&some);
        rig.driver.kick();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while rig.driver.interrupt.needs_reset_count() == 0 {
            assert!(std::time::Instant::now() < end, "{read} {write}");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

#[test]
fn a_stop_ends_a_long_request_with_nothing_done() {
    let host = MockHost::default();
    let mut region = Region::new(OPTIONS, Box::new(host.clone())).expect("region");
    let mut left = 2;
    let mut stop = || {
        left -= 1;
        left == 0
    };
    let span = request::Span { addr: AT, blocks: 12 };
    assert_eq!(region.plug(span, OPTIONS.size, &mut stop), request::Answer::Busy);
    assert_eq!((region.plugged(), region.open(), host.machine().closes), (0, 0, 1));
}

#[test]
fn a_saved_state_is_restored() {
    let mut rig = Rig::new(8);
    assert_eq!((rig.plug(1, 5), rig.plug(7, 1)), (ACK, ACK));
    let state = rig.handle.state();
    let text = serde_json::to_string(&state).expect("text");
    let host = MockHost::default();
    let mut other = Mem::new("_mem", OPTIONS, Box::new(host.clone()), Box::new(|| {})).expect("device");
    other
        .restore(&serde_json::from_str(&text).expect("state"))
        .expect("restore");
    assert_eq!(other.handle().state(), state);
    assert_eq!(host.machine().filled, BTreeSet::from([1, 2, 3, 4, 5, 7]));
    let bad = |change: fn(&mut VirtioMemStateV1)| {
        let mut state = state.clone();
        change(&mut state);
        let mut device = Mem::new("_mem", OPTIONS, Box::new(MockHost::default()), Box::new(|| {})).expect("device");
        device.restore(&state).expect_err("refused")
    };
    assert!(matches!(bad(|s| s.addr += 1), PlugError::Other));
    assert!(matches!(bad(|s| s.requested_size = 1), PlugError::Other));
    assert!(matches!(
        bad(|s| s.plugged[0].count = u64::MAX),
        PlugError::Blocks { .. }
    ));
    assert!(matches!(
        bad(|s| s.plugged[1].first = 5),
        PlugError::Blocks { first: 5, .. }
    ));
}

#[test]
fn regions_are_whole_blocks() {
    let make = |options| Mem::new("_mem", options, Box::new(MockHost::default()), Box::new(|| {})).err();
    assert_eq!(make(OPTIONS), None);
    for options in [
        MemOptions {
            addr: AT + 4096,
            ..OPTIONS
        },
        MemOptions { size: 0, ..OPTIONS },
        MemOptions {
            size: BLOCK + 4096,
            ..OPTIONS
        },
        MemOptions {
            block: 1 << 20,
            ..OPTIONS
        },
        MemOptions {
            block: 3 << 20,
            ..OPTIONS
        },
        MemOptions { part: 0, ..OPTIONS },
        MemOptions {
            addr: u64::MAX - BLOCK + 1,
            ..OPTIONS
        },
    ] {
        assert!(matches!(make(options), Some(MemError::Geometry { .. })), "{options:?}");
    }
    let options = MemOptions {
        requested: BLOCK / 2,
        ..OPTIONS
    };
    assert!(matches!(make(options), Some(MemError::Size { .. })));
    let of = |node| {
        let options = MemOptions { node, ..OPTIONS };
        Mem::new("_mem", options, Box::new(MockHost::default()), Box::new(|| {})).expect("device")
    };
    assert_eq!((of(None).features() & 1, of(Some(1)).features() & 1), (0, 1));
    let mut node = [0; 2];
    of(Some(0x201)).read_config(8, &mut node);
    assert_eq!(node, [1, 2]);
}

/// What a device should answer, written down as simply as can be.
struct Model {
    plugged: BTreeSet<u64>,
    requested: u64,
}

impl Model {
    fn open(&self) -> BTreeSet<u64> {
        self.plugged.iter().map(|block| block / PART).collect()
    }

    fn parts_bytes(parts: &BTreeSet<u64>) -> u64 {
        parts.iter().map(|part| (BLOCKS - part * PART).min(PART)).sum()
    }

    fn answer(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
        // More than there are cannot be right; a few too many show it as well.
        let count = count.min(2 * BLOCKS as u16);
        let all: Vec<u64> = (0..u64::from(count)).map(|n| addr.wrapping_add(n * BLOCK)).collect();
        let known = all
            .iter()
            .all(|at| *at >= AT && (at - AT).is_multiple_of(BLOCK) && (at - AT) / BLOCK < BLOCKS);
        let blocks: BTreeSet<u64> = all.iter().map(|at| at.wrapping_sub(AT) / BLOCK).collect();
        let have = blocks.intersection(&self.plugged).count();
        if kind == 2 {
            self.plugged.clear();
            return (ACK, 0);
        }
        if !known || blocks.is_empty() || kind > 3 {
            return (ERROR, 0);
        }
        match kind {
            0 if have > 0 => (ERROR, 0),
            0 if (self.plugged.len() + blocks.len()) as u64 > self.requested => (NACK, 0),
            0 => {
                let before = self.open();
                let mut then = before.clone();
                then.extend(blocks.iter().map(|block| block / PART));
                let most = (self.requested.div_ceil(PART) + 1) * PART;
                if then != before && Self::parts_bytes(&then) > most {
                    return (BUSY, 0);
                }
                self.plugged.extend(blocks);
                (ACK, 0)
            }
            1 if have < blocks.len() => (ERROR, 0),
            1 => {
                self.plugged.retain(|block| !blocks.contains(block));
                (ACK, 0)
            }
            _ => (
                ACK,
                if have == blocks.len() {
                    0
                } else if have == 0 {
                    1
                } else {
                    2
                },
            ),
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Want(u64),
    Ask(u16, u64, u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let addr = prop_oneof![
        8 => (0..BLOCKS + 2).prop_map(|block| AT + block * BLOCK),
        1 => any::<u64>(),
        1 => Just(AT + 4096),
    ];
    let count = prop_oneof![8 => 0..8u16, 1 => any::<u16>()];
    let step = prop_oneof![
        1 => (0..=BLOCKS).prop_map(Step::Want),
        6 => (0..5u16, addr, count).prop_map(|(kind, addr, count)| Step::Ask(kind, addr, count)),
    ];
    prop::collection::vec(step, 1..60)
}

/// The same as [`Rig::ask`] without a queue.
fn serve(mem: &Mem, kind: u16, addr: u64, count: u16) -> (u16, u16) {
    let request = request::Request::parse(&encode(kind, addr, count));
    let (answer, trouble) = mem.shared.serve(request, &mut || false);
    assert!(trouble.is_none());
    let bytes = answer.bytes();
    let word = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (word(0), word(8))
}

fn encode(kind: u16, addr: u64, count: u16) -> [u8; 24] {
    let mut request = [0u8; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&addr.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    request
}

proptest! {
    #[test]
    fn whatever_a_driver_asks_the_device_does_as_the_model(steps in steps()) {
        let host = MockHost::default();
        let mem = Mem::new("_mem", OPTIONS, Box::new(host.clone()), Box::new(|| {})).expect("device");
        let handle = mem.handle();
        let mut model = Model { plugged: BTreeSet::new(), requested: 0 };
        for step in steps {
            match step {
                Step::Want(blocks) => {
                    model.requested = blocks;
                    handle.set_requested(blocks * BLOCK).expect("interrupt");
                }
                Step::Ask(kind, addr, count) => {
                    prop_assert_eq!(serve(&mem, kind, addr, count), model.answer(kind, addr, count));
                }
            }
            let (open, machine) = (model.open(), host.machine());
            prop_assert_eq!(&machine.filled, &model.plugged);
            let parts: BTreeSet<u64> = machine.open.keys().map(|at| (at - AT) / BLOCK / PART).collect();
            prop_assert_eq!(&parts, &open);
            prop_assert_eq!(handle.plugged(), model.plugged.len() as u64 * BLOCK);
            prop_assert_eq!(handle.open(), Model::parts_bytes(&open) * BLOCK);
        }
    }
}
