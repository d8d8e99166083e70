//! Telling a network where an address is now.

/// The shortest frame on a wire, without its checksum.
const SHORTEST: usize = 60;

/// A frame by which switches learn where `mac` is: reverse ARP (RFC 903), who am I? Its answer is of no interest, but everyone hears the
/// question.
pub fn rarp(mac: &[u8; 6]) -> [u8; SHORTEST] {
    const BROADCAST: [u8; 6] = [0xff; 6];
    // EtherType; Ethernet and IPv4, with addresses of 6 and 4 bytes; the question.
    const QUESTION: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    let mut frame = [0; SHORTEST];
    for (at, part) in [(0, &BROADCAST[..]), (6, mac), (12, &QUESTION), (22, mac), (32, mac)] {
        frame[at..at + part.len()].copy_from_slice(part);
    }
    frame
}
