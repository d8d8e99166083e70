use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use triarch_memory::{GuestMemoryHandle, RamOptions};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::mock::{Desc, FakeDriver, MEMORY};

/// Where requests are.
const REQUEST: u64 = 0x8_0000;
/// Where the pages are that go in and out.
const PAGES: u64 = MEMORY / 2 / BALLOON_PAGE;

struct Rig {
    inflate: FakeDriver,
    deflate: FakeDriver,
    statistics: FakeDriver,
    reporting: FakeDriver,
    balloon: Balloon,
    handle: BalloonHandle,
    told: Arc<AtomicU64>,
}

const ALL: BalloonOptions = BalloonOptions {
    size: 0,
    deflate_on_oom: true,
    free_page_reporting: true,
};

impl Rig {
    /// A balloon whose driver took all features, with free pages reported on queue `reporting`.
    fn new(shared: bool, reporting: u16) -> Self {
        let inflate = if shared {
            FakeDriver::sharing(16, false)
        } else {
            FakeDriver::new(16, false)
        };
        let options = RamOptions {
            shared,
            ..RamOptions::default()
        };
        let discarder = Discarder::new(inflate.memory.clone(), options).expect("page size");
        let told = Arc::new(AtomicU64::new(0));
        let count = told.clone();
        let observer = Box::new(move || {
            count.fetch_add(1, SeqCst);
        });
        let mut balloon = Balloon::new("_balloon", ALL, discarder, observer).expect("balloon");
        balloon.activate(inflate.context(balloon.features())).expect("activate");
        let [deflate, statistics, reporting] = [1, 2, reporting].map(|index| FakeDriver::beside(&inflate, index));
        for driver in [&inflate, &deflate, &statistics, &reporting] {
            balloon.start_queue(driver.queue()).expect("start");
        }
        let handle = balloon.handle();
        Self {
            inflate,
            deflate,
            statistics,
            reporting,
            balloon,
            handle,
            told,
        }
    }

    /// Puts pages in, or takes them out.
    fn request(&mut self, inflate: bool, pages: &[u32]) {
        let driver = if inflate { &mut self.inflate } else { &mut self.deflate };
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        driver
            .ram()
            .write_slice(&bytes, GuestAddress(REQUEST))
            .expect("request");
        driver.add(&[Desc::readable(REQUEST, bytes.len() as u32)]);
        driver.kick();
        assert!(driver.wait_used().is_some());
    }

    fn fill(&self, page: u64) {
        let at = GuestAddress(page * BALLOON_PAGE);
        self.inflate
            .ram()
            .write_slice(&[7; BALLOON_PAGE as usize], at)
            .expect("fill");
    }

    fn byte(&self, page: u64) -> u8 {
        let at = GuestAddress((page + 1) * BALLOON_PAGE - 1);
        self.inflate.ram().read_obj(at).expect("read")
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn queues_have_the_numbers_that_drivers_give_them() {
    let all = bit::STATS_VQ | bit::PAGE_REPORTING;
    let of = |features| (0..6).map(|index| Role::of(index, features)).collect::<Vec<_>>();
    let (inflate, deflate) = (Some(Role::Inflate), Some(Role::Deflate));
    let (statistics, reporting) = (Some(Role::Statistics), Some(Role::Reporting));
    assert_eq!(of(0), [inflate, deflate, None, None, None, None]);
    assert_eq!(of(bit::STATS_VQ), [inflate, deflate, statistics, None, None, None]);
    assert_eq!(of(all), [inflate, deflate, statistics, reporting, reporting, None]);
    assert_eq!(
        of(bit::PAGE_REPORTING),
        [inflate, deflate, reporting, None, reporting, None]
    );
}

#[test]
fn pages_put_in_are_given_back_to_the_host() {
    for shared in [false, true] {
        let mut rig = Rig::new(shared, 3);
        (0..8).for_each(|page| rig.fill(PAGES + page));
        let page = |n: u64| (PAGES + n) as u32;
        // Out of order, twice the same, and some that are none.
        rig.request(
            true,
            &[
                page(5),
                page(1),
                page(2),
                page(1),
                u32::MAX,
                (MEMORY / BALLOON_PAGE) as u32,
            ],
        );
        let left: Vec<u8> = (0..8).map(|n| rig.byte(PAGES + n)).collect();
        assert_eq!(left, [7, 0, 0, 7, 7, 0, 7, 7], "shared {shared}");
        rig.request(false, &[page(1)]);
        let counters = rig.handle.counters();
        assert_eq!((counters.inflated, counters.deflated), (5 * BALLOON_PAGE, BALLOON_PAGE));
        assert_eq!((counters.discarded, counters.invalid), (3 * BALLOON_PAGE, 2));
    }
}

#[test]
fn free_pages_that_are_reported_are_given_back_unless_they_are_poisoned() {
    for queue in [3, 4] {
        let mut rig = Rig::new(true, queue);
        rig.fill(PAGES);
        rig.fill(PAGES + 1);
        let report = |rig: &mut Rig, page: u64| {
            rig.reporting
                .add(&[Desc::writable(page * BALLOON_PAGE, BALLOON_PAGE as u32)]);
            rig.reporting.kick();
            assert_eq!(rig.reporting.wait_used().map(|(_, written)| written), Some(0));
        };
        report(&mut rig, PAGES);
        assert_eq!(rig.byte(PAGES), 0, "queue {queue}");
        rig.balloon.write_config(POISON, &0xaaaa_aaaau32.to_le_bytes());
        report(&mut rig, PAGES + 1);
        assert_eq!(rig.byte(PAGES + 1), 7);
        assert_eq!(rig.handle.counters().reported, 2 * BALLOON_PAGE);
    }
}

#[test]
fn the_driver_hears_of_the_target_and_the_host_of_the_size() {
    let mut rig = Rig::new(false, 3);
    let interrupts = rig.inflate.interrupt.clone();
    assert_eq!(rig.told.load(SeqCst), 1, "a driver came");
    assert!(rig.handle.status().active);
    rig.handle.set_target(3 * BALLOON_PAGE + 5).expect("target");
    assert_eq!((interrupts.config_count(), rig.handle.target()), (1, 3 * BALLOON_PAGE));
    let mut target = [0; 4];
    rig.balloon.read_config(0, &mut target);
    assert_eq!(target, [3, 0, 0, 0]);
    // Byte by byte, as a driver may.
    rig.balloon.write_config(0, &[9]);
    rig.balloon.write_config(ACTUAL, &[2, 0]);
    rig.balloon.write_config(ACTUAL + 2, &[1, 0]);
    rig.balloon.write_config(CONFIG as u64 - 1, &[0xff, 0xff]);
    rig.balloon.write_config(u64::MAX, &[1]);
    assert_eq!(rig.told.load(SeqCst), 2, "once until somebody looks");
    let status = rig.handle.status();
    assert_eq!(
        (status.target, status.actual),
        (3 * BALLOON_PAGE, 0x1_0002 * BALLOON_PAGE)
    );
    rig.balloon.write_config(ACTUAL, &[2, 0, 1, 0]);
    assert_eq!(rig.told.load(SeqCst), 2, "nothing changed");
    let state = rig.handle.state();
    for index in 0..4 {
        assert!(rig.balloon.stop_queue(index).is_some(), "queue {index}");
    }
    rig.balloon.reset();
    let status = rig.handle.status();
    assert_eq!(
        (status.target, status.actual, status.active),
        (3 * BALLOON_PAGE, 0, false)
    );
    assert_eq!(rig.told.load(SeqCst), 3);
    rig.balloon.restore(&state);
    let text = serde_json::to_string(&rig.handle.state()).expect("JSON");
    assert_eq!(text, r#"{"target_pages":3,"actual_pages":65538,"poison":0}"#);
}

#[test]
fn statistics_are_asked_for_when_somebody_looks() {
    let mut rig = Rig::new(false, 3);
    let send = |rig: &mut Rig, entries: &[(u16, u64)]| {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| tag.to_le_bytes().into_iter().chain(value.to_le_bytes()))
            .collect();
        rig.statistics
            .ram()
            .write_slice(&bytes, GuestAddress(REQUEST))
            .expect("statistics");
        rig.statistics.add(&[Desc::readable(REQUEST, bytes.len() as u32)]);
        rig.statistics.kick();
    };
    assert_eq!(rig.handle.statistics(), None);
    send(&mut rig, &[(4, 1000), (3, 5), (0, u64::MAX), (999, 1)]);
    assert!(rig.statistics.wait_used().is_some(), "somebody wanted them");
    let known = rig.handle.statistics().expect("statistics");
    assert_eq!(known.bytes().collect::<Vec<_>>(), [("free", 1000)]);
    assert_eq!(known.events().collect::<Vec<_>>(), [("minor_faults", 5)]);
    send(&mut rig, &[(4, 2000)]);
    assert!(rig.statistics.wait_used().is_some());
    send(&mut rig, &[(4, 3000)]);
    // Nobody asked since.
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(rig.statistics.used(), None);
    // The buffer is the driver's again when the queue is stopped, and comes again when it goes on.
    let queue = rig.balloon.stop_queue(2).expect("queue");
    assert_eq!((queue.state().next_avail, queue.state().next_used), (2, 2));
    rig.balloon.start_queue(queue).expect("start");
    rig.handle.statistics();
    assert!(rig.statistics.wait_used().is_some());
}

#[test]
fn requests_that_are_none_mark_the_device_and_it_still_stops() {
    let at = PAGES * BALLOON_PAGE;
    let long = Desc::readable(at, (MAX_LIST + 4) as u32);
    let bad: [(u16, &[Desc]); 6] = [
        (0, &[Desc::readable(at, 6)]),
        (0, &[Desc::writable(at, 8)]),
        (1, &[long]),
        (2, &[Desc::readable(at, 4096)]),
        (2, &[Desc::writable(at, 10)]),
        (3, &[Desc::readable(at, 4096), Desc::writable(at, 4096)]),
    ];
    for (queue, request) in bad {
        let mut rig = Rig::new(false, 3);
        let drivers = [
            &mut rig.inflate,
            &mut rig.deflate,
            &mut rig.statistics,
            &mut rig.reporting,
        ];
        let driver = drivers.into_iter().nth(queue.into()).expect("driver");
        driver.add(request);
        driver.kick();
        let interrupts = driver.interrupt.clone();
        wait("the mark", || interrupts.needs_reset_count() == 1);
        assert!(rig.balloon.stop_queue(queue).expect("queue").faulted());
    }
    let mut rig = Rig::new(false, 3);
    for _ in 0..2 {
        rig.statistics.add(&[Desc::readable(at, 10)]);
    }
    rig.statistics.kick();
    wait("two buffers", || rig.statistics.interrupt.needs_reset_count() == 1);
}

/// Bytes of the longest list of pages.
const MAX_LIST: u64 = 4 * 65536;

#[test]
fn calls_out_of_order_are_errors() {
    let driver = FakeDriver::new(8, false);
    let discarder = Discarder::new(driver.memory.clone(), RamOptions::default()).expect("page size");
    let options = BalloonOptions {
        free_page_reporting: false,
        ..ALL
    };
    let mut balloon = Balloon::new("_balloon", options, discarder, Box::new(|| ())).expect("balloon");
    assert_eq!(balloon.queue_sizes().len(), 3);
    assert!(balloon.start_queue(driver.queue()).is_err());
    balloon.activate(driver.context(0)).expect("activate");
    assert!(balloon.activate(driver.context(0)).is_err());
    balloon.start_queue(driver.queue()).expect("start");
    assert!(balloon.start_queue(driver.queue()).is_err(), "it runs");
    assert!(
        balloon.start_queue(FakeDriver::beside(&driver, 2).queue()).is_err(),
        "not negotiated"
    );
    assert!(balloon.stop_queue(1).is_none());
    assert!(balloon.stop_queue(0).is_some());
}

/// Bytes of memory that are not what they were before.
fn changed(memory: &GuestMemoryHandle, from: u64, pages: u64) -> Vec<u64> {
    let memory = memory.memory();
    let byte = |page: u64| {
        memory
            .read_obj::<u8>(GuestAddress((from + page) * BALLOON_PAGE))
            .expect("read")
    };
    (0..pages).filter(|page| byte(*page) != 7).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever pages go in and out, with whatever size of the host's pages: what is zero was in the balloon when it became so, and with
    /// small pages all of that is.
    #[test]
    fn nothing_but_the_balloons_pages_is_given_back(
        shift in prop::sample::select(vec![0u32, 2]),
        steps in prop::collection::vec((any::<bool>(), prop::collection::vec(0u32..40, 0..24)), 1..24),
    ) {
        let mut rig = Rig::new(true, 3);
        rig.balloon.halt().expect("job").huge = HugePages::new(BALLOON_PAGE << shift);
        rig.balloon.go_on().expect("go on");
        // As the guest would: it leaves pages in the balloon alone, and writes to the others.
        let mut inside = std::collections::BTreeSet::new();
        let parts = 1u64 << shift;
        (0..40).for_each(|page| rig.fill(PAGES + page));
        for (inflate, pages) in steps {
            for page in &pages {
                if inflate { inside.insert(u64::from(*page)) } else { inside.remove(&u64::from(*page)) };
            }
            let numbers: Vec<u32> = pages.iter().map(|page| PAGES as u32 + page).collect();
            if !numbers.is_empty() {
                rig.request(inflate, &numbers);
            }
            let zero = changed(&rig.inflate.memory, PAGES, 40);
            for page in &zero {
                prop_assert!(inside.contains(page) || !inflate, "page {} was not in the balloon", page);
            }
            for page in 0..40u64 {
                let whole = (page / parts * parts..(page / parts + 1) * parts).all(|part| inside.contains(&part));
                if whole && inflate {
                    prop_assert!(zero.contains(&page), "page {} was not given back", page);
                }
                if !inside.contains(&page) {
                    rig.fill(PAGES + page);
                }
            }
        }
    }

    #[test]
    fn nothing_a_driver_offers_breaks_us(
        raw in prop::collection::vec((0x1f_f000u64..0x20_1000, 0u32..9000, 0u16..8, 0u16..18), 16),
        heads in prop::collection::vec((0u16..4, 0u16..17), 1..16),
        config in prop::collection::vec((0u64..20, prop::collection::vec(any::<u8>(), 0..9)), 0..8),
    ) {
        let mut rig = Rig::new(false, 3);
        let table: Vec<Desc> = raw.iter().map(|&(addr, len, flags, next)| Desc { addr, len, flags, next }).collect();
        for (offset, data) in &config {
            rig.balloon.write_config(*offset, data);
        }
        for driver in [&mut rig.inflate, &mut rig.deflate, &mut rig.statistics, &mut rig.reporting] {
            driver.write_descriptors(&table);
        }
        for (queue, head) in &heads {
            let drivers = [&mut rig.inflate, &mut rig.deflate, &mut rig.statistics, &mut rig.reporting];
            let driver = drivers.into_iter().nth((*queue).into()).expect("driver");
            driver.offer(*head);
            driver.kick();
        }
        for index in 0..4 {
            prop_assert!(rig.balloon.stop_queue(index).is_some());
        }
    }
}
