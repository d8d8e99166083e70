//! What a sender leaves undone and a receiver may be given undone: checksums and segmentation (virtio 1.2, 5.1.6.2 and 5.1.6.4).

pub mod checksum;
pub mod segment;
#[cfg(test)]
pub(crate) mod tests;

use crate::switch::frame::{Frame, HEAD, ethertype};

/// Bytes of the header before each frame, `num_buffers` included.
pub const HEADER: usize = 12;
/// Bytes of the header of drivers from before virtio 1.0 that do not merge buffers.
pub const LEGACY_HEADER: usize = 10;
/// Where `num_buffers` is.
pub const NUM_BUFFERS_AT: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Where TCP and UDP have their checksums.
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;
/// More pieces than this in one segment are refused: a guest could make a lot of work with few bytes.
const MAX_PIECES: usize = 1024;

/// What one side can have undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Accepts {
    /// Partial checksums, without which nothing else goes.
    pub csum: bool,
    /// TCP segments over IPv4.
    pub tso4: bool,
    /// TCP segments over IPv6.
    pub tso6: bool,
    /// TCP segments with congestion marks.
    pub ecn: bool,
    /// Rows of UDP datagrams over IPv4.
    pub uso4: bool,
    /// Rows of UDP datagrams over IPv6.
    pub uso6: bool,
}

impl Accepts {
    /// Everything.
    pub const ALL: Self = Self {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        uso4: true,
        uso6: true,
    };

    fn takes(self, kind: Kind) -> bool {
        self.csum
            && match kind {
                Kind::Tcp4 => self.tso4,
                Kind::Tcp6 => self.tso6,
                Kind::Udp4 => self.uso4,
                Kind::Udp6 => self.uso6,
            }
    }
}

/// What is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
}

/// A frame that is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// What it carries.
    pub kind: Kind,
    /// Bytes of payload in each piece, at least 1.
    pub size: u16,
    /// It carries a congestion mark that only the first piece may have.
    pub ecn: bool,
    /// Bytes of headers each piece gets.
    pub headers: usize,
}

/// A checksum that is to be finished: it covers the frame from `start` to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    /// Where what it covers begins.
    pub start: u16,
    /// Where it is, from there.
    pub offset: u16,
}

/// What is undone in a frame, checked against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// Its checksum.
    pub csum: Option<Partial>,
    /// Its size.
    pub gso: Option<Gso>,
    /// Somebody to be trusted says that its checksums are right.
    pub valid: bool,
}

/// A header that contradicts its frame or what was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contradiction;

fn must(condition: bool) -> Result<(), Contradiction> {
    if condition { Ok(()) } else { Err(Contradiction) }
}

impl Offload {
    /// Reads the header of a frame of `len` bytes that begins with `head`. What it says must fit the frame, and what the sender agreed to
    /// leave undone. `trusted`: the sender is the host, not a guest.
    pub fn read(
        header: &[u8; LEGACY_HEADER],
        frame: &Frame,
        head: &[u8],
        len: usize,
        agreed: Accepts,
        trusted: bool,
    ) -> Result<Self, Contradiction> {
        let (flags, gso_type) = (header[0], header[1]);
        let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let valid = trusted && flags & DATA_VALID != 0;
        if flags & NEEDS_CSUM == 0 {
            must(gso_type == 0)?;
            return Ok(Self {
                csum: None,
                gso: None,
                valid,
            });
        }
        must(agreed.csum)?;
        let csum = Partial {
            start: number(6),
            offset: number(8),
        };
        let (start, at) = (
            usize::from(csum.start),
            usize::from(csum.start) + usize::from(csum.offset),
        );
        // Nothing before the payload of IP may change.
        must(start >= floor(frame, head).ok_or(Contradiction)? && at + 2 <= len)?;
        let mut offload = Self {
            csum: Some(csum),
            gso: None,
            valid: false,
        };
        if gso_type != 0 {
            offload.gso = Some(gso(gso_type, number(4), csum, frame, head, len, agreed)?);
        }
        Ok(offload)
    }

    /// Packets that a frame of `len` bytes becomes on a wire.
    pub fn packets(&self, len: usize) -> u32 {
        let Some(gso) = self.gso else { return 1 };
        let payload = len.saturating_sub(gso.headers);
        u32::try_from(payload.div_ceil(usize::from(gso.size)))
            .unwrap_or(u32::MAX)
            .max(1)
    }

    /// Whether `receiver` can take it as it is.
    pub fn suits(&self, receiver: Accepts) -> bool {
        match self.gso {
            Some(gso) => receiver.takes(gso.kind) && (receiver.ecn || !gso.ecn),
            None => self.csum.is_none() || receiver.csum,
        }
    }

    /// The header for a receiver it suits, when everything behind the addresses has moved by `shift` bytes. `num_buffers` is 1.
    pub fn write(&self, receiver: Accepts, shift: isize) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[NUM_BUFFERS_AT] = 1;
        let mut put = |at: usize, value: u16| header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        if let Some(csum) = self.csum {
            put(6, csum.start.wrapping_add_signed(shift as i16));
            put(8, csum.offset);
        }
        if let Some(gso) = self.gso {
            put(2, (gso.headers as u16).wrapping_add_signed(shift as i16));
            put(4, gso.size);
        }
        header[0] = match (self.csum, self.valid && receiver.csum) {
            (Some(_), _) => NEEDS_CSUM,
            (None, true) => DATA_VALID,
            (None, false) => 0,
        };
        header[1] = self.gso.map_or(0, |gso| {
            let ecn = if gso.ecn { GSO_ECN } else { 0 };
            ecn | match gso.kind {
                Kind::Tcp4 => GSO_TCPV4,
                Kind::Tcp6 => GSO_TCPV6,
                Kind::Udp4 | Kind::Udp6 => GSO_UDP_L4,
            }
        });
        header
    }
}

/// Tells in a header that so many bytes more are before what its checksum covers.
pub fn move_checksum(header: &mut [u8], by: u16) {
    if let Some([flags, _, _, _, _, _, low, high]) = header.first_chunk_mut::<8>()
        && *flags & NEEDS_CSUM != 0
    {
        [*low, *high] = u16::from_le_bytes([*low, *high]).saturating_add(by).to_le_bytes();
    }
}

/// Where the payload of IP begins at the earliest, or of Ethernet.
fn floor(frame: &Frame, head: &[u8]) -> Option<usize> {
    Some(match frame.ethertype {
        ethertype::IPV4 => {
            let words = usize::from(*head.get(frame.l3)? & 15);
            frame.l3 + words.max(5) * 4
        }
        ethertype::IPV6 => frame.l3 + 40,
        _ => frame.l3,
    })
}

fn gso(
    gso_type: u8,
    size: u16,
    csum: Partial,
    frame: &Frame,
    head: &[u8],
    len: usize,
    agreed: Accepts,
) -> Result<Gso, Contradiction> {
    let ecn = gso_type & GSO_ECN != 0;
    let kind = match (gso_type & !GSO_ECN, frame.ethertype) {
        (GSO_TCPV4, ethertype::IPV4) => Kind::Tcp4,
        (GSO_TCPV6, ethertype::IPV6) => Kind::Tcp6,
        (GSO_UDP_L4, ethertype::IPV4) => Kind::Udp4,
        (GSO_UDP_L4, ethertype::IPV6) => Kind::Udp6,
        _ => return Err(Contradiction),
    };
    must(agreed.takes(kind) && (agreed.ecn || !ecn) && size != 0)?;
    let start = usize::from(csum.start);
    let byte = |at: usize| head.get(at).copied().ok_or(Contradiction);
    let protocol = match kind {
        Kind::Tcp4 | Kind::Udp4 => {
            must(byte(frame.l3)? >> 4 == 4 && Some(start) == floor(frame, head))?;
            // No piece of a datagram.
            must(byte(frame.l3 + 6)? & 0x3f == 0 && byte(frame.l3 + 7)? == 0)?;
            byte(frame.l3 + 9)?
        }
        // Extension headers in between are copied to each piece; only the last one says what comes.
        Kind::Tcp6 | Kind::Udp6 => {
            must(byte(frame.l3)? >> 4 == 6)?;
            if start == frame.l3 + 40 {
                byte(frame.l3 + 6)?
            } else {
                last_protocol(frame.l3, start, head)?
            }
        }
    };
    let (tcp, offset) = (matches!(kind, Kind::Tcp4 | Kind::Tcp6), csum.offset);
    let transport = if tcp {
        must(protocol == TCP && offset == TCP_CHECKSUM)?;
        let words = usize::from(byte(start + 12)? >> 4);
        must(words >= 5)?;
        words * 4
    } else {
        must(protocol == UDP && offset == UDP_CHECKSUM && !ecn)?;
        8
    };
    let headers = start + transport;
    must(headers <= HEAD && headers <= head.len() && headers <= len)?;
    must((len - headers).div_ceil(usize::from(size)) <= MAX_PIECES)?;
    Ok(Gso {
        kind,
        size,
        ecn,
        headers,
    })
}

/// The protocol that the chain of IPv6 extension headers gives for `start`.
fn last_protocol(l3: usize, start: usize, head: &[u8]) -> Result<u8, Contradiction> {
    let byte = |at: usize| head.get(at).copied().ok_or(Contradiction);
    let (mut protocol, mut at) = (byte(l3 + 6)?, l3 + 40);
    while at < start {
        must(matches!(protocol, 0 | 43 | 60))?;
        protocol = byte(at)?;
        at += (usize::from(byte(at + 1)?) + 1) * 8;
    }
    must(at == start)?;
    Ok(protocol)
}
