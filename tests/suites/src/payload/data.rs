//! The guest's test data, computed a second time (tests/payload/README.md describes it).

/// CRC-32 (IEEE 802.3).
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| {
            crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 }
        })
    })
}

/// `len` bytes of the pattern of `seed`, from 512-byte block `block` on.
pub fn pattern(seed: u64, block: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 512);
    for number in block.. {
        if bytes.len() >= len {
            break;
        }
        let mut state = seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93);
        for _ in 0..64 {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            bytes.extend((z ^ z >> 31).to_le_bytes());
        }
    }
    bytes.truncate(len);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_has_its_well_known_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn blocks_depend_on_their_number_only() {
        let all = pattern(7, 0, 2000);
        assert_eq!(all[512..], pattern(7, 1, 1488));
        assert_ne!(all[..512], all[512..1024]);
        // SplitMix64's first number for state 0.
        assert_eq!(pattern(0, 0, 8), 0xe220_a839_7b1d_cdaf_u64.to_le_bytes());
    }
}
