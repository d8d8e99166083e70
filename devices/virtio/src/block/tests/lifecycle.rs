//! Starting, stopping, faults, configuration and everything else around requests.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::{QueueStateV1, feature as common};

#[test]
fn chains_that_are_no_request_need_a_reset() {
    for (readable, writable) in [(&[][..], 1), (&header(IN, 0)[..15], 513), (&header(OUT, 0)[..], 0)] {
        let mut rig = Rig::new();
        rig.offer(readable, writable, &Shape::default());
        rig.driver.kick();
        assert!(eventually(|| rig.driver.interrupt.needs_reset_count() > 0));
        assert_eq!(rig.driver.interrupt.needs_reset_count(), 1);
        assert_eq!(rig.driver.used(), None);
        assert!(rig.device.stop_queue(0).expect("the queue").faulted());
        // As the driver's reset does.
        rig.device.reset();
        rig.driver = FakeDriver::beside(&FakeDriver::new(256, false), 0);
        rig.device.activate(rig.driver.context(u64::MAX)).unwrap();
        rig.device.start_queue(rig.driver.queue()).unwrap();
        assert_eq!(rig.simple(IN, 0, &[], 512).status, OK);
    }
}

#[test]
fn many_requests_at_once_all_come_back_once() {
    for event_idx in [false, true] {
        let mut rig = Rig::with(false, Backend::Auto, event_idx, u64::MAX);
        let mut completed = 0u16;
        for round in 0..20u64 {
            let heads: HashSet<u16> = (0..80)
                .map(|i| {
                    let data = pattern(round * 100 + i, 512);
                    let out = [&header(OUT, i)[..], &data].concat();
                    rig.offer(
                        &out,
                        1,
                        &Shape {
                            cuts: vec![16],
                            indirect: false,
                        },
                    );
                    ((round * 240 + i * 3) % 256) as u16
                })
                .collect();
            rig.driver.kick();
            let mut seen = HashSet::new();
            for _ in 0..80 {
                let (head, used) = rig.driver.wait_used().expect("an answer");
                assert!(used == 1 && seen.insert(head), "{head} came twice");
                completed = completed.wrapping_add(1);
                rig.driver.set_used_event(completed);
            }
            assert_eq!(seen, heads);
        }
        assert_eq!(rig.driver.used(), None);
        let last: Vec<u8> = (0..80).flat_map(|i| pattern(1900 + i, 512)).collect();
        assert!(rig.content()[..80 * 512] == last);
    }
}

#[test]
fn offering_one_chain_again_and_again_stays_bounded() {
    let mut rig = Rig::new();
    rig.offer(&header(IN, 0), 513, &Shape::default());
    for _ in 0..255 {
        rig.driver.offer(0);
    }
    rig.driver.kick();
    for _ in 0..256 {
        assert_eq!(rig.driver.wait_used(), Some((0, 513)));
    }
    assert_eq!(rig.driver.used(), None);
    assert_eq!(rig.driver.interrupt.needs_reset_count(), 0);
}

#[test]
fn stopping_finishes_what_is_in_flight_and_starting_goes_on() {
    let mut rig = Rig::new();
    for round in 0..30u64 {
        for i in 0..20 {
            let out = [&header(OUT, i)[..], &pattern(round + i, 512)].concat();
            rig.offer(&out, 1, &Shape::default());
        }
        rig.driver.kick();
        let queue = rig.device.stop_queue(0).expect("the queue");
        let QueueStateV1 {
            next_avail, next_used, ..
        } = queue.state();
        assert_eq!(next_avail, next_used, "something is in flight");
        assert_eq!(rig.device.handle().counters().in_flight, 0);
        assert!(rig.device.stop_queue(0).is_none());
        // Offered while stopped, without another notification.
        rig.offer(&header(FLUSH, 0), 1, &Shape::default());
        let mut resumed = rig.driver.queue();
        resumed.restore(&queue.state());
        rig.device
            .start_queue(if round % 2 == 0 { queue } else { resumed })
            .unwrap();
        for _ in 0..21 {
            assert!(rig.driver.wait_used().is_some());
        }
    }
    assert!(rig.content()[..512] == pattern(29, 512));
}

#[test]
fn queues_have_their_own_named_threads() {
    let file = image();
    let disk = Disk::open(&DiskOptions::new(file.path())).unwrap();
    let mut device = Block::new("_disk7", disk, 3, 64).unwrap();
    assert_eq!(device.queue_sizes(), [64; 3]);
    assert_ne!(device.features() & feature::MQ, 0);
    let first = FakeDriver::new(64, false);
    let mut drivers: Vec<FakeDriver> = vec![FakeDriver::beside(&first, 1), FakeDriver::beside(&first, 2)];
    drivers.insert(0, first);
    device.activate(drivers[0].context(device.features())).unwrap();
    for driver in &drivers {
        device.start_queue(driver.queue()).unwrap();
    }
    assert!(device.start_queue(drivers[1].queue()).is_err(), "it runs already");
    for (i, driver) in (0u64..).zip(&mut drivers) {
        let at = DATA + i * 4096;
        driver.ram().write_slice(&header(FLUSH, 0), GuestAddress(at)).unwrap();
        driver.add(&[Desc::readable(at, 16), Desc::writable(at + 100, 1)]);
        driver.kick();
        assert!(driver.wait_used().is_some());
        assert!(eventually(|| driver.interrupt.queue_count(i as u16) == 1));
    }
    let names: HashSet<String> = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    for name in ["_disk7_q0", "_disk7_q1", "_disk7_q2"] {
        assert!(names.contains(name), "{names:?}");
    }
    assert_eq!(device.handle().counters().flushes.count, 3);
}

#[test]
fn the_life_cycle_is_enforced_and_numbers_are_checked() {
    let file = image();
    let disk = Disk::open(&DiskOptions::new(file.path())).unwrap();
    assert!(matches!(
        Block::new("d", Arc::clone(&disk), 0, 64),
        Err(BlockError::Queues(0))
    ));
    assert!(matches!(
        Block::new("d", Arc::clone(&disk), 257, 64),
        Err(BlockError::Queues(257))
    ));
    for size in [0, 2, 100, 2048] {
        assert!(matches!(
            Block::new("d", Arc::clone(&disk), 1, size),
            Err(BlockError::QueueSize(_))
        ));
    }
    let mut device = Block::new("d", disk, 1, 256).unwrap();
    let driver = FakeDriver::new(256, false);
    assert!(device.start_queue(driver.queue()).is_err());
    device.activate(driver.context(0)).unwrap();
    assert!(device.activate(driver.context(0)).is_err());
    assert!(device.start_queue(FakeDriver::beside(&driver, 1).queue()).is_err());
    assert!(device.stop_queue(0).is_none() && device.stop_queue(9).is_none());
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let rig = Rig::new();
    let mut space = [0xff; 64];
    rig.device.read_config(0, &mut space);
    let u16_at = |at: usize| u16::from_le_bytes(space[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), SECTORS);
    assert_eq!((u32_at(8), u32_at(12), u32_at(20)), (0, 254, 512));
    let geometry = *rig.device.handle().disk().geometry();
    assert_eq!(512 << space[24], geometry.physical_block);
    assert_eq!(u32::from(u16_at(26)) * 512, geometry.minimum_io);
    assert_eq!((space[32], u16_at(34)), (1, 1));
    assert_eq!((u32_at(36), u32_at(40)), (config::MAX_DISCARD_SECTORS, 1));
    assert_eq!(u32_at(44) * 512, geometry.discard_granularity);
    assert_eq!(
        (u32_at(48), u32_at(52), space[56]),
        (config::MAX_WRITE_ZEROES_SECTORS, 1, 1)
    );
    assert_eq!(space[57..], [0; 7]);
    let mut far = [1; 4];
    rig.device.read_config(u64::MAX - 1, &mut far);
    assert_eq!(far, [0; 4]);
    assert_eq!(rig.device.features() & common::COMMON, common::COMMON);
}

#[test]
fn the_write_cache_can_be_switched() {
    let mut rig = Rig::new();
    let writeback = |rig: &Rig| {
        let mut byte = [9];
        rig.device.read_config(32, &mut byte);
        byte[0]
    };
    assert_eq!(rig.simple(OUT, 0, &[5; 512], 0).status, OK);
    rig.device.write_config(32, &[0]);
    assert_eq!(writeback(&rig), 0);
    // What was in the cache is flushed without the driver asking.
    assert!(eventually(|| rig.device.handle().counters().flushes.count == 1));
    assert_eq!(rig.simple(OUT, 0, &[6; 512], 0).status, OK);
    let state = rig.device.state();
    assert_eq!(
        state,
        BlockStateV1 {
            size: SECTORS * 512,
            writeback: false
        }
    );
    rig.device.write_config(32, &[1]);
    rig.device.write_config(0, &[1, 2, 3, 4]);
    assert_eq!(writeback(&rig), 1);
    rig.device.restore(&state).unwrap();
    assert_eq!(writeback(&rig), 0);
    let larger = BlockStateV1 {
        size: state.size + 512,
        ..state
    };
    assert!(matches!(rig.device.restore(&larger), Err(BlockError::Capacity { .. })));
    // Only a driver that negotiated it may switch; one that cannot flush has no cache.
    let mut rig = Rig::with(false, Backend::Auto, false, !feature::CONFIG_WCE);
    rig.device.write_config(32, &[0]);
    assert_eq!(writeback(&rig), 1);
    let rig = Rig::with(false, Backend::Auto, false, !(feature::CONFIG_WCE | feature::FLUSH));
    assert_eq!(writeback(&rig), 0);
}

#[test]
fn a_resized_disk_is_announced() {
    let mut rig = Rig::new();
    let handle = rig.device.handle();
    assert_eq!(handle.refresh_size().unwrap(), None);
    assert_eq!(rig.driver.interrupt.config_count(), 0);
    rig.file.as_file().set_len(2 * SECTORS * 512).unwrap();
    assert_eq!(handle.refresh_size().unwrap(), Some(2 * SECTORS * 512));
    assert_eq!(rig.driver.interrupt.config_count(), 1);
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2 * SECTORS);
    assert_eq!(rig.simple(OUT, 2 * SECTORS - 1, &[1; 512], 0).status, OK);
    rig.device.stop_queue(0);
    rig.device.reset();
    rig.file.as_file().set_len(SECTORS * 512).unwrap();
    assert_eq!(handle.refresh_size().unwrap(), Some(SECTORS * 512));
    assert_eq!(rig.driver.interrupt.config_count(), 1, "nobody to tell");
}

#[test]
fn what_a_read_fills_is_marked_for_migration() {
    let mut rig = Rig::new();
    let (at, len) = (DATA + (1 << 20), 16385u64);
    let dirty = |rig: &Rig, at: u64| {
        let ram = rig.driver.ram();
        let region = ram.iter().next().unwrap();
        region.bitmap().dirty_at(at as usize)
    };
    rig.driver
        .ram()
        .write_slice(&header(IN, 0), GuestAddress(DATA))
        .unwrap();
    assert!(!(at..at + len).any(|at| dirty(&rig, at)));
    rig.driver.add(&[
        Desc::readable(DATA, 16),
        Desc::writable(at, 8192),
        Desc::writable(at + 8192, len as u32 - 8192),
    ]);
    rig.driver.kick();
    assert_eq!(rig.driver.wait_used().map(|u| u.1), Some(len as u32));
    assert!((at..at + len).all(|at| dirty(&rig, at)));
    assert!(!dirty(&rig, at + len + 4096));
}

#[test]
fn ranges_have_the_maximum_that_was_announced() {
    let mut rig = Rig::new();
    rig.file.as_file().set_len(4 << 30).unwrap();
    rig.device.handle().refresh_size().unwrap();
    for (kind, maximum) in [
        (DISCARD, config::MAX_DISCARD_SECTORS),
        (WRITE_ZEROES, config::MAX_WRITE_ZEROES_SECTORS),
    ] {
        assert_eq!(rig.simple(kind, 0, &range(0, maximum, 0), 0).status, OK);
        assert_eq!(rig.simple(kind, 0, &range(0, maximum + 1, 0), 0).status, IOERR);
    }
}

#[test]
fn a_worker_that_looks_needs_no_notification_and_sleeps_when_there_is_nothing() {
    for (backend, event_idx) in [(Backend::Auto, false), (Backend::Sync, true)] {
        let mut rig = Rig::with(false, backend, event_idx, u64::MAX);
        let queue = rig.device.stop_queue(0).expect("the queue");
        rig.device.set_look(Duration::from_millis(20));
        rig.device.start_queue(queue).unwrap();
        let handle = rig.device.handle();
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut spared = 0;
        for round in 0.. {
            let data = pattern(round, 512);
            let places = rig.offer(
                &[&header(OUT, round % SECTORS)[..], &data].concat(),
                1,
                &Shape::default(),
            );
            let wants = rig.driver.wants_kick();
            match wants {
                true => rig.driver.kick(),
                false => spared += 1,
            }
            let (_, used) = rig.driver.wait_used().expect("an answer");
            rig.driver.set_used_event((round + 1) as u16);
            assert_eq!(rig.collect(&places, used).status, OK);
            if handle.looks().found >= 20 && spared >= 20 {
                break;
            }
            assert!(Instant::now() < deadline, "{:?}, {spared}", handle.looks());
        }
        // With nothing to do it sleeps, and wants to be told again.
        rig.offer(&header(GET_ID, 0), 21, &Shape::default());
        rig.driver.kick();
        rig.driver.wait_used().expect("an answer");
        std::thread::sleep(Duration::from_millis(100));
        rig.offer(&header(GET_ID, 0), 21, &Shape::default());
        assert!(rig.driver.wants_kick());
        let vain = handle.looks().vain;
        assert!(vain > 0);
        rig.driver.kick();
        rig.driver.wait_used().expect("an answer");
        // After its look, which is the last one.
        eventually(|| handle.looks().vain > vain);
        let before = handle.looks();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(handle.looks(), before, "it looks while there is nothing");
        let asked = Instant::now();
        assert!(rig.device.stop_queue(0).is_some());
        assert!(asked.elapsed() < Duration::from_secs(5));
    }
}
