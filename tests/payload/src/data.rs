//! Test data that the other side can compute too: CRC-32 and a pattern by seed (both described in README.md).

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let (mut crc, mut bit) = (n as u32, 0);
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
};

/// CRC-32 (IEEE 802.3) of `bytes`, continuing from `crc` (0 at the start).
pub fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!crc, |crc, byte| CRC_TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

/// The next of a row of random numbers (SplitMix64).
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Fills `bytes` with the pattern of `seed`; each 512-byte block depends on its number only, the first being `block`.
pub fn fill(bytes: &mut [u8], seed: u64, block: u64) {
    for (n, chunk) in bytes.chunks_mut(512).enumerate() {
        let mut state = seed ^ (block + n as u64).wrapping_mul(0xd6e8_feb8_6659_fd93);
        for word in chunk.chunks_mut(8) {
            let random = splitmix64(&mut state).to_le_bytes();
            word.copy_from_slice(&random[..word.len()]);
        }
    }
}
