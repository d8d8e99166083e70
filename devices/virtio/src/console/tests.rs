use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use triarch_legacy::console::Backend;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mock::{Desc, FakeDriver};

const DATA: u64 = 0x80_0000;

struct Rig {
    device: VirtioConsole,
    rx: FakeDriver,
    tx: FakeDriver,
    client: UnixStream,
    _dir: tempfile::TempDir,
}

fn rig(event_idx: bool) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let console = Arc::new(Console::open(&Backend::Socket(path.clone())).unwrap());
    let client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let rx = FakeDriver::new(16, event_idx);
    let tx = FakeDriver::beside(&rx, 1);
    let mut device = VirtioConsole::new("_console0", console);
    device.activate(rx.context(0)).unwrap();
    device.start_queue(rx.queue()).unwrap();
    device.start_queue(tx.queue()).unwrap();
    Rig {
        device,
        rx,
        tx,
        client,
        _dir: dir,
    }
}

impl Rig {
    fn put(&mut self, bytes: &[u8]) {
        self.tx.ram().write_slice(bytes, GuestAddress(DATA)).unwrap();
        let head = self.tx.add(&[Desc::readable(DATA, bytes.len() as u32)]);
        self.tx.kick();
        assert_eq!(self.tx.wait_used(), Some((head, 0)));
    }

    fn seen(&mut self, n: usize) -> Vec<u8> {
        let mut seen = vec![0; n];
        self.client.read_exact(&mut seen).unwrap();
        seen
    }

    /// Offers one buffer of `n` bytes and waits for what comes into it.
    fn get(&mut self, n: u32) -> Vec<u8> {
        let head = self.rx.add(&[Desc::writable(DATA, n)]);
        self.rx.kick();
        let (used, len) = self.rx.wait_used().expect("input");
        assert_eq!(used, head);
        assert!((1..=n).contains(&len), "{len} of {n}");
        let mut got = vec![0; len as usize];
        self.rx.ram().read_slice(&mut got, GuestAddress(DATA)).unwrap();
        got
    }
}

#[test]
fn bytes_go_both_ways() {
    for event_idx in [false, true] {
        let mut rig = rig(event_idx);
        for i in 0..50u8 {
            rig.put(&[i, b'x']);
            assert_eq!(rig.seen(2), [i, b'x']);
            rig.client.write_all(&[i, b'y']).unwrap();
            assert_eq!(rig.get(64), [i, b'y']);
        }
        assert!(rig.rx.interrupt.wait_queue(0));
    }
}

#[test]
fn input_interrupts_a_driver_that_already_waits() {
    let mut rig = rig(false);
    for i in 0..4 {
        rig.rx.add(&[Desc::writable(DATA + 16 * i, 16)]);
    }
    rig.rx.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        (rig.rx.used(), rig.rx.interrupt.queue_count(0)),
        (None, 0),
        "no input yet"
    );
    rig.client.write_all(b"0123456789abcdef+").unwrap();
    assert_eq!(rig.rx.wait_used().map(|u| u.1), Some(16));
    assert_eq!(rig.rx.wait_used().map(|u| u.1), Some(1));
    assert!(rig.rx.interrupt.wait_queue(0));
}

#[test]
fn more_buffers_than_a_turn_are_filled_from_one_notification() {
    let mut rig = rig(false);
    rig.device.stop_queue(0).unwrap();
    let mut rx = FakeDriver::new(256, false);
    rig.device.stop_queue(1).unwrap();
    rig.device.reset();
    rig.device.activate(rx.context(0)).unwrap();
    rig.device.start_queue(rx.queue()).unwrap();
    for _ in 0..200 {
        rx.add(&[Desc::writable(DATA, 1)]);
    }
    rig.client.write_all(&[b'x'; 200]).unwrap();
    for i in 0..200 {
        assert_eq!(rx.wait_used(), Some((i, 1)));
    }
}

#[test]
fn notifications_are_asked_for_where_they_are_needed() {
    let mut rig = rig(true);
    // avail_event, behind the used ring of queue 1.
    let asked = |rig: &Rig| -> u16 { rig.tx.ram().read_obj(GuestAddress(0x10_3000 + 4 + 8 * 16)).unwrap() };
    for i in 1..=3 {
        rig.put(b"x");
        for _ in 0..1000 {
            if asked(&rig) == i {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(asked(&rig), i, "or the driver would never notify of the next chain");
    }
}

#[test]
fn a_long_chain_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let console = Arc::new(Console::open(&Backend::File(path.clone())).unwrap());
    let rx = FakeDriver::new(16, false);
    let mut tx = FakeDriver::beside(&rx, 1);
    let mut device = VirtioConsole::new("_console0", console);
    device.activate(tx.context(0)).unwrap();
    device.start_queue(tx.queue()).unwrap();
    let table: Vec<Desc> = (0..200u16)
        .map(|i| Desc::readable(0x40_0000, 8 << 20).next(i + 1))
        .chain([Desc::readable(0x40_0000, 1)])
        .collect();
    tx.write_table(DATA + 0x10_0000, &table);
    let head = tx.add(&[Desc::indirect(DATA + 0x10_0000, 16 * table.len() as u32)]);
    tx.kick();
    assert_eq!(tx.wait_used(), Some((head, 0)));
    assert_eq!(fs::metadata(path).unwrap().len(), 1 << 20);
}

#[test]
fn stopping_loses_nothing() {
    let mut rig = rig(false);
    rig.client.write_all(b"before").unwrap();
    assert_eq!(rig.get(3), b"bef");
    let rx = rig.device.stop_queue(0).unwrap();
    rig.put(b"still");
    assert_eq!(rig.seen(5), b"still");
    let tx = rig.device.stop_queue(1).unwrap();
    assert!(rig.device.stop_queue(1).is_none());
    rig.client.write_all(b" after").unwrap();
    rig.device.start_queue(tx).unwrap();
    rig.device.start_queue(rx).unwrap();
    let mut got = Vec::new();
    while got.len() < 9 {
        got.extend(rig.get(64));
    }
    assert_eq!(got, b"ore after");
}

#[test]
fn the_configuration_space_has_size_and_emergency_output() {
    let mut rig = rig(false);
    assert_eq!(rig.device.features() & F_SIZE, 0, "a socket has no size");
    assert_ne!(rig.device.features() & F_EMERG_WRITE, 0);
    rig.device.stop_queue(0).unwrap();
    rig.device.write_config(8, &u32::from(b'!').to_le_bytes());
    rig.device.write_config(0, &[b'?'; 4]);
    rig.device.write_config(u64::MAX, &[b'?'; 4]);
    rig.device.write_config(8, &[]);
    rig.put(b".");
    assert_eq!(rig.seen(2), b"!.");
    rig.device.shared.size.store(pack(Some((80, 25))), Ordering::SeqCst);
    let mut config = [0xff; 16];
    rig.device.read_config(0, &mut config);
    assert_eq!(config, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_new_size_is_told_once_and_only_to_who_asked() {
    for (features, expected) in [(F_SIZE, 1), (0, 0)] {
        let console = Arc::new(Console::open(&Backend::Null).unwrap());
        let driver = FakeDriver::new(16, false);
        let mut device = VirtioConsole::new("_console0", console);
        device.activate(driver.context(features)).unwrap();
        let resizer = device.resizer();
        resizer.resized();
        assert_eq!(driver.interrupt.config_count(), 0, "nothing changed");
        device.shared.size.store(pack(Some((80, 25))), Ordering::SeqCst);
        resizer.resized();
        resizer.resized();
        assert_eq!(driver.interrupt.config_count(), expected);
        device.reset();
        device.shared.size.store(pack(Some((80, 25))), Ordering::SeqCst);
        resizer.resized();
        assert_eq!(driver.interrupt.config_count(), expected, "no driver after a reset");
    }
}

#[test]
fn calls_out_of_order_are_errors() {
    let mut rig = rig(false);
    assert!(rig.device.activate(rig.rx.context(0)).is_err());
    assert!(rig.device.start_queue(rig.rx.queue()).is_err(), "runs already");
    assert!(
        rig.device.start_queue(FakeDriver::beside(&rig.rx, 2).queue()).is_err(),
        "no such queue"
    );
    rig.put(b"goes on");
    assert_eq!(rig.seen(7), b"goes on");
    rig.device.stop_queue(0).unwrap();
    rig.device.stop_queue(1).unwrap();
    rig.device.reset();
    assert!(rig.device.start_queue(rig.rx.queue()).is_err(), "not active");
    rig.device.activate(rig.rx.context(0)).unwrap();
    rig.device.start_queue(rig.rx.queue()).unwrap();
}

fn wait_for_fault(driver: &FakeDriver) {
    for _ in 0..5000 {
        if driver.interrupt.needs_reset_count() > 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the device was not marked");
}

#[test]
fn malformed_requests_mark_the_device_and_it_still_stops() {
    let mut rig = rig(false);
    rig.rx.add(&[Desc::readable(DATA, 8), Desc::writable(DATA, 8)]);
    rig.rx.kick();
    wait_for_fault(&rig.rx);
    rig.put(b"the other queue goes on");
    assert_eq!(rig.seen(23).len(), 23);
    assert!(rig.device.stop_queue(0).unwrap().faulted());
    assert!(rig.device.stop_queue(1).is_some());

    let mut rig = self::rig(false);
    rig.tx.add(&[Desc::writable(DATA, 8)]);
    rig.tx.kick();
    wait_for_fault(&rig.tx);
    assert!(rig.device.stop_queue(1).unwrap().faulted());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_input_arrives_whole_in_any_buffers(
        sizes in prop::collection::vec(1u32..6000, 1..40),
        length in 1usize..150_000,
        event_idx: bool,
    ) {
        let mut rig = rig(event_idx);
        let sent: Vec<u8> = (0..length).map(|i| (i * 31 / 7) as u8).collect();
        let (mut writer, copy) = (rig.client.try_clone().unwrap(), sent.clone());
        let paste = std::thread::spawn(move || writer.write_all(&copy).unwrap());
        let mut got = Vec::new();
        let mut sizes = sizes.iter().cycle();
        while got.len() < length {
            got.extend(rig.get(*sizes.next().unwrap()));
        }
        paste.join().unwrap();
        prop_assert!(got == sent);
    }

    #[test]
    fn nothing_a_driver_offers_breaks_us(
        raw in prop::collection::vec((0x7f_f000u64..0x80_1000, 0u32..9000, 0u16..8, 0u16..10), 8),
        heads in prop::collection::vec(0u16..9, 1..8),
        receive: bool,
    ) {
        let mut rig = rig(false);
        let driver = if receive { &mut rig.rx } else { &mut rig.tx };
        let table: Vec<Desc> = raw.iter().map(|&(addr, len, flags, next)| Desc { addr, len, flags, next }).collect();
        driver.write_descriptors(&table);
        for head in &heads {
            driver.offer(*head);
        }
        driver.kick();
        rig.client.write_all(&[b'i'; 10_000]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        prop_assert!(rig.device.stop_queue(0).is_some());
        prop_assert!(rig.device.stop_queue(1).is_some());
        rig.device.reset();
    }
}
