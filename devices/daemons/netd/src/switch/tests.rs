//! Against a model that keeps everything in lists and looks at all of it each time.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;

use super::bucket::{Limit, Rate};
use super::frame::{BROADCAST, Mac, ethertype, link_local};
use super::guard::Guard;
use super::rules::Vlans;
use super::*;

fn mac(n: u8) -> Mac {
    [2, 0, 0, 0, 0, n]
}

fn frame(dst: Mac, src: Mac, tag: Option<u16>, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [dst, src].concat();
    if let Some(tci) = tag {
        frame.extend(ethertype::VLAN.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Where a frame comes out, with its tag.
fn send(switch: &mut Switch, from: PortId, frame: &[u8], now: u64) -> Result<BTreeSet<(u32, Option<u16>)>, Drop> {
    let passage = switch.enter(from, frame, frame.len(), 1, now)?;
    let mut out = BTreeSet::new();
    let mut at = 0;
    loop {
        let to = match passage.to {
            Some(to) if at == 0 => Some(to),
            Some(_) => None,
            None => switch.next_flooded(&passage, from, at),
        };
        let Some(to) = to else { return Ok(out) };
        at = to.0 + 1;
        if let Ok(exit) = switch.leave(to, &passage, now) {
            switch.left(to, 1, frame.len());
            out.insert((to.0, exit.tci));
        }
        if passage.to.is_some() {
            return Ok(out);
        }
    }
}

fn plain(count: usize) -> Switch {
    let mut switch = Switch::new(TableLimits::default());
    for n in 0..count {
        assert_eq!(switch.add(Rules::default(), 0), Some(PortId(n as u32)));
    }
    switch
}

fn vlans(kind: u8) -> Vlans {
    match kind {
        0..=2 => Vlans::Access(u16::from(kind) + 1),
        3 => Vlans::Trunk {
            tagged: "1-3".parse().expect("a set"),
            native: None,
        },
        _ => Vlans::Trunk {
            tagged: "2+3".parse().expect("a set"),
            native: Some(1),
        },
    }
}

#[derive(Debug, Clone)]
enum Step {
    Send {
        from: u32,
        src: u8,
        dst: u8,
        tag: Option<u16>,
    },
    Pass {
        time: u64,
    },
    Vlans {
        port: u32,
        kind: u8,
    },
    Replace {
        port: u32,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let tag = prop::option::of((0u16..5).prop_map(|vlan| vlan | 0x4000));
    prop_oneof![
        8 => (0u32..5, 1u8..9, 0u8..10, tag).prop_map(|(from, src, dst, tag)| Step::Send { from, src, dst, tag }),
        1 => (1u64..200).prop_map(|time| Step::Pass { time }),
        1 => (0u32..5, 0u8..5).prop_map(|(port, kind)| Step::Vlans { port, kind }),
        1 => (0u32..5).prop_map(|port| Step::Replace { port }),
    ]
}

/// The model: sightings in the order they happened.
#[derive(Default)]
struct Model {
    kinds: [u8; 5],
    seen: Vec<(u16, Mac, u32, u64)>,
}

impl Model {
    fn expected(
        &mut self,
        from: u32,
        src: Mac,
        dst: Mac,
        tag: Option<u16>,
        now: u64,
    ) -> Option<BTreeSet<(u32, Option<u16>)>> {
        let of = |port: u32| vlans(self.kinds[port as usize]);
        let vlan = of(from).classify(tag)?;
        self.seen.retain(|(v, m, ..)| (*v, *m) != (vlan, src));
        self.seen.push((vlan, src, from, now));
        let known = self.seen.iter().rev().find(|(v, m, ..)| (*v, *m) == (vlan, dst));
        let known = known.filter(|(.., when)| now - when < 100).map(|(_, _, port, _)| *port);
        let targets: Vec<u32> = match known {
            Some(port) if port == from => return None,
            Some(port) => vec![port],
            None => (0..5).filter(|port| *port != from).collect(),
        };
        let exits = targets.into_iter().filter_map(|port| {
            let tagged = of(port).admits(vlan)?;
            Some((port, tagged.then_some(tag.unwrap_or(0) & 0xf000 | vlan)))
        });
        Some(exits.collect())
    }
}

proptest! {
    #[test]
    fn frames_go_where_the_model_says(kinds: [u8; 5], steps in prop::collection::vec(step(), 1..120)) {
        let mut switch = Switch::new(TableLimits { age: 100, ..TableLimits::default() });
        let mut model = Model { kinds: kinds.map(|kind| kind % 5), ..Model::default() };
        for kind in model.kinds {
            switch.add(Rules { vlans: vlans(kind), ..Rules::default() }, 0).expect("a port");
        }
        let mut now = 0;
        for step in steps {
            match step {
                Step::Pass { time } => now += time,
                Step::Vlans { port, kind } => {
                    let changed = model.kinds[port as usize] != kind;
                    model.kinds[port as usize] = kind;
                    let rules = Rules { vlans: vlans(kind), ..Rules::default() };
                    prop_assert!(switch.set_rules(PortId(port), rules, now));
                    if changed {
                        model.seen.retain(|(_, _, at, _)| *at != port);
                    }
                }
                Step::Replace { port } => {
                    switch.remove(PortId(port));
                    model.seen.retain(|(_, _, at, _)| *at != port);
                    let rules = Rules { vlans: vlans(model.kinds[port as usize]), ..Rules::default() };
                    prop_assert_eq!(switch.add(rules, now), Some(PortId(port)));
                }
                Step::Send { from, src, dst, tag } => {
                    let dst = match dst {
                        0 => BROADCAST,
                        9 => [0x33, 0x33, 0, 0, 0, 1],
                        n => mac(n),
                    };
                    let expected = model.expected(from, mac(src), dst, tag, now);
                    let got = send(&mut switch, PortId(from), &frame(dst, mac(src), tag, 0x88b5, &[0; 46]), now);
                    prop_assert_eq!(got.ok(), expected);
                }
            }
        }
    }

    #[test]
    fn a_guest_cannot_grow_the_table(count in 1usize..3000, most in 1usize..50) {
        let mut switch = Switch::new(TableLimits { total: 80, ..TableLimits::default() });
        let rules = Rules { max_macs: most, ..Rules::default() };
        let (a, b) = (switch.add(rules.clone(), 0).expect("a"), switch.add(rules, 0).expect("b"));
        for n in 0..count {
            let src = [2, 1, 0, 0, (n >> 8) as u8, n as u8];
            let from = if n % 3 == 0 { b } else { a };
            send(&mut switch, from, &frame(BROADCAST, src, None, 0x88b5, &[]), n as u64 * 10_000_000).expect("flooded");
        }
        prop_assert!(switch.table.len() <= (2 * most).min(80));
    }
}

#[test]
fn a_full_table_makes_room_for_the_living() {
    let mut switch = Switch::new(TableLimits {
        total: 2,
        age: 5_000_000_000,
    });
    let port = switch.add(Rules::default(), 0).expect("a port");
    let mut see = |n, now| send(&mut switch, port, &frame(BROADCAST, mac(n), None, 0x88b5, &[]), now).map(|_| ());
    see(1, 0).expect("sent");
    see(2, 1).expect("sent");
    see(3, 2).expect("sent");
    see(2, 4_000_000_000).expect("sent");
    see(3, 6_000_000_000).expect("sent");
    let known: Vec<Mac> = switch.table(6_000_000_000).iter().map(|k| k.mac).collect();
    assert_eq!(known, [mac(2), mac(3)]);
}

#[test]
fn an_address_that_is_configured_stays() {
    let mut switch = plain(1);
    let rules = Rules {
        mac: Some(mac(7)),
        ..Rules::default()
    };
    let owner = switch.add(rules.clone(), 0).expect("a port");
    assert_eq!(switch.add(rules.clone(), 0), None);
    assert!(!switch.set_rules(PortId(0), rules, 0));
    let theft = frame(BROADCAST, mac(7), None, 0x88b5, &[]);
    assert_eq!(send(&mut switch, PortId(0), &theft, 0), Err(Drop::SpoofedMac));
    // Years later it is still known, without ever having been heard.
    let to = frame(mac(7), mac(1), None, 0x88b5, &[]);
    assert_eq!(
        send(&mut switch, PortId(0), &to, u64::MAX),
        Ok([(owner.0, None)].into())
    );
    switch.remove(owner);
    assert_eq!(send(&mut switch, PortId(0), &theft, 0), Ok(BTreeSet::new()));
}

#[test]
fn some_frames_go_nowhere() {
    let mut switch = plain(2);
    let mut send = |dst, src| send(&mut switch, PortId(0), &frame(dst, src, None, 0x88b5, &[]), 0);
    assert_eq!(send([1, 0x80, 0xc2, 0, 0, 0], mac(1)), Err(Drop::Reserved));
    assert_eq!(send([1, 0x80, 0xc2, 0, 0, 0x21], mac(1)), Err(Drop::Reserved));
    assert_eq!(send(BROADCAST, [3, 0, 0, 0, 0, 1]), Err(Drop::Malformed));
    assert_eq!(send(BROADCAST, [0; 6]), Err(Drop::Malformed));
    send([1, 0x80, 0xc3, 0, 0, 0], mac(1)).expect("another group");
    assert_eq!(send(mac(1), mac(1)), Err(Drop::Hairpin));
    let counters = switch.counters(PortId(0)).expect("counters");
    assert_eq!((counters.drops(Drop::Reserved), counters.drops(Drop::Hairpin)), (2, 1));
    assert_eq!((counters.tx_packets, counters.tx_bytes), (1, 14));
    assert_eq!(switch.counters(PortId(1)).expect("counters").rx_packets, 1);
}

#[test]
fn a_receivers_limit_loses_what_is_too_much() {
    let mut switch = plain(1);
    let limit = Limit {
        bytes: None,
        packets: Some(Rate {
            per_second: 10,
            burst: 2,
        }),
    };
    let slow = switch
        .add(
            Rules {
                rx: limit,
                ..Rules::default()
            },
            0,
        )
        .expect("a port");
    let packet = frame(BROADCAST, mac(1), None, 0x88b5, &[]);
    let arrived = (0..5)
        .filter(|_| send(&mut switch, PortId(0), &packet, 0).is_ok_and(|out| !out.is_empty()))
        .count();
    let counters = switch.counters(slow).expect("counters");
    assert_eq!((arrived, counters.rx_packets, counters.drops(Drop::Rate)), (2, 2, 3));
    // And a sender's limit tells when to come again.
    switch.set_rules(
        PortId(0),
        Rules {
            tx: limit,
            ..Rules::default()
        },
        0,
    );
    assert_eq!(switch.may_send(PortId(0), 0), Ok(()));
    switch.enter(PortId(0), &packet, 14, 2, 0).expect("sent");
    assert_eq!(switch.may_send(PortId(0), 0), Err(100_000_000));
}

fn guarded(ips: &[&str]) -> Switch {
    let mut switch = plain(1);
    let guard = Guard {
        mac: mac(1),
        ips: ips.iter().map(|ip| ip.parse::<IpAddr>().expect(ip)).collect(),
    };
    switch.set_rules(
        PortId(0),
        Rules {
            mac: Some(mac(1)),
            guard: Some(guard),
            ..Rules::default()
        },
        0,
    );
    switch
}

fn arp(op: u8, hardware: Mac, address: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, op];
    arp.extend(hardware);
    arp.extend(address);
    arp.extend([0; 10]);
    arp
}

fn ipv4(source: [u8; 4], protocol: u8, ports: [u16; 2]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(source);
    packet.extend([10, 0, 0, 9]);
    packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    packet.extend([0; 4]);
    packet
}

fn ipv6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.parse::<std::net::Ipv6Addr>().expect(source).octets());
    packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend(payload);
    packet
}

fn neighbour(kind: u8, target: &str, option: u8, hardware: Mac) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.parse::<std::net::Ipv6Addr>().expect(target).octets());
    message.extend([option, 1]);
    message.extend(hardware);
    message
}

fn judge(switch: &mut Switch, kind: u16, payload: &[u8]) -> Result<(), Drop> {
    send(switch, PortId(0), &frame(BROADCAST, mac(1), None, kind, payload), 0).map(|_| ())
}

#[test]
fn a_guarded_guest_speaks_ipv4_in_its_own_name() {
    let mut switch = guarded(&["10.0.0.1"]);
    let as_other = frame(BROADCAST, mac(2), None, 0x0800, &ipv4([10, 0, 0, 1], 17, [1, 1]));
    assert_eq!(send(&mut switch, PortId(0), &as_other, 0), Err(Drop::SpoofedMac));
    let mut judge = |kind, payload: &[u8]| judge(&mut switch, kind, payload);
    judge(0x0800, &ipv4([10, 0, 0, 1], 6, [1, 1])).expect("its own");
    assert_eq!(judge(0x0800, &ipv4([10, 0, 0, 2], 6, [1, 1])), Err(Drop::SpoofedIpv4));
    judge(0x0800, &ipv4([0; 4], 17, [68, 67])).expect("DHCP");
    assert_eq!(judge(0x0800, &ipv4([0; 4], 17, [67, 68])), Err(Drop::SpoofedIpv4));
    assert_eq!(judge(0x0800, &ipv4([0; 4], 6, [68, 67])), Err(Drop::SpoofedIpv4));
    assert_eq!(judge(0x0800, &[0x45; 10]), Err(Drop::SpoofedIpv4));
    judge(ethertype::ARP, &arp(1, mac(1), [10, 0, 0, 1])).expect("its own");
    judge(ethertype::ARP, &arp(1, mac(1), [0; 4])).expect("a probe");
    assert_eq!(judge(ethertype::ARP, &arp(2, mac(1), [0; 4])), Err(Drop::SpoofedArp));
    assert_eq!(
        judge(ethertype::ARP, &arp(2, mac(1), [10, 0, 0, 2])),
        Err(Drop::SpoofedArp)
    );
    assert_eq!(
        judge(ethertype::ARP, &arp(2, mac(2), [10, 0, 0, 1])),
        Err(Drop::SpoofedArp)
    );
    assert_eq!(judge(ethertype::RARP, &arp(3, mac(1), [0; 4])), Err(Drop::SpoofedArp));
    assert_eq!(judge(0x88b5, &[0; 46]), Err(Drop::SpoofedProtocol));
    assert_eq!(judge(ethertype::SERVICE_VLAN, &[0; 46]), Err(Drop::SpoofedProtocol));
    assert_eq!(judge(46, &[0; 46]), Err(Drop::SpoofedProtocol));
    let mut rarp = arp(3, mac(1), [0; 4]);
    rarp[18..24].copy_from_slice(&mac(1));
    judge(ethertype::RARP, &rarp).expect("an announcement");
}

#[test]
fn a_guarded_guest_speaks_ipv6_in_its_own_name() {
    let mut switch = guarded(&["2001:db8::1"]);
    let own = link_local(&mac(1)).to_string();
    let mut judge = |source: &str, next, payload: &[u8]| judge(&mut switch, 0x86dd, &ipv6(source, next, payload));
    judge("2001:db8::1", 6, &[0; 20]).expect("its own");
    judge(&own, 17, &[0; 20]).expect("link-local");
    assert_eq!(judge("2001:db8::2", 6, &[0; 20]), Err(Drop::SpoofedIpv6));
    assert_eq!(judge("fe80::1", 6, &[0; 20]), Err(Drop::SpoofedIpv6));
    // Neighbour discovery, also behind other headers.
    let honest = neighbour(136, "2001:db8::1", 2, mac(1));
    judge("2001:db8::1", 58, &honest).expect("its own");
    let behind: Vec<u8> = [[58, 0].as_slice(), &[0; 6], &honest].concat();
    judge("2001:db8::1", 0, &behind).expect("its own");
    let lie = neighbour(136, "2001:db8::2", 2, mac(1));
    assert_eq!(judge("2001:db8::1", 58, &lie), Err(Drop::SpoofedNd));
    let behind: Vec<u8> = [[58, 0].as_slice(), &[0; 6], &lie].concat();
    for header in [0, 43, 60] {
        assert_eq!(judge("2001:db8::1", header, &behind), Err(Drop::SpoofedNd));
    }
    assert_eq!(
        judge(&own, 58, &neighbour(136, "2001:db8::1", 2, mac(2))),
        Err(Drop::SpoofedNd)
    );
    assert_eq!(
        judge(&own, 58, &neighbour(135, "2001:db8::9", 1, mac(2))),
        Err(Drop::SpoofedNd)
    );
    judge(&own, 58, &neighbour(135, "2001:db8::9", 1, mac(1))).expect("a question");
    assert_eq!(
        judge(&own, 58, &[134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Err(Drop::SpoofedNd)
    );
    assert_eq!(
        judge(&own, 58, &neighbour(137, "2001:db8::1", 2, mac(1))),
        Err(Drop::SpoofedNd)
    );
    // Without an address: only what finds one.
    judge("::", 58, &neighbour(135, "2001:db8::1", 14, [0; 6])).expect("detection of duplicates");
    assert_eq!(judge("::", 58, &honest), Err(Drop::SpoofedIpv6));
    assert_eq!(judge("::", 17, &[0; 20]), Err(Drop::SpoofedIpv6));
    // In pieces: what is in sight is judged, what is not is not neighbour discovery.
    let piece = |offset: u16, payload: &[u8]| {
        let mut piece = vec![58, 0];
        piece.extend(offset.to_be_bytes());
        piece.extend([0; 4]);
        piece.extend(payload);
        piece
    };
    assert_eq!(judge(&own, 44, &piece(1, &honest)), Err(Drop::SpoofedNd));
    judge(&own, 44, &piece(1, &[128; 16])).expect("a large ping");
    judge(&own, 44, &piece(8 | 1, &honest)).expect("a later piece");
    assert_eq!(judge(&own, 44, &piece(1, &[])), Err(Drop::SpoofedIpv6));
    let endless: Vec<u8> = [60, 0, 0, 0, 0, 0, 0, 0].repeat(20);
    assert_eq!(judge(&own, 60, &endless), Err(Drop::SpoofedIpv6));
}

#[test]
fn without_addresses_a_guard_checks_hardware_addresses_only() {
    let mut switch = guarded(&[]);
    judge(&mut switch, 0x0800, &ipv4([10, 9, 9, 9], 6, [1, 1])).expect("any address");
    judge(&mut switch, 0x88b5, &[0; 46]).expect("any protocol");
    assert_eq!(
        judge(&mut switch, ethertype::ARP, &arp(2, mac(2), [10, 0, 0, 2])),
        Err(Drop::SpoofedArp)
    );
}
