//! What the guest tells of its memory (virtio 1.2, 5.5.6.3 and 5.5.6.4).

use std::time::Instant;

/// Bytes of one statistic: a tag of 16 bits and a value of 64.
pub(super) const ENTRY: usize = 10;
/// Tags there are, by their numbers; drivers newer than this send others, which are passed over.
const TAGS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free",
    "total",
    "available",
    "caches",
    "huge_page_allocations",
    "huge_page_failures",
    "oom_kills",
    "allocation_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];
/// Those that are bytes.
const BYTES: [&str; 6] = ["swap_in", "swap_out", "free", "total", "available", "caches"];
/// The driver does not know.
const UNKNOWN: u64 = u64::MAX;

/// What the guest told last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonStatistics {
    values: [Option<u64>; TAGS.len()],
    /// When.
    pub at: Instant,
}

impl BalloonStatistics {
    /// Reads what a driver sent. Of a tag that comes twice the last counts.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut values = [None; TAGS.len()];
        for entry in bytes.chunks_exact(ENTRY) {
            let (tag, value) = entry.split_at(2);
            let tag = u16::from_le_bytes([tag[0], tag[1]]);
            let value = value.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            if let Some(place) = values.get_mut(usize::from(tag)) {
                *place = Some(value).filter(|value| *value != UNKNOWN);
            }
        }
        let at = Instant::now();
        Self { values, at }
    }

    /// What is told in bytes, by names: memory that is free, and so on.
    pub fn bytes(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.named(true)
    }

    /// What is told as a number of events since the guest's boot, by names.
    pub fn events(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.named(false)
    }

    fn named(&self, bytes: bool) -> impl Iterator<Item = (&'static str, u64)> {
        let all = TAGS.into_iter().zip(self.values);
        let known = all.filter_map(|(name, value)| Some((name, value?)));
        known.filter(move |(name, _)| BYTES.contains(name) == bytes)
    }
}
