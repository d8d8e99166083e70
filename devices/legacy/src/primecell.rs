//! What ARM's PrimeCell devices have in common: 32-bit registers and how they tell who they are.

use triarch_device_core::AccessError;

/// First of the identification registers.
pub(crate) const IDENTIFICATION: u64 = 0xfe0;
/// Behind the last register.
const END: u64 = 0x1000;
/// JEDEC's number of ARM, as the identification has it.
const DESIGNER: u32 = 0x41;
/// The same four bytes for every PrimeCell.
const CELL_ID: u32 = 0xb105_f00d;

/// Which PrimeCell.
pub(crate) struct Part {
    /// Its three digits.
    pub(crate) number: u32,
    /// Its revision.
    pub(crate) revision: u32,
}

impl Part {
    /// The byte of the identification register at `offset`, if there is one.
    pub(crate) fn identification(&self, offset: u64) -> Option<u8> {
        let peripheral = self.number | DESIGNER << 12 | self.revision << 20;
        let index = offset.checked_sub(IDENTIFICATION)? / 4;
        let (word, byte) = match index {
            0..=3 => (peripheral, index),
            4..=7 => (CELL_ID, index - 4),
            _ => return None,
        };
        Some((word >> (8 * byte)) as u8)
    }
}

/// Accepts accesses of 1, 2 and 4 bytes at the start of a register: drivers use all of them.
pub(crate) fn check(offset: u64, len: usize) -> Result<(), AccessError> {
    if offset.is_multiple_of(4) && offset < END && matches!(len, 1 | 2 | 4) {
        Ok(())
    } else {
        Err(AccessError::BadAccess)
    }
}

/// The value a guest writes.
pub(crate) fn get(data: &[u8]) -> u32 {
    data.iter()
        .take(4)
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Gives the guest as much of `value` as it reads.
pub(crate) fn put(value: u32, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}
