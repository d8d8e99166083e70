//! Guests of memory and rings, without front ends.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use proptest::prelude::*;
use triarch_device_core::NoSandbox;
use triarch_virtio::mock::{Desc, FakeDriver};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::features::{MRG_RXBUF, VERSION_1, offered};
use crate::switch::bucket::{Limit, Rate};
use crate::switch::frame::{BROADCAST, Mac};
use crate::switch::guard::Guard;
use crate::switch::rules::Vlans;
use crate::switch::{Counters, Drop};

/// Where guests keep what they send and receive.
const TX_AT: u64 = 0x20_0000;
const RX_AT: u64 = 0x40_0000;

struct Net {
    plane: PlaneHandle,
    thread: Option<JoinHandle<()>>,
}

impl Net {
    fn new(options: PlaneOptions) -> Self {
        let (plane, thread) = PlaneHandle::start(options, &(Arc::new(NoSandbox) as Arc<_>)).expect("a plane");
        let thread = Some(thread);
        Self { plane, thread }
    }

    fn call<T: Send + 'static>(&self, errand: impl FnOnce(&mut Plane) -> T + Send + 'static) -> T {
        self.plane.call(errand).expect("the plane runs")
    }

    fn guest(&self, name: &'static str, rules: Rules, features: u64) -> Station {
        let key = self
            .call(move |plane| plane.add_guest_port(name, rules, 1))
            .expect("a port");
        let rx = FakeDriver::new(256, true);
        let tx = FakeDriver::beside(&rx, 1);
        let mut context = rx.context(features);
        context.features = features;
        let (rx_queue, tx_queue) = (rx.queue(), tx.queue());
        self.call(move |plane| {
            plane.attach(key, &context).expect("attach");
            plane.start_queue(key, rx_queue).expect("start");
            plane.start_queue(key, tx_queue).expect("start");
        });
        let header = if features & (VERSION_1 | MRG_RXBUF) != 0 {
            12
        } else {
            10
        };
        Station {
            key,
            rx,
            tx,
            posted: 0,
            header,
        }
    }

    fn counters(&self, of: &Station) -> Counters {
        let key = of.key;
        self.call(move |plane| plane.switch.counters(key.id).cloned())
            .expect("counters")
    }
}

impl std::ops::Drop for Net {
    fn drop(&mut self) {
        self.plane.end();
        let _ = self.thread.take().expect("a thread").join();
    }
}

struct Station {
    key: PortKey,
    rx: FakeDriver,
    tx: FakeDriver,
    posted: u64,
    header: usize,
}

impl Station {
    fn post(&mut self, size: u32) {
        let at = RX_AT + (self.posted % 300) * 0x8000;
        self.posted += 1;
        self.rx.add(&[Desc::writable(at, size)]);
    }

    fn send(&mut self, header: &[u8], frame: &[u8], cuts: &[usize]) {
        let packet = [&header[..self.header], frame].concat();
        self.tx.ram().write_slice(&packet, GuestAddress(TX_AT)).expect("write");
        let mut ends: Vec<usize> = cuts
            .iter()
            .map(|cut| cut % packet.len())
            .filter(|cut| *cut > 0)
            .collect();
        ends.push(packet.len());
        ends.sort_unstable();
        ends.dedup();
        let mut from = 0;
        let parts: Vec<Desc> = ends
            .iter()
            .map(|end| {
                let part = Desc::readable(TX_AT + from as u64, (end - from) as u32);
                from = *end;
                part
            })
            .collect();
        self.tx.add(&parts);
        self.tx.kick();
        assert_eq!(
            self.tx.wait_used().map(|(_, n)| n),
            Some(0),
            "what was sent is given back"
        );
    }

    fn plain(&mut self, frame: &[u8]) {
        self.send(&[0; 12], frame, &[]);
    }

    /// The next packet, header first, out of buffers of `size` bytes.
    fn receive(&mut self, size: u32) -> Option<Vec<u8>> {
        let mut packet = Vec::new();
        let mut buffers = 1;
        let mut at = 0;
        while at < buffers {
            let (head, len) = self.rx.used()?;
            let place = {
                let ram = self.rx.ram();
                ram.read_obj::<u64>(GuestAddress(0x1000 + 16 * u64::from(head)))
                    .expect("descriptor")
            };
            let start = packet.len();
            packet.resize(start + len as usize, 0);
            self.rx
                .ram()
                .read_slice(&mut packet[start..], GuestAddress(place))
                .expect("read");
            assert!(len <= size);
            if at == 0 && self.header == 12 {
                buffers = usize::from(u16::from_le_bytes([packet[10], packet[11]]));
            }
            at += 1;
        }
        Some(packet)
    }
}

fn frame(dst: Mac, src: Mac, payload: &[u8]) -> Vec<u8> {
    [&dst[..], &src, &[0x88, 0xb5], payload].concat()
}

fn mac(n: u8) -> Mac {
    [2, 0, 0, 0, 0, n]
}

fn all() -> u64 {
    offered(1, false, false)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_byte_arrives_whatever_buffers_it_lies_in(
        payload in prop::collection::vec(any::<u8>(), 0..9000), cuts in prop::collection::vec(1usize..9000, 0..6), size in 40u32..2000,
    ) {
        let net = Net::new(PlaneOptions::default());
        let (mut a, mut b) = (net.guest("a", Rules::default(), all()), net.guest("b", Rules::default(), all()));
        for _ in 0..240 {
            b.post(size);
        }
        let sent = frame(BROADCAST, mac(1), &payload);
        a.send(&[0; 12], &sent, &cuts);
        let got = b.receive(size).expect("a packet");
        prop_assert_eq!(&got[..10], &[0; 10]);
        prop_assert_eq!(&got[12..], &sent);
        prop_assert_eq!(b.receive(size), None);
    }
}

#[test]
fn packets_find_their_way_and_back() {
    let net = Net::new(PlaneOptions::default());
    let mut all: Vec<_> = ["a", "b", "c"]
        .map(|name| net.guest(name, Rules::default(), all()))
        .into();
    for station in &mut all {
        for _ in 0..10 {
            station.post(2048);
        }
    }
    let [a, b, c] = all.as_mut_slice() else {
        unreachable!("three")
    };
    a.plain(&frame(BROADCAST, mac(1), b"who?"));
    assert!(b.receive(2048).is_some() && c.receive(2048).is_some() && a.receive(2048).is_none());
    b.plain(&frame(mac(1), mac(2), b"me"));
    assert!(a.receive(2048).is_some_and(|p| p.ends_with(b"me")) && c.receive(2048).is_none());
    assert!(a.rx.interrupt.wait_queue(0) && b.rx.interrupt.wait_queue(1));
    let table = net.call(|plane| plane.table());
    let known: Vec<_> = table.iter().map(|(known, port)| (known.mac, port.as_str())).collect();
    assert_eq!(known, [(mac(1), "a"), (mac(2), "b")]);
}

#[test]
fn who_has_no_buffers_loses_packets_and_nobody_else_does() {
    let net = Net::new(PlaneOptions::default());
    let mut a = net.guest("a", Rules::default(), all());
    let full = net.guest("full", Rules::default(), all());
    let mut b = net.guest("b", Rules::default(), all());
    for _ in 0..5 {
        b.post(2048);
        a.plain(&frame(BROADCAST, mac(1), b"x"));
        assert!(b.receive(2048).is_some());
    }
    assert_eq!(net.counters(&full).drops(Drop::NoBuffers), 5);
    assert_eq!((net.counters(&b).rx_packets, net.counters(&a).tx_packets), (5, 5));
    // A packet that needs more buffers than there are takes none of them.
    b.post(100);
    b.post(100);
    a.plain(&frame(BROADCAST, mac(1), &[1; 300]));
    assert_eq!(b.receive(100), None);
    a.plain(&frame(BROADCAST, mac(1), &[2; 150]));
    assert!(b.receive(100).is_some_and(|packet| packet.ends_with(&[2; 150])));
}

#[test]
fn a_guest_that_cannot_merge_gets_what_fits() {
    let net = Net::new(PlaneOptions::default());
    let mut a = net.guest("a", Rules::default(), all());
    let mut b = net.guest("b", Rules::default(), VERSION_1);
    b.post(200);
    a.plain(&frame(BROADCAST, mac(1), &[1; 300]));
    assert_eq!((b.receive(200), net.counters(&b).drops(Drop::TooLong)), (None, 1));
    a.plain(&frame(BROADCAST, mac(1), &[1; 100]));
    assert!(b.receive(200).is_some_and(|packet| packet.len() == 12 + 14 + 100));
}

/// A segment of `len` bytes of payload with its header.
fn segment(len: usize) -> (Vec<u8>, Vec<u8>) {
    let payload: Vec<u8> = (0..len).map(|i| ((i * 31) >> 3) as u8).collect();
    let (mut frame, l4) = crate::offload::tests::large(false, true, &payload);
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&mac(1));
    let mut header = vec![1, 1, 54, 0, 0xb4, 5, l4 as u8, 0, 16, 0, 0, 0];
    header[4..6].copy_from_slice(&1460u16.to_le_bytes());
    (header, frame)
}

#[test]
fn a_segment_goes_as_it_is_to_whom_it_suits_and_in_pieces_to_others() {
    let net = Net::new(PlaneOptions::default());
    let mut a = net.guest("a", Rules::default(), all());
    let mut b = net.guest("b", Rules::default(), all());
    let mut small = net.guest("small", Rules::default(), VERSION_1 | MRG_RXBUF);
    let mut legacy = net.guest("legacy", Rules::default(), 0);
    for _ in 0..60 {
        b.post(2048);
        small.post(2048);
        legacy.post(2048);
    }
    let (header, frame) = segment(64_000);
    a.send(&header, &frame, &[100, 5000]);
    let got = b.receive(2048).expect("one packet");
    assert_eq!((&got[..10], &got[12..]), (&header[..10], &frame[..]));
    for (station, header) in [(&mut small, 12), (&mut legacy, 10)] {
        let mut payload = Vec::new();
        for _ in 0..44 {
            let piece = station.receive(2048).expect("a piece");
            assert_eq!(piece[..10], [0; 10]);
            assert!(piece.len() <= header + 54 + 1460);
            payload.extend_from_slice(&piece[header + 54..]);
        }
        assert_eq!((payload == frame[54..], station.receive(2048)), (true, None));
    }
    let (tx, rx) = (net.counters(&a), net.counters(&small));
    assert_eq!((tx.tx_packets, rx.rx_packets), (44, 44));
    assert_eq!(tx.tx_bytes, 64_054);
}

#[test]
fn tags_are_put_in_with_everything_that_points_behind_them() {
    let net = Net::new(PlaneOptions::default());
    let trunk = Vlans::Trunk {
        tagged: "5+6".parse().expect("a set"),
        native: None,
    };
    let mut a = net.guest(
        "a",
        Rules {
            vlans: Vlans::Access(5),
            ..Rules::default()
        },
        all(),
    );
    let mut b = net.guest(
        "b",
        Rules {
            vlans: trunk,
            ..Rules::default()
        },
        all(),
    );
    let mut c = net.guest(
        "c",
        Rules {
            vlans: Vlans::Access(6),
            ..Rules::default()
        },
        all(),
    );
    for _ in 0..60 {
        a.post(2048);
        b.post(2048);
        c.post(2048);
    }
    let (header, frame) = segment(5000);
    a.send(&header, &frame, &[]);
    let tagged = b.receive(2048).expect("a packet");
    assert_eq!((&tagged[24..28], tagged[2], tagged[6]), (&[0x81, 0, 0, 5][..], 58, 38));
    assert_eq!(tagged[28..], frame[12..]);
    assert_eq!(c.receive(2048), None);
    // And back: what b sends with the tag reaches a without it.
    let mut back = tagged[12..].to_vec();
    back[6..12].copy_from_slice(&mac(2));
    back[..6].copy_from_slice(&mac(1));
    b.send(&tagged[..12], &back, &[]);
    let plain = a.receive(2048).expect("a packet");
    assert_eq!((&plain[24..], &plain[..10]), (&frame[12..], &header[..10]));
    // In another VLAN the address is not known.
    back[15] = 6;
    b.send(&tagged[..12], &back, &[]);
    assert!(a.receive(2048).is_none() && c.receive(2048).is_some());
}

#[test]
fn wrong_headers_and_chains_lose_their_packet_only() {
    let net = Net::new(PlaneOptions::default());
    let (mut a, mut b) = (
        net.guest("a", Rules::default(), all()),
        net.guest("b", Rules::default(), all()),
    );
    for _ in 0..20 {
        b.post(2048);
    }
    let good = frame(BROADCAST, mac(1), &[1; 100]);
    a.send(&[0; 12], &[1; 5], &[]);
    a.send(&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], &good, &[]);
    a.send(&[1, 1, 0, 0, 0, 0, 14, 0, 16, 0, 0, 0], &good, &[]);
    a.send(&[0, 4, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], &good, &[]);
    a.plain(&good);
    assert!(b.receive(2048).is_some() && b.receive(2048).is_none());
    assert_eq!(net.counters(&a).drops(Drop::Malformed), 4);
    // A broken ring stops its queue, not the other guests.
    a.tx.set_avail_index(40_000);
    a.tx.kick();
    let mut c = net.guest("c", Rules::default(), all());
    c.plain(&frame(BROADCAST, mac(3), b"still here"));
    assert!(b.receive(2048).is_some());
    let broken = net.call(|plane| plane.ports().iter().map(|port| port.state).collect::<Vec<_>>());
    assert!(matches!(broken[0], PortState::Guest { broken: 1, .. }), "{broken:?}");
}

#[test]
fn a_checksum_into_what_was_checked_is_refused() {
    let net = Net::new(PlaneOptions::default());
    let guard = Guard {
        mac: mac(1),
        ips: vec!["10.0.0.1".parse().expect("an address")],
    };
    let rules = Rules {
        mac: Some(mac(1)),
        guard: Some(guard),
        ..Rules::default()
    };
    let (mut a, mut b) = (net.guest("a", rules, all()), net.guest("b", Rules::default(), all()));
    b.post(2048);
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(mac(1).into_iter().chain([10, 0, 0, 1]).chain([0; 10]));
    let request = [&BROADCAST[..], &mac(1), &[8, 6], &arp].concat();
    a.send(&[1, 0, 0, 0, 0, 0, 14, 0, 14, 0, 0, 0], &request, &[]);
    assert_eq!((b.receive(2048), net.counters(&a).drops(Drop::Malformed)), (None, 1));
    a.plain(&request);
    assert!(b.receive(2048).is_some());
}

#[test]
fn a_limited_guest_waits_and_loses_nothing() {
    let net = Net::new(PlaneOptions::default());
    let limit = Limit {
        packets: Some(Rate {
            per_second: 2,
            burst: 2,
        }),
        bytes: None,
    };
    let mut a = net.guest(
        "a",
        Rules {
            tx: limit,
            ..Rules::default()
        },
        all(),
    );
    let mut b = net.guest("b", Rules::default(), all());
    for _ in 0..4 {
        b.post(2048);
    }
    let start = std::time::Instant::now();
    for _ in 0..4 {
        a.plain(&frame(BROADCAST, mac(1), b"slowly"));
    }
    assert!(start.elapsed() >= Duration::from_millis(950), "{:?}", start.elapsed());
    assert_eq!(std::iter::from_fn(|| b.receive(2048)).count(), 4);
    // Freed from its limit it need not wait for what it owed.
    let key = a.key;
    net.call(move |plane| plane.set_rules(key, Rules::default()))
        .expect("rules");
    let start = std::time::Instant::now();
    for _ in 0..12 {
        a.plain(&frame(BROADCAST, mac(1), b"fast"));
    }
    // The limit would have taken six seconds.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn stopped_queues_go_on_where_they_were() {
    let net = Net::new(PlaneOptions::default());
    let (mut a, mut b) = (
        net.guest("a", Rules::default(), all()),
        net.guest("b", Rules::default(), all()),
    );
    for n in 0..20u8 {
        b.post(2048);
        a.plain(&frame(BROADCAST, mac(1), &[n; 50]));
        assert!(b.receive(2048).is_some_and(|packet| packet.ends_with(&[n; 50])));
        for key in [a.key, b.key] {
            net.call(move |plane| {
                for index in 0..2 {
                    let queue = plane.stop_queue(key, index).expect("it ran");
                    plane.start_queue(key, queue).expect("again");
                }
            });
        }
    }
    let (key, gone) = (a.key, b.key);
    net.call(move |plane| {
        plane.detach(key);
        assert!(plane.remove(gone) && !plane.remove(gone));
        assert!(plane.sources.is_empty(), "{:?}", plane.sources);
    });
}

#[test]
fn announcements_reach_the_others() {
    let net = Net::new(PlaneOptions::default());
    let (a, mut b) = (
        net.guest("a", Rules::default(), all()),
        net.guest("b", Rules::default(), all()),
    );
    b.post(2048);
    let key = a.key;
    assert!(!net.call(move |plane| plane.announce(key, None)));
    assert!(net.call(move |plane| plane.announce(key, Some(mac(1)))));
    let heard = b.receive(2048).expect("an announcement");
    assert_eq!(
        (&heard[12..18], &heard[18..24], &heard[24..26]),
        (&BROADCAST[..], &mac(1)[..], &[0x80, 0x35][..])
    );
}
