//! Whether a guest speaks in its own name: hardware, IPv4 and IPv6 source addresses, in ARP and neighbour discovery too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Drop;
use super::frame::{Frame, Mac, bytes_at, ethertype, link_local, u16_at};

/// ICMPv6 and what may stand before it (IANA protocol numbers).
const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const DESTINATION: u8 = 60;
/// Extension headers that are followed; hosts send one or two.
const MAX_EXTENSIONS: usize = 8;

/// Messages of neighbour discovery (RFC 4861).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Options with the sender's and the target's hardware address.
const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: u8 = 2;

/// What a port may say it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// Its hardware address.
    pub mac: Mac,
    /// Its protocol addresses; without any, only the hardware address is checked.
    pub ips: Vec<IpAddr>,
}

/// A check that was passed.
pub type Checked = Result<(), Drop>;

fn must(condition: bool, otherwise: Drop) -> Checked {
    if condition { Ok(()) } else { Err(otherwise) }
}

impl Guard {
    /// Looks at a frame, of which `head` are the first bytes. What cannot be looked at is refused.
    pub fn check(&self, frame: &Frame, head: &[u8]) -> Checked {
        must(frame.src == self.mac, Drop::SpoofedMac)?;
        let l3 = head.get(frame.l3..).unwrap_or_default();
        match frame.ethertype {
            ethertype::ARP => self.arp(l3),
            ethertype::RARP => self.rarp(l3),
            _ if self.ips.is_empty() => Ok(()),
            ethertype::IPV4 => self.ipv4(l3),
            ethertype::IPV6 => self.ipv6(l3),
            // Another tag, tunnels below IP, LLC: its addresses are out of sight.
            _ => Err(Drop::SpoofedProtocol),
        }
    }

    /// Whether what a frame asks the receiver's side to compute may be written into it: a checksum into addresses that were checked would
    /// change them afterwards.
    pub fn allows_partial_checksum(&self, frame: &Frame, head: &[u8]) -> bool {
        match frame.ethertype {
            ethertype::IPV4 => true,
            ethertype::IPV6 => {
                let l3 = head.get(frame.l3..).unwrap_or_default();
                matches!(
                    upper_layer(l3),
                    Some(Upper {
                        protocol: TCP | UDP,
                        ..
                    })
                ) || self.ips.is_empty()
            }
            ethertype::ARP | ethertype::RARP => false,
            _ => self.ips.is_empty(),
        }
    }

    fn has_v4(&self, address: Ipv4Addr) -> bool {
        self.ips.is_empty() || self.ips.contains(&IpAddr::V4(address))
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        self.ips.is_empty() || address == link_local(&self.mac) || self.ips.contains(&IpAddr::V6(address))
    }

    /// RFC 826, over Ethernet and IPv4.
    fn arp(&self, arp: &[u8]) -> Checked {
        let form = arp.get(..6) == Some(&[0, 1, 8, 0, 6, 4]);
        must(form, Drop::SpoofedArp)?;
        let (Some(hardware), Some(address)) = (bytes_at::<6>(arp, 8), bytes_at::<4>(arp, 14)) else {
            return Err(Drop::SpoofedArp);
        };
        must(hardware == self.mac, Drop::SpoofedArp)?;
        let address = Ipv4Addr::from(address);
        // A probe has no address yet (RFC 5227); only a question may do without.
        let probe = address.is_unspecified() && u16_at(arp, 6) == Some(1);
        must(probe || self.has_v4(address), Drop::SpoofedArp)
    }

    /// RFC 903: a question about itself.
    fn rarp(&self, rarp: &[u8]) -> Checked {
        let form = rarp.get(..8) == Some(&[0, 1, 8, 0, 6, 4, 0, 3]);
        let both = bytes_at(rarp, 8) == Some(self.mac) && bytes_at(rarp, 18) == Some(self.mac);
        must(form && both, Drop::SpoofedArp)
    }

    fn ipv4(&self, packet: &[u8]) -> Checked {
        let Some(source) = bytes_at::<4>(packet, 12) else {
            return Err(Drop::SpoofedIpv4);
        };
        must(packet[0] >> 4 == 4, Drop::SpoofedIpv4)?;
        let source = Ipv4Addr::from(source);
        if source.is_unspecified() {
            // A DHCP client has no other (RFC 2131).
            let at = usize::from(packet[0] & 15) * 4;
            let client = u16_at(packet, at) == Some(68) && u16_at(packet, at + 2) == Some(67);
            let whole = u16_at(packet, 6).is_some_and(|fragment| fragment & 0x1fff == 0);
            let udp = packet.get(9) == Some(&UDP);
            return must(udp && whole && client && at >= 20, Drop::SpoofedIpv4);
        }
        must(self.has_v4(source), Drop::SpoofedIpv4)
    }

    fn ipv6(&self, packet: &[u8]) -> Checked {
        let (Some(source), Some(version)) = (bytes_at::<16>(packet, 8), packet.first()) else {
            return Err(Drop::SpoofedIpv6);
        };
        must(version >> 4 == 6, Drop::SpoofedIpv6)?;
        let source = Ipv6Addr::from(source);
        let upper = upper_layer(packet).ok_or(Drop::SpoofedIpv6)?;
        if source.is_unspecified() {
            // Detection of duplicates, asking for routers, and multicast reports before there is an address (RFC 4862, RFC 3590).
            let early = upper.protocol == ICMPV6
                && matches!(
                    upper.kind,
                    Some(NEIGHBOUR_SOLICITATION | ROUTER_SOLICITATION | 131 | 132 | 143)
                );
            must(early, Drop::SpoofedIpv6)?;
        } else {
            must(self.has_v6(source), Drop::SpoofedIpv6)?;
        }
        if upper.protocol != ICMPV6 {
            return Ok(());
        }
        self.icmpv6(packet, &upper)
    }

    fn icmpv6(&self, packet: &[u8], upper: &Upper) -> Checked {
        let discovery = |kind| (ROUTER_SOLICITATION..=REDIRECT).contains(&kind);
        let Some(kind) = upper.kind else {
            // Not the first fragment: without the first one it is nothing.
            return must(upper.later_fragment, Drop::SpoofedIpv6);
        };
        if !discovery(kind) {
            return Ok(());
        }
        // Fragments of it are not to be believed anyway (RFC 6980), and their options are out of sight.
        must(!upper.fragment, Drop::SpoofedNd)?;
        let options = match kind {
            ROUTER_SOLICITATION => upper.at + 8,
            NEIGHBOUR_SOLICITATION => upper.at + 24,
            NEIGHBOUR_ADVERTISEMENT => {
                let target = bytes_at::<16>(packet, upper.at + 8).ok_or(Drop::SpoofedNd)?;
                must(self.has_v6(target.into()), Drop::SpoofedNd)?;
                upper.at + 24
            }
            // A guest is no router.
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(Drop::SpoofedNd),
            _ => return Ok(()),
        };
        self.options(packet, options)
    }

    /// The hardware addresses in the options of neighbour discovery (RFC 4861, 4.6).
    fn options(&self, packet: &[u8], mut at: usize) -> Checked {
        let end = usize::from(u16_at(packet, 4).unwrap_or(0)) + 40;
        must(end <= packet.len(), Drop::SpoofedNd)?;
        while at < end {
            let (Some(kind), Some(length)) = (packet.get(at), packet.get(at + 1)) else {
                return Err(Drop::SpoofedNd);
            };
            let length = usize::from(*length) * 8;
            must(length != 0 && at + length <= end, Drop::SpoofedNd)?;
            if matches!(*kind, SOURCE_ADDRESS | TARGET_ADDRESS) {
                must(bytes_at(packet, at + 2) == Some(self.mac), Drop::SpoofedNd)?;
            }
            at += length;
        }
        Ok(())
    }
}

/// What an IPv6 packet carries.
struct Upper {
    protocol: u8,
    /// Where it begins.
    at: usize,
    /// Type of an ICMPv6 message, if it is in sight.
    kind: Option<u8>,
    /// It is in pieces.
    fragment: bool,
    /// And this is not the first.
    later_fragment: bool,
}

/// Follows the extension headers (RFC 8200, 4). `None`: they are too many, or go out of sight.
fn upper_layer(packet: &[u8]) -> Option<Upper> {
    let mut protocol = *packet.get(6)?;
    let mut at = 40;
    let (mut fragment, mut later_fragment) = (false, false);
    for _ in 0..MAX_EXTENSIONS {
        match protocol {
            _ if later_fragment => break,
            HOP_BY_HOP | ROUTING | DESTINATION => {
                protocol = *packet.get(at)?;
                at += (usize::from(*packet.get(at + 1)?) + 1) * 8;
            }
            FRAGMENT => {
                fragment = true;
                protocol = *packet.get(at)?;
                later_fragment = u16_at(packet, at + 2)? & 0xfff8 != 0;
                at += 8;
            }
            _ => break,
        }
    }
    let unfinished = matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT);
    if unfinished && !later_fragment {
        return None;
    }
    let kind = if later_fragment { None } else { packet.get(at).copied() };
    Some(Upper {
        protocol,
        at,
        kind,
        fragment,
        later_fragment,
    })
}
