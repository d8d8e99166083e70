//! Telling the network where a guest is now.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use triarch_net::rarp;

use super::forward::Packet;
use super::packet::Rest;
use super::{Plane, PortKey};
use crate::offload::Offload;
use crate::offload::checksum::Sum;
use crate::switch::frame::{BROADCAST, Mac, ethertype, link_local};

/// All nodes of a link, as address and on Ethernet.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ICMPV6: u8 = 58;
/// The shortest frame on a wire, without its checksum.
const SHORTEST: usize = 60;

impl Plane {
    /// Sends what makes switches and neighbours learn where `mac` is to all other ports, as the guest behind the port would: reverse ARP,
    /// and for the addresses it is configured with gratuitous ARP and neighbour advertisements. A guarded guest's own address is told,
    /// whatever `mac` says. Returns whether there was something to tell.
    pub fn announce(&mut self, key: PortKey, mac: Option<Mac>) -> bool {
        let Some(rules) = self.port(key).is_some().then(|| self.rules(key)).flatten() else {
            return false;
        };
        let guard = rules.guard.as_ref();
        let Some(mac) = guard.map(|guard| guard.mac).or(mac).or(rules.mac) else {
            return false;
        };
        let mut frames = vec![rarp(&mac).to_vec()];
        let ips = guard.map(|guard| guard.ips.as_slice()).unwrap_or_default();
        for ip in ips {
            frames.push(match ip {
                IpAddr::V4(address) => arp(&mac, *address),
                IpAddr::V6(address) => advertisement(&mac, *address),
            });
        }
        if ips.iter().any(IpAddr::is_ipv6) {
            frames.push(advertisement(&mac, link_local(&mac)));
        }
        let now = self.now();
        for frame in &frames {
            let packet = Packet {
                head: frame,
                rest: Rest::Own(&[]),
                offload: Offload::default(),
            };
            self.work(now).forward(key.id, 0, &packet);
        }
        self.signal();
        true
    }
}

fn frame(dst: &Mac, src: &Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [dst.as_slice(), src, &kind.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(SHORTEST), 0);
    frame
}

/// RFC 5227, an ARP announcement.
fn arp(mac: &Mac, address: Ipv4Addr) -> Vec<u8> {
    let address = address.octets();
    let payload = [&[0, 1, 8, 0, 6, 4, 0, 1], mac.as_slice(), &address, &[0; 6], &address].concat();
    frame(&BROADCAST, mac, ethertype::ARP, &payload)
}

/// RFC 4861, 4.4: unsolicited, with the override flag.
fn advertisement(mac: &Mac, address: Ipv6Addr) -> Vec<u8> {
    let mut message = [
        &[136, 0, 0, 0, 0x20, 0, 0, 0],
        address.octets().as_slice(),
        &[2, 1],
        mac,
    ]
    .concat();
    let addresses = [address.octets(), ALL_NODES.octets()].concat();
    let length = (message.len() as u16).to_be_bytes();
    let sum = Sum::default()
        .bytes(&addresses)
        .number(message.len() as u32)
        .number(u32::from(ICMPV6))
        .bytes(&message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    let header = [&[0x60, 0, 0, 0], length.as_slice(), &[ICMPV6, 255]].concat();
    let payload = [header, addresses, message].concat();
    frame(&ALL_NODES_MAC, mac, ethertype::IPV6, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::frame::Frame;
    use crate::switch::guard::Guard;

    #[test]
    fn announcements_pass_the_guard_of_whom_they_are_about() {
        let mac = [2, 0, 0, 0, 0, 5];
        let (v4, v6) = (Ipv4Addr::new(10, 0, 0, 5), "2001:db8::5".parse().expect("an address"));
        let guard = Guard {
            mac,
            ips: vec![v4.into(), IpAddr::V6(v6)],
        };
        for frame in [
            rarp(&mac).to_vec(),
            arp(&mac, v4),
            advertisement(&mac, v6),
            advertisement(&mac, link_local(&mac)),
        ] {
            let parsed = Frame::parse(&frame).expect("a frame");
            assert_eq!(guard.check(&parsed, &frame), Ok(()), "{frame:x?}");
            let other = Guard {
                mac,
                ips: vec!["10.9.9.9".parse().expect("an address")],
            };
            let local = frame[12..14] == [0x86, 0xdd] && frame[22] == 0xfe;
            let hardware_only = frame[12..14] == [0x80, 0x35];
            assert_eq!(other.check(&parsed, &frame).is_ok(), local || hardware_only);
        }
        let known = advertisement(&mac, v6);
        let sum = Sum::default()
            .bytes(&known[22..54])
            .number(32)
            .number(58)
            .bytes(&known[54..86]);
        assert_eq!(sum.finish(), 0);
    }
}
