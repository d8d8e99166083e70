//! What of an Ethernet frame decides where it goes (IEEE 802.3, 802.1Q).

/// A hardware address.
pub type Mac = [u8; 6];

/// Every station.
pub const BROADCAST: Mac = [0xff; 6];
/// Bytes at the front of a frame that are looked at; nothing behind them decides anything.
pub const HEAD: usize = 256;
/// The shortest frame: two addresses and a type. Padding is the business of real wires.
pub const MIN_FRAME: usize = 14;
/// Bytes of a tag.
pub const TAG: usize = 4;
/// Where a tag stands.
pub const TAG_AT: usize = 12;

/// EtherTypes.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP (RFC 826).
    pub const ARP: u16 = 0x0806;
    /// Reverse ARP (RFC 903).
    pub const RARP: u16 = 0x8035;
    /// A tag of 802.1Q.
    pub const VLAN: u16 = 0x8100;
    /// A service tag of 802.1ad.
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// The front of a frame, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// To whom.
    pub dst: Mac,
    /// From whom.
    pub src: Mac,
    /// The tag's contents (priority and VLAN), if there is a tag.
    pub tci: Option<u16>,
    /// What is inside, behind the tag.
    pub ethertype: u16,
    /// Where that begins.
    pub l3: usize,
}

/// Two bytes in network order; `None` past the end.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let two = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([two[0], two[1]]))
}

/// `N` bytes; `None` past the end.
pub fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

impl Frame {
    /// Takes apart the first bytes of a frame, as many as there are up to [`HEAD`]. `None`: it is too short to be one.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let (dst, src) = (bytes_at(head, 0)?, bytes_at(head, 6)?);
        let outer = u16_at(head, TAG_AT)?;
        if outer != ethertype::VLAN {
            return Some(Self {
                dst,
                src,
                tci: None,
                ethertype: outer,
                l3: MIN_FRAME,
            });
        }
        Some(Self {
            dst,
            src,
            tci: Some(u16_at(head, TAG_AT + 2)?),
            ethertype: u16_at(head, TAG_AT + TAG)?,
            l3: MIN_FRAME + TAG,
        })
    }

    /// Bytes of a tag it has.
    pub fn tag_len(&self) -> usize {
        if self.tci.is_some() { TAG } else { 0 }
    }
}

/// Whether an address means several stations.
pub fn is_group(mac: &Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether it is one of those no bridge passes on (802.1Q, table 8-1 and what else 01-80-C2 is for).
pub fn is_reserved(mac: &Mac) -> bool {
    mac[..3] == [0x01, 0x80, 0xc2]
}

/// The interface identifier that stateless configuration makes of an address, as a link-local address (RFC 4291, appendix A).
pub fn link_local(mac: &Mac) -> std::net::Ipv6Addr {
    let m = mac;
    let id = [m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]];
    let mut octets = [0; 16];
    octets[..2].copy_from_slice(&[0xfe, 0x80]);
    octets[8..].copy_from_slice(&id);
    octets.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_looked_behind() {
        let mut frame = vec![1; 12];
        frame.extend([0x81, 0x00, 0x60, 0x2a, 0x86, 0xdd, 0x60]);
        let parsed = Frame::parse(&frame).expect("a frame");
        assert_eq!(
            (parsed.tci, parsed.ethertype, parsed.l3),
            (Some(0x602a), ethertype::IPV6, 18)
        );
        assert_eq!(Frame::parse(&frame[..17]), None);
        frame.drain(12..16);
        let parsed = Frame::parse(&frame).expect("a frame");
        assert_eq!((parsed.tci, parsed.ethertype, parsed.l3), (None, ethertype::IPV6, 14));
        assert_eq!(Frame::parse(&frame[..13]), None);
    }

    #[test]
    fn a_link_local_address_has_the_hardware_address_in_it() {
        let address = link_local(&[0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);
        assert_eq!(address.to_string(), "fe80::5054:ff:fe12:3456");
    }
}
