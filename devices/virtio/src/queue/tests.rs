//! The device's side of a ring, driven well and badly.

use proptest::prelude::*;

use crate::mock::{Desc, FakeDriver};

const DATA: u64 = 0x8000;

fn faults(descriptors: &[Desc], head: u16) -> bool {
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    driver.write_descriptors(descriptors);
    driver.offer(head);
    let popped = queue.pop();
    assert_eq!(popped.is_none(), queue.faulted());
    assert_eq!(driver.interrupt.needs_reset_count() > 0, queue.faulted());
    queue.faulted()
}

#[test]
fn a_request_goes_through_and_interrupts() {
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    driver.add(&[
        Desc::readable(DATA, 16),
        Desc::writable(DATA + 64, 512),
        Desc::writable(DATA + 1024, 1),
    ]);
    let chain = queue.pop().expect("a chain");
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 513));
    assert!(queue.pop().is_none());
    queue.complete(chain.head(), 513);
    queue.signal();
    assert_eq!(driver.used(), Some((chain.head(), 513)));
    assert_eq!(driver.interrupt.queue_count(0), 1);
}

#[test]
fn no_interrupt_is_respected() {
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    driver.set_no_interrupt(true);
    driver.add(&[Desc::readable(DATA, 16)]);
    let chain = queue.pop().expect("a chain");
    queue.complete(chain.head(), 0);
    queue.signal();
    assert_eq!(driver.interrupt.queue_count(0), 0);
}

#[test]
fn event_index_decides_about_interrupts() {
    let mut driver = FakeDriver::new(8, true);
    let mut queue = driver.queue();
    driver.set_used_event(1);
    for expected in [0, 1] {
        driver.add(&[Desc::readable(DATA, 16)]);
        let chain = queue.pop().expect("a chain");
        queue.complete(chain.head(), 0);
        queue.signal();
        assert_eq!(driver.interrupt.queue_count(0), expected);
    }
}

#[test]
fn chains_completed_together_appear_together() {
    let mut driver = FakeDriver::new(4, true);
    let mut queue = driver.queue();
    // Twice round the ring, with the event index in the middle of what is completed.
    for round in 0..3u16 {
        driver.set_used_event(round * 3 + 1);
        for _ in 0..3 {
            driver.add(&[Desc::writable(DATA, 16)]);
        }
        let heads: Vec<u16> = std::iter::from_fn(|| queue.pop().map(|c| c.head())).collect();
        let done: Vec<(u16, u32)> = heads.iter().copied().zip(1..).collect();
        queue.complete_all(&[]);
        assert_eq!(driver.used(), None);
        queue.complete_all(&done);
        queue.signal();
        assert_eq!(std::iter::from_fn(|| driver.used()).collect::<Vec<_>>(), done);
        assert_eq!(driver.interrupt.queue_count(0), u64::from(round) + 1);
        queue.signal();
        assert_eq!(driver.interrupt.queue_count(0), u64::from(round) + 1, "nothing new");
    }
}

#[test]
fn indirect_tables_are_followed() {
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    driver.write_table(
        0x6000,
        &[Desc::readable(DATA, 16).next(1), Desc::writable(DATA + 64, 8)],
    );
    driver.add(&[Desc::indirect(0x6000, 32)]);
    let chain = queue.pop().expect("a chain");
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 8));
}

#[test]
fn broken_chains_mark_the_device() {
    let looping = [Desc::readable(DATA, 8).next(1), Desc::readable(DATA, 8).next(0)];
    assert!(faults(&looping, 0), "loop");
    assert!(faults(&[Desc::readable(DATA, 8).next(0)], 0), "self loop");
    assert!(faults(&[Desc::readable(DATA, 8).next(9)], 0), "next past the table");
    assert!(faults(&[Desc::readable(DATA, 8)], 8), "head past the table");
    assert!(faults(&[Desc::readable(DATA, 0)], 0), "empty buffer");
    assert!(faults(&[Desc::readable(1 << 40, 8)], 0), "out of memory");
    assert!(faults(&[Desc::readable(u64::MAX - 3, 8)], 0), "wraps");
    assert!(
        faults(&[Desc::writable(DATA, 8).next(1), Desc::readable(DATA, 8)], 0),
        "wrong direction"
    );
    assert!(
        faults(&[Desc::indirect(0x6000, 16).next(1), Desc::readable(DATA, 8)], 0),
        "indirect and next"
    );
    assert!(faults(&[Desc::indirect(0x6000, 17)], 0), "odd indirect table");
    assert!(faults(&[Desc::indirect(0x6000, 0)], 0), "empty indirect table");
    assert!(
        faults(&[Desc::indirect(1 << 40, 16)], 0),
        "indirect table out of memory"
    );
    assert!(!faults(&[Desc::readable(DATA, 8)], 0), "a good one does not");
}

#[test]
fn a_faulted_queue_stays_silent() {
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    driver.set_avail_index(100);
    assert!(queue.pop().is_none());
    assert!(queue.faulted());
    driver.set_avail_index(0);
    driver.add(&[Desc::readable(DATA, 8)]);
    assert!(queue.pop().is_none());
    assert!(!queue.arm(), "a worker must not spin on it");
}

#[test]
fn state_moves_to_another_queue() {
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    for _ in 0..3 {
        driver.add(&[Desc::readable(DATA, 8)]);
    }
    let first = queue.pop().expect("a chain");
    queue.complete(first.head(), 0);
    let mut restored = driver.queue();
    restored.restore(&queue.state());
    assert_eq!(restored.pop().map(|c| c.head()), Some(1));
    assert_eq!(restored.pop().map(|c| c.head()), Some(2));
    assert!(restored.pop().is_none());
}

fn any_desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![0u64..0x2_0000, any::<u64>()];
    let len = prop_oneof![0u32..64, any::<u32>()];
    (addr, len, 0u16..8, 0u16..12).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #[test]
    fn nothing_a_driver_writes_panics_or_spins(
        descriptors in prop::collection::vec(any_desc(), 8),
        table in prop::collection::vec(any_desc(), 4),
        heads in prop::collection::vec(0u16..10, 1..8),
    ) {
        let mut driver = FakeDriver::new(8, false);
        let mut queue = driver.queue();
        driver.write_descriptors(&descriptors);
        driver.write_table(0x6000, &table);
        let offered = heads.len();
        for head in heads {
            driver.offer(head);
        }
        let mut popped = 0;
        while let Some(chain) = queue.pop() {
            popped += 1;
            let memory = queue.memory();
            let mut vectors = Vec::new();
            crate::iovecs(&memory, chain.readable(), &mut vectors).expect("checked");
            crate::iovecs(&memory, chain.writable(), &mut vectors).expect("checked");
            queue.complete(chain.head(), chain.writable_len());
            queue.signal();
        }
        prop_assert!(popped == offered || queue.faulted());
        prop_assert_eq!(queue.faulted(), driver.interrupt.needs_reset_count() > 0);
    }
}

#[test]
fn a_killed_process_s_requests_come_again_and_once() {
    use super::InflightQueue;
    use std::sync::Arc;
    let region = Arc::new(vm_memory::MmapRegion::new(InflightQueue::bytes(8)).expect("memory"));
    let tracked = |queue: &mut crate::VirtQueue| {
        let part = InflightQueue::new(region.clone(), 0, 8).expect("it fits");
        queue.track(part).expect("a sound region")
    };
    let mut driver = FakeDriver::new(8, false);
    let mut queue = driver.queue();
    assert_eq!(tracked(&mut queue), 0);
    for _ in 0..4 {
        driver.add(&[Desc::readable(DATA, 16)]);
    }
    let heads: Vec<u16> = (0..3).filter_map(|_| queue.pop()).map(|c| c.head()).collect();
    queue.complete(heads[1], 0);
    drop(queue);

    let mut queue = driver.queue();
    assert_eq!(tracked(&mut queue), 2);
    assert_eq!(queue.pop().map(|c| c.head()), Some(heads[0]));
    queue.unpop();
    let mut again: Vec<u16> = std::iter::from_fn(|| queue.pop()).map(|c| c.head()).collect();
    assert_eq!(again[..2], [heads[0], heads[2]]);
    // And the one that was never taken.
    assert_eq!(again.len(), 3);
    again.iter().for_each(|head| queue.complete(*head, 0));
    again.insert(0, heads[1]);
    assert_eq!(
        std::iter::from_fn(|| driver.used())
            .map(|(head, _)| head)
            .collect::<Vec<_>>(),
        again
    );
    drop(queue);
    assert_eq!(tracked(&mut driver.queue()), 0);
}
