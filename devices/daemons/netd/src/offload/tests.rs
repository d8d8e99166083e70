use proptest::prelude::*;

use super::checksum::{Sum, finish};
use super::segment::cut;
use super::*;

/// A TCP or UDP packet as a guest hands it over, with a partial checksum.
pub(crate) fn large(v6: bool, tcp: bool, payload: &[u8]) -> (Vec<u8>, usize) {
    let mut frame = vec![0xaa; 12];
    frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    let transport = if tcp { 20 } else { 8 };
    let length = transport + payload.len();
    let protocol = if tcp { TCP } else { UDP };
    if v6 {
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((length as u16).to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend((0..32).map(|i| i * 7));
    } else {
        frame.extend([0x45, 0]);
        frame.extend((20 + length as u16).to_be_bytes());
        frame.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let l4 = frame.len();
    if tcp {
        frame.extend([
            0, 80, 0, 81, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 1, 0x50, 0x99, 1, 2, 0, 0, 0, 0,
        ]);
    } else {
        frame.extend([0, 80, 0, 81]);
        frame.extend((length as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend(payload);
    (frame, l4)
}

fn header(gso_type: u8, size: u16, start: usize, offset: u16) -> [u8; LEGACY_HEADER] {
    let mut header = [0; LEGACY_HEADER];
    header[..2].copy_from_slice(&[NEEDS_CSUM, gso_type]);
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header[6..8].copy_from_slice(&(start as u16).to_le_bytes());
    header[8..].copy_from_slice(&offset.to_le_bytes());
    header
}

fn read(header: &[u8; LEGACY_HEADER], frame: &[u8], agreed: Accepts) -> Result<Offload, Contradiction> {
    let head = &frame[..frame.len().min(HEAD)];
    Offload::read(
        header,
        &Frame::parse(head).expect("a frame"),
        head,
        frame.len(),
        agreed,
        false,
    )
}

/// A plain sum of 16-bit words, as in RFC 1071.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    sum as u16
}

/// Whether the checksums in a whole packet are right.
fn is_right(packet: &[u8], v6: bool) -> bool {
    let (ip, l4, addresses) = if v6 { (14, 54, 22..54) } else { (14, 34, 26..34) };
    let protocol = if v6 { packet[20] } else { packet[23] };
    let length = (packet.len() - l4) as u32;
    let pseudo = [&packet[addresses], &length.to_be_bytes(), &[0, protocol]].concat();
    (v6 || sum(&[&packet[ip..l4]]) == 0xffff) && sum(&[&pseudo, &packet[l4..]]) == 0xffff
}

proptest! {
    #[test]
    fn sums_are_those_of_the_plain_way(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert_eq!(Sum::default().bytes(&bytes).finish(), !sum(&[&bytes]));
    }

    #[test]
    fn a_partial_checksum_is_finished(v6: bool, tcp: bool, payload in prop::collection::vec(any::<u8>(), 0..400)) {
        let (mut frame, l4) = large(v6, tcp, &payload);
        let offset = if tcp { 16 } else { 6 };
        let length = ((frame.len() - l4) as u32).to_be_bytes();
        let addresses = if v6 { 22..54 } else { 26..34 };
        let pseudo = sum(&[&frame[addresses], &length, &[0, if tcp { TCP } else { UDP }]]);
        frame[l4 + offset..l4 + offset + 2].copy_from_slice(&pseudo.to_be_bytes());
        finish(&mut frame, Partial { start: l4 as u16, offset: offset as u16 });
        // The header of IPv4 is complete when it is sent.
        if !v6 {
            let ip = !sum(&[&frame[14..34]]);
            frame[24..26].copy_from_slice(&ip.to_be_bytes());
        }
        prop_assert!(is_right(&frame, v6));
    }

    #[test]
    fn pieces_are_packets_and_make_the_whole(
        v6: bool, tcp: bool, payload in prop::collection::vec(any::<u8>(), 1..60_000), size in 64u16..9000,
    ) {
        let (frame, l4) = large(v6, tcp, &payload);
        let (kind, offset) = match (tcp, v6) {
            (true, false) => (GSO_TCPV4, 16),
            (true, true) => (GSO_TCPV6, 16),
            (false, _) => (GSO_UDP_L4, 6),
        };
        let offload = read(&header(kind, size, l4, offset), &frame, Accepts::ALL).expect("a segment");
        let (gso, csum) = (offload.gso.expect("gso"), offload.csum.expect("checksum"));
        let mut pieces = Vec::new();
        cut(&frame, 14, &gso, csum, &mut Vec::new(), |piece| pieces.push(piece.to_vec()));
        prop_assert_eq!(pieces.len(), offload.packets(frame.len()) as usize);
        let mut whole = Vec::new();
        for (n, piece) in pieces.iter().enumerate() {
            prop_assert!(is_right(piece, v6), "piece {}", n);
            let last = n + 1 == pieces.len();
            prop_assert!(last || piece.len() == gso.headers + usize::from(size));
            if tcp {
                let sequence = u32::from_be_bytes(piece[l4 + 4..l4 + 8].try_into().expect("four"));
                prop_assert_eq!(sequence, 0xffff_fff0u32.wrapping_add(whole.len() as u32));
                // CWR on the first, FIN and PSH on the last, ACK on all.
                let expected = 0x10 | if n == 0 { CWR_ } else { 0 } | if last { 9 } else { 0 };
                prop_assert_eq!(piece[l4 + 13], expected);
            }
            if !v6 {
                prop_assert_eq!(u16::from_be_bytes([piece[18], piece[19]]), 0x1234u16.wrapping_add(n as u16));
                prop_assert_eq!(usize::from(u16::from_be_bytes([piece[16], piece[17]])), piece.len() - 14);
            }
            whole.extend_from_slice(&piece[gso.headers..]);
        }
        prop_assert_eq!(whole, payload);
    }

    #[test]
    fn no_header_leads_outside(
        raw: [u8; LEGACY_HEADER], bytes in prop::collection::vec(any::<u8>(), 14..300), kind in 0usize..3,
    ) {
        let mut bytes = bytes;
        let types: [[u8; 2]; 3] = [[8, 0], [0x86, 0xdd], [0x81, 0]];
        bytes[12..14].copy_from_slice(&types[kind]);
        prop_assume!(Frame::parse(&bytes).is_some());
        let Ok(offload) = read(&raw, &bytes, Accepts::ALL) else { return Ok(()) };
        if let Some(csum) = offload.csum {
            let at = usize::from(csum.start) + usize::from(csum.offset);
            prop_assert!(usize::from(csum.start) >= 14 && at + 2 <= bytes.len());
            finish(&mut bytes.clone(), csum);
        }
        if let (Some(gso), Some(csum)) = (offload.gso, offload.csum) {
            let mut pieces = 0;
            cut(&bytes, 14, &gso, csum, &mut Vec::new(), |piece| {
                assert!(piece.len() <= gso.headers + usize::from(gso.size));
                pieces += 1;
            });
            prop_assert!(pieces <= MAX_PIECES);
        }
    }
}

const CWR_: u8 = 0x80;

#[test]
fn headers_that_contradict_their_frame_are_refused() {
    let (frame, l4) = large(false, true, &[7; 3000]);
    let ok = header(GSO_TCPV4, 1000, l4, 16);
    read(&ok, &frame, Accepts::ALL).expect("right");
    let with = |at: usize, value: u8| {
        let mut header = ok;
        header[at] = value;
        read(&header, &frame, Accepts::ALL)
    };
    for (at, value) in [
        (0, 0),
        (1, GSO_TCPV6),
        (1, GSO_UDP_L4),
        (1, 3),
        (1, 2),
        (6, 33),
        (6, 35),
        (6, 13),
        (7, 0xff),
        (8, 6),
        (9, 0x20),
    ] {
        with(at, value).expect_err("refused");
    }
    let zero = header(GSO_TCPV4, 0, l4, 16);
    read(&zero, &frame, Accepts::ALL).expect_err("no size");
    read(&header(GSO_TCPV4, 2, l4, 16), &frame, Accepts::ALL).expect_err("too many pieces");
    let without = Accepts {
        tso4: false,
        ..Accepts::ALL
    };
    read(&ok, &frame, without).expect_err("not agreed on");
    let mut fragment = frame.clone();
    fragment[20] = 0x20;
    read(&ok, &fragment, Accepts::ALL).expect_err("a fragment");
    let mut short = frame;
    short[l4 + 12] = 0x40;
    read(&ok, &short, Accepts::ALL).expect_err("a short TCP header");
}

#[test]
fn a_header_is_passed_on_as_it_came_but_for_the_tag() {
    let (frame, l4) = large(false, true, &[7; 3000]);
    let mut raw = header(GSO_TCPV4 | GSO_ECN, 1000, l4, 16);
    let offload = read(&raw, &frame, Accepts::ALL).expect("right");
    let no_ecn = Accepts {
        ecn: false,
        ..Accepts::ALL
    };
    assert!(offload.suits(Accepts::ALL) && !offload.suits(no_ecn) && !offload.suits(Accepts::default()));
    let written = offload.write(Accepts::ALL, 4);
    raw[2] = 58;
    raw[6] += 4;
    assert_eq!((&written[..10], written[10]), (&raw[..], 1));
}
