//! The Internet checksum (RFC 1071).

use super::Partial;

/// A sum under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes, which begin at an even place.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // Sums of 32-bit words fold to the same; 64 bits hold more of them than any packet has.
        self.0 += words
            .iter()
            .map(|word| u64::from(u32::from_be_bytes(*word)))
            .sum::<u64>();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        self.0 += u64::from(u32::from_be_bytes(last));
        self
    }

    /// Adds a number.
    pub fn number(mut self, number: u32) -> Self {
        self.0 += u64::from(number);
        self
    }

    /// The checksum.
    pub fn finish(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }
}

/// Finishes a partial checksum, whose field holds the sum of the pseudo header. It must lie in the frame; otherwise nothing happens.
pub fn finish(frame: &mut [u8], partial: Partial) {
    let (start, offset) = (usize::from(partial.start), usize::from(partial.offset));
    let Some(covered) = frame.get_mut(start..) else { return };
    let sum = Sum::default().bytes(covered).finish();
    if let Some(field) = covered.get_mut(offset..offset + 2) {
        // Zero means that there is none (RFC 768), and is as good as this everywhere else.
        let sum = if sum == 0 { 0xffff } else { sum };
        field.copy_from_slice(&sum.to_be_bytes());
    }
}
