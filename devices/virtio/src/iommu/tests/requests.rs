//! The device as its driver sees it, and a device behind it.

use super::*;

const REQUEST: u64 = 0x8_0000;
const ANSWER: u64 = 0x8_1000;
const EVENT: u64 = 0x8_2000;
/// How far addresses of the device behind it are from where things are.
const OFFSET: u64 = 1 << 40;
const DEVICE: u32 = 0x28;

/// A guest with an IOMMU whose driver runs.
struct Guest {
    device: VirtioIommu,
    requests: FakeDriver,
    events: FakeDriver,
}

impl Guest {
    fn new() -> Self {
        Self::with_features(bit::ALL)
    }

    fn with_features(features: u64) -> Self {
        let requests = FakeDriver::new(16, true);
        let events = FakeDriver::beside(&requests, 1);
        let region = ReservedRegion::Messages(0xfee0_0000..=0xfeef_ffff);
        let mut device = VirtioIommu::new("_iommu", vec![region]).expect("a device");
        device.activate(requests.context(features)).expect("active");
        device.start_queue(requests.queue()).expect("requests");
        device.start_queue(events.queue()).expect("events");
        Self {
            device,
            requests,
            events,
        }
    }

    /// Sends `bytes` with `room` for an answer; what was written of it.
    fn send(&mut self, bytes: &[u8], room: u32) -> Vec<u8> {
        let ram = self.requests.ram();
        ram.write_slice(bytes, GuestAddress(REQUEST)).expect("memory");
        ram.write_slice(&vec![0xee; room as usize], GuestAddress(ANSWER))
            .expect("memory");
        drop(ram);
        let mut chain = Vec::new();
        if !bytes.is_empty() {
            chain.push(Desc::readable(REQUEST, bytes.len() as u32));
        }
        if room > 0 {
            chain.push(Desc::writable(ANSWER, room));
        }
        self.requests.add(&chain);
        self.requests.kick();
        let (_, written) = self.requests.wait_used().expect("an answer");
        let mut answer = vec![0; written as usize];
        self.requests
            .ram()
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .expect("memory");
        answer
    }

    fn ask(&mut self, request: &[u8]) -> u8 {
        let answer = self.send(request, 4);
        assert_eq!(answer[1..], [0; 3]);
        answer[0]
    }

    fn attach(&mut self, domain: u32, flags: u32) -> u8 {
        self.ask(&fields(1, &[domain, DEVICE, flags, 0]))
    }

    fn map(&mut self, domain: u32, first: u64, last: u64, phys: u64, flags: u32) -> u8 {
        let mut request = fields(3, &[domain]);
        [first, last, phys]
            .iter()
            .for_each(|at| request.extend(at.to_le_bytes()));
        request.extend(flags.to_le_bytes());
        self.ask(&request)
    }

    fn unmap(&mut self, domain: u32, first: u64, last: u64) -> u8 {
        let mut request = fields(4, &[domain]);
        [first, last].iter().for_each(|at| request.extend(at.to_le_bytes()));
        request.extend([0; 4]);
        self.ask(&request)
    }

    /// The next fault: its reason, flags, endpoint and address.
    fn fault(&mut self) -> (u8, u32, u32, u64) {
        self.events.add(&[Desc::writable(EVENT, 24)]);
        self.events.kick();
        assert_eq!(self.events.wait_used().expect("a fault").1, 24);
        let ram = self.events.ram();
        let read = |at| ram.read_obj::<u32>(GuestAddress(EVENT + at)).expect("memory");
        let address = ram.read_obj(GuestAddress(EVENT + 16)).expect("memory");
        (read(0) as u8, read(4), read(8), address)
    }
}

fn fields(kind: u8, words: &[u32]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes
}

const OK: u8 = 0;

#[test]
fn its_configuration_tells_what_may_be_mapped() {
    let mut device = VirtioIommu::new("_iommu", Vec::new()).expect("a device");
    let config = |device: &VirtioIommu| {
        let mut bytes = [0; 40];
        device.read_config(0, &mut bytes);
        bytes
    };
    let bytes = config(&device);
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8"));
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4"));
    assert_eq!([long(0), long(8), long(16)], [!0xfff, 0, LAST_ADDRESS]);
    assert_eq!([word(24), word(28), word(32)], [0, LAST_DOMAIN, PROPERTIES as u32]);
    assert_eq!(bytes[36..], [1, 0, 0, 0]);
    for (offset, data, now) in [(36, &[2][..], 1), (36, &[0, 0], 1), (32, &[0], 1), (36, &[0], 0)] {
        device.write_config(offset, data);
        assert_eq!(config(&device)[36], now);
    }
    // It stays when the driver goes.
    device.reset();
    assert_eq!(config(&device)[36], 0);
}

#[test]
fn every_request_is_answered() {
    let mut guest = Guest::new();
    let endpoint = guest.device.handle().endpoint(None);
    assert_eq!(guest.attach(1, 0), Status::NoEntry as u8);
    endpoint.place(DEVICE).expect("nothing follows");
    assert_eq!(guest.attach(1, 2), Status::Invalid as u8);
    assert_eq!(guest.attach(1, 0), OK);
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0, RW), OK);
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0, RW), Status::Invalid as u8);
    assert_eq!(guest.map(9, 0x1000, 0x1fff, 0, RW), Status::NoEntry as u8);
    assert_eq!(guest.unmap(1, 0x1000, 0x1fff), OK);
    assert_eq!(guest.ask(&fields(2, &[1, DEVICE, 0, 0])), OK);
    // Not of a form there is.
    assert_eq!(guest.ask(&fields(77, &[1, DEVICE, 0, 0])), Status::Unsupported as u8);
    assert_eq!(
        guest.ask(&fields(1, &[1, DEVICE, 0, 1])),
        Status::Invalid as u8,
        "reserved"
    );
    assert_eq!(guest.ask(&fields(1, &[1, DEVICE, 0])), Status::Invalid as u8, "short");
    assert_eq!(
        guest.ask(&fields(1, &[1, DEVICE, 0, 0, 0])),
        Status::Invalid as u8,
        "long"
    );
    assert_eq!(guest.ask(&[1, 1, 0, 0]), Status::Invalid as u8);
    assert_eq!(guest.ask(&[0; 4096]), Status::Invalid as u8);
    assert_eq!(guest.ask(&[]), Status::Invalid as u8);
    assert_eq!(
        guest.send(&fields(1, &[1, DEVICE, 0, 0]), 3),
        [0; 0],
        "no room for a status"
    );
    let answer = guest.send(&fields(1, &[1, DEVICE, 0, 0]), 9);
    assert_eq!(answer, [0, 0, 0, 0, 0, Status::Invalid as u8, 0, 0, 0]);
    assert_eq!(guest.device.handle().count(), (1, 0, 0));
    assert_eq!(guest.requests.interrupt.needs_reset_count(), 0);
}

#[test]
fn a_probe_tells_what_must_not_be_mapped() {
    let mut guest = Guest::new();
    let endpoint = guest.device.handle().endpoint(None);
    let mut request = fields(5, &[DEVICE]);
    request.extend([0; 64]);
    let room = PROPERTIES as u32 + 4;
    let answer = guest.send(&request, room);
    assert_eq!(answer[PROPERTIES], Status::NoEntry as u8);
    endpoint.place(DEVICE).expect("nothing follows");
    let answer = guest.send(&request, room);
    assert_eq!(answer[PROPERTIES..], [0; 4]);
    assert_eq!(answer[..8], [1, 0, 20, 0, 1, 0, 0, 0]);
    assert_eq!(
        answer[8..24],
        [0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xff, 0xff, 0xef, 0xfe, 0, 0, 0, 0]
    );
    assert!(answer[24..PROPERTIES].iter().all(|byte| *byte == 0));
    assert_eq!(guest.send(&request, 4)[0], Status::Invalid as u8);
}

#[test]
fn a_driver_that_knows_no_bypass_gets_none() {
    let mut guest = Guest::with_features(bit::ALL & !bit::BYPASS_CONFIG);
    let endpoint = guest.device.handle().endpoint(None);
    endpoint.place(DEVICE).expect("nothing follows");
    assert_eq!(guest.attach(1, 1), Status::Invalid as u8);
    assert!(endpoint.translate(0, 1, false, 1).is_none());
    guest.device.stop_queue(0);
    guest.device.stop_queue(1);
    guest.device.reset();
    assert!(endpoint.translate(0, 1, false, 1).is_some());
}

/// All memory is mapped `OFFSET` higher, in two halves that are in one piece behind it.
fn mapped(guest: &mut Guest) -> Arc<Endpoint> {
    let endpoint = guest.device.handle().endpoint(None);
    endpoint.place(DEVICE).expect("nothing follows");
    assert_eq!(guest.attach(1, 0), OK);
    let half = MEMORY / 2;
    assert_eq!(guest.map(1, OFFSET, OFFSET + half - 1, 0, RW), OK);
    assert_eq!(guest.map(1, OFFSET + half, OFFSET + MEMORY - 1, half, RW), OK);
    endpoint
}

#[test]
fn a_device_behind_it_has_rings_and_buffers_where_they_are_mapped() {
    let mut guest = Guest::new();
    let endpoint = mapped(&mut guest);
    let mut driver = FakeDriver::beside(&guest.requests, 2);
    assert!(driver.queue_behind(endpoint.clone(), 0).is_err(), "not mapped there");
    // That was told: rings are looked at one after the other until one is not there.
    assert_eq!(guest.fault().3, 0x20_1000);
    let mut queue = driver.queue_behind(endpoint.clone(), OFFSET).expect("rings");
    let half = MEMORY / 2;
    driver.add(&[
        Desc::readable(OFFSET + half - 8, 16),
        Desc::writable(OFFSET + 0x9000, 8),
    ]);
    let chain = queue.pop().expect("a chain");
    let segment = |addr, len| Segment {
        addr: GuestAddress(addr),
        len,
    };
    assert_eq!(chain.readable(), [segment(half - 8, 16)]);
    assert_eq!(chain.writable(), [segment(0x9000, 8)]);
    queue.complete(chain.head(), 8);
    assert_eq!(driver.used(), Some((chain.head(), 8)));
    assert!(!queue.arm());
    // An indirect table is looked up, too.
    driver.write_table(0x9800, &[Desc::writable(OFFSET + 0xa000, 4)]);
    driver.add(&[Desc::indirect(OFFSET + 0x9800, 16)]);
    assert_eq!(queue.pop().expect("a chain").writable(), [segment(0xa000, 4)]);
}

#[test]
fn a_buffer_in_pieces_becomes_several() {
    let mut guest = Guest::new();
    let endpoint = mapped(&mut guest);
    for (page, phys) in [(0, 0x5000), (1, 0x9000), (2, 0x7000)] {
        let first = 0x10_0000 + page * PAGE;
        assert_eq!(guest.map(1, first, first + PAGE - 1, phys, RW), OK);
    }
    let mut driver = FakeDriver::beside(&guest.requests, 2);
    let mut queue = driver.queue_behind(endpoint, OFFSET).expect("rings");
    driver.add(&[Desc::readable(OFFSET, 4), Desc::writable(0x10_0800, 0x2000)]);
    let chain = queue.pop().expect("a chain");
    let pieces: Vec<_> = chain.writable().iter().map(|piece| (piece.addr.0, piece.len)).collect();
    assert_eq!(pieces, [(0x5800, 0x800), (0x9000, 0x1000), (0x7000, 0x800)]);
    assert_eq!((chain.readable_len(), chain.writable_len()), (4, 0x2000));
}

#[test]
fn what_is_not_mapped_is_a_fault_that_the_driver_hears_of() {
    let mut guest = Guest::new();
    let endpoint = mapped(&mut guest);
    assert_eq!(guest.map(1, 0x1000, 0x1fff, 0x5000, access::READ), OK);
    for (buffer, flags, address) in [
        (Desc::readable(0x4_0008, 8), 0x101, 0x4_0008),
        (Desc::writable(0x1ff8, 8), 0x102, 0x1ff8),
        (Desc::readable(0x1ff8, 16), 0x101, 0x2000),
        // Mapped, but no memory.
        (Desc::readable(u64::MAX, 16), 0x101, u64::MAX),
    ] {
        let mut driver = FakeDriver::beside(&guest.requests, 2);
        let mut queue = driver.queue_behind(endpoint.clone(), OFFSET).expect("rings");
        driver.add(&[buffer]);
        let before = guest.requests.interrupt.needs_reset_count();
        assert!(queue.pop().is_none() && queue.faulted());
        assert_eq!(guest.requests.interrupt.needs_reset_count(), before + 1);
        assert_eq!(guest.fault(), (2, flags, DEVICE, address));
        driver.set_avail_index(0);
    }
    // One that is mapped where there is no memory is no fault of the IOMMU's.
    assert_eq!(guest.map(1, 0x10_0000, 0x10_0fff, 1 << 40, RW), OK);
    let mut driver = FakeDriver::beside(&guest.requests, 2);
    let mut queue = driver.queue_behind(endpoint.clone(), OFFSET).expect("rings");
    driver.add(&[Desc::readable(0x10_0000, 16)]);
    assert!(queue.pop().is_none() && queue.faulted());
    // In no domain, and not let through.
    guest.device.write_config(36, &[0]);
    assert_eq!(guest.ask(&fields(2, &[1, DEVICE, 0, 0])), OK);
    assert!(!queue.has_more());
    assert!(endpoint.translate(7, 1, false, 1).is_none());
    assert_eq!(guest.fault(), (1, 0x101, DEVICE, 7));
}

#[test]
fn a_ring_that_is_unmapped_stops_its_queue() {
    let mut guest = Guest::new();
    let endpoint = mapped(&mut guest);
    let mut driver = FakeDriver::beside(&guest.requests, 2);
    let mut queue = driver.queue_behind(endpoint, OFFSET).expect("rings");
    driver.add(&[Desc::readable(OFFSET, 4)]);
    let chain = queue.pop().expect("a chain");
    assert_eq!(guest.unmap(1, 0, u64::MAX), OK);
    queue.complete(chain.head(), 0);
    queue.signal();
    assert!(queue.faulted() && !queue.arm() && queue.pop().is_none());
    assert_eq!(driver.used(), None);
}

#[test]
fn faults_that_nobody_takes_are_few() {
    let mut guest = Guest::new();
    let endpoint = mapped(&mut guest);
    (0..1000).for_each(|_| assert!(endpoint.translate(7, 1, false, 1).is_none()));
    let mut told = 0;
    while told < 64 {
        assert_eq!(guest.fault(), (2, 0x101, DEVICE, 7));
        told += 1;
    }
    guest.events.add(&[Desc::writable(EVENT, 24)]);
    guest.events.kick();
    // One was taken from the waiting ones at once, which left room for another.
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(guest.events.used().is_none_or(|_| guest.events.used().is_none()));
    guest.device.stop_queue(1);
    guest.device.stop_queue(0);
}

#[test]
fn a_buffer_for_faults_must_have_room() {
    let mut guest = Guest::new();
    let endpoint = mapped(&mut guest);
    guest.events.add(&[Desc::writable(EVENT, 23)]);
    assert!(endpoint.translate(7, 1, false, 1).is_none());
    for _ in 0..5000 {
        if guest.events.interrupt.needs_reset_count() == 1 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("the driver was not told");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a driver sends, it gets an answer, and the device goes on.
    #[test]
    fn any_bytes_are_answered(requests in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..90), 0u32..600), 1..8)) {
        let mut guest = Guest::new();
        let endpoint = guest.device.handle().endpoint(None);
        endpoint.place(DEVICE).expect("nothing follows");
        for (mut bytes, room) in requests {
            if bytes.is_empty() && room == 0 {
                continue;
            }
            if let Some(first) = bytes.first_mut() {
                *first %= 8;
            }
            let answer = guest.send(&bytes, room);
            prop_assert_eq!(answer.len(), if room < 4 { 0 } else { room as usize });
        }
        prop_assert_eq!(guest.requests.interrupt.needs_reset_count(), 0);
        prop_assert_eq!(guest.map(LAST_DOMAIN, 0, 0xfff, 0, RW), Status::NoEntry as u8);
    }

    /// The same of what is inside of requests.
    #[test]
    fn any_request_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        if let Ok(Request::Map { mapping, .. }) = Request::parse(&bytes) {
            prop_assert_eq!((bytes.len(), bytes[0]), (36, 3));
            prop_assert_eq!(&mapping.first.to_le_bytes()[..], &bytes[8..16]);
        }
    }
}
