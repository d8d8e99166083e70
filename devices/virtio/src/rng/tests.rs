use std::fs::{self, OpenOptions};
use std::io::Write as _;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mock::{Desc, FakeDriver};

const DATA: u64 = 0x20_0000;

fn started(driver: &FakeDriver, source: EntropySource) -> VirtioRng {
    let mut rng = VirtioRng::new("_rng", source);
    rng.activate(driver.context(0)).unwrap();
    rng.start_queue(driver.queue()).unwrap();
    rng
}

fn bytes(driver: &FakeDriver, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    driver.ram().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    bytes
}

#[test]
fn requests_are_filled_with_different_bytes() {
    for event_idx in [false, true] {
        let mut driver = FakeDriver::new(8, event_idx);
        let mut rng = started(&driver, EntropySource::kernel());
        let mut seen = Vec::new();
        for _ in 0..20 {
            let head = driver.add(&[Desc::writable(DATA, 10), Desc::writable(DATA + 10, 22)]);
            driver.set_used_event(u16::MAX);
            driver.kick();
            assert_eq!(driver.wait_used(), Some((head, 32)));
            if event_idx {
                // avail_event: or the driver would never notify of the next request.
                let asked = || driver.ram().read_obj::<u16>(GuestAddress(0x3000 + 4 + 8 * 8)).unwrap();
                let waited = (0..1000).any(|_| {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    usize::from(asked()) == seen.len() + 1
                });
                assert!(waited);
            }
            let got = bytes(&driver, 33);
            assert_eq!(got[32], 0, "one byte too many");
            assert!(!seen.contains(&got));
            seen.push(got);
        }
        assert_eq!(rng.stop_queue(0).unwrap().state().next_used, 20);
    }
}

#[test]
fn a_request_takes_a_bounded_number_of_bytes() {
    let mut driver = FakeDriver::new(8, false);
    let mut rng = started(&driver, EntropySource::kernel());
    let head = driver.add(&[Desc::writable(DATA, 1 << 20)]);
    driver.kick();
    assert_eq!(driver.wait_used(), Some((head, REQUEST_MAX as u32)));
    assert!(driver.interrupt.wait_queue(0));
    assert_eq!(driver.interrupt.queue_count(0), 1);
    rng.stop_queue(0).unwrap();
}

#[test]
fn a_file_is_used_to_its_end_and_then_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed");
    fs::write(&path, b"0123456789").unwrap();
    let mut driver = FakeDriver::new(8, false);
    let mut rng = started(&driver, EntropySource::open(&path).unwrap());
    for (expected, n) in [(Some(&b"01234567"[..]), 8), (Some(&b"89"[..]), 2), (None, 8)] {
        driver.add(&[Desc::writable(DATA, 8)]);
        driver.kick();
        assert_eq!(driver.wait_used().map(|u| u.1), Some(n));
        if let Some(expected) = expected {
            assert_eq!(bytes(&driver, n as usize), expected);
        } else {
            assert_ne!(bytes(&driver, 8), b"89234567", "nothing new came");
        }
    }
    rng.stop_queue(0).unwrap();
    let mut source = EntropySource::open(&path).unwrap();
    for _ in 0..2 {
        source.fill(&mut [0; 16]).unwrap();
    }
    assert_eq!(raw([&source]), [-1], "it is closed");
    let missing = EntropySource::open(&dir.path().join("none")).err().expect("missing");
    assert!(missing.to_string().contains("none; give a readable device"));
    assert!(EntropySource::open(dir.path()).is_err(), "a directory");
}

#[test]
fn a_dry_device_holds_requests_back_without_holding_us_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hwrng");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    // Keeps the pipe from looking ended.
    let mut feed = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut driver = FakeDriver::new(8, false);
    let mut rng = started(&driver, EntropySource::open(&path).unwrap());
    driver.add(&[Desc::writable(DATA, 4)]);
    driver.kick();
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(driver.used(), None);
    let queue = rng.stop_queue(0).expect("stops although a request waits");
    assert_eq!(queue.state().next_avail, 0, "the request is still the driver's");
    rng.start_queue(queue).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    feed.write_all(b"late").unwrap();
    assert_eq!(driver.wait_used(), Some((0, 4)));
    assert_eq!(bytes(&driver, 4), b"late");
    rng.stop_queue(0).unwrap();
}

#[test]
fn malformed_requests_mark_the_device_and_it_still_stops() {
    let bad: [&[Desc]; 2] = [
        &[Desc::readable(DATA, 8)],
        &[Desc::readable(DATA, 8), Desc::writable(DATA, 8)],
    ];
    for request in bad {
        let mut driver = FakeDriver::new(8, false);
        let mut rng = started(&driver, EntropySource::kernel());
        driver.add(request);
        driver.kick();
        for _ in 0..5000 {
            if driver.interrupt.needs_reset_count() > 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(driver.interrupt.needs_reset_count(), 1);
        assert!(rng.stop_queue(0).unwrap().faulted());
        rng.reset();
        rng.activate(driver.context(0)).unwrap();
    }
}

#[test]
fn calls_out_of_order_are_errors() {
    let driver = FakeDriver::new(8, false);
    let mut rng = VirtioRng::new("_rng", EntropySource::kernel());
    assert!(rng.start_queue(driver.queue()).is_err());
    rng.activate(driver.context(0)).unwrap();
    assert!(rng.activate(driver.context(0)).is_err());
    assert!(rng.stop_queue(0).is_none());
    rng.start_queue(driver.queue()).unwrap();
    assert!(rng.start_queue(driver.queue()).is_err());
    assert!(rng.stop_queue(1).is_none());
    assert!(rng.stop_queue(0).is_some(), "the first goes on meanwhile");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nothing_a_driver_offers_breaks_us(
        raw in prop::collection::vec((0x1f_f000u64..0x20_1000, 0u32..5000, 0u16..8, 0u16..10), 8),
        heads in prop::collection::vec(0u16..9, 1..8),
    ) {
        let mut driver = FakeDriver::new(8, false);
        let mut rng = started(&driver, EntropySource::kernel());
        let table: Vec<Desc> = raw.iter().map(|&(addr, len, flags, next)| Desc { addr, len, flags, next }).collect();
        driver.write_descriptors(&table);
        for head in &heads {
            driver.offer(*head);
        }
        driver.kick();
        let mut answered = 0;
        while answered < heads.len() && driver.interrupt.needs_reset_count() == 0 {
            match driver.used() {
                Some((_, len)) => {
                    prop_assert!((1..=REQUEST_MAX as u32).contains(&len));
                    answered += 1;
                }
                None => std::thread::yield_now(),
            }
        }
        prop_assert!(rng.stop_queue(0).is_some());
    }
}
