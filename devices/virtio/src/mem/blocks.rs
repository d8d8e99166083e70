//! Which blocks are plugged.

use std::ops::Range;

/// A bit for each block.
pub(super) struct Blocks {
    words: Vec<u64>,
    len: usize,
    set: usize,
}

impl Blocks {
    /// `len` blocks, none plugged.
    pub(super) fn new(len: usize) -> Self {
        Self {
            words: vec![0; len.div_ceil(64)],
            len,
            set: 0,
        }
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.set
    }

    fn contains(&self, block: usize) -> bool {
        let word = self.words.get(block / 64).copied().unwrap_or(0);
        word >> (block % 64) & 1 != 0
    }

    /// How many of `blocks` are plugged.
    pub(super) fn count(&self, blocks: Range<usize>) -> usize {
        blocks.filter(|block| self.contains(*block)).count()
    }

    /// Notes that `blocks`, those of them that exist, are plugged, or are not.
    pub(super) fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        for block in blocks.start..blocks.end.min(self.len) {
            if self.contains(block) == plugged {
                continue;
            }
            self.words[block / 64] ^= 1 << (block % 64);
            if plugged {
                self.set += 1;
            } else {
                self.set -= 1;
            }
        }
    }

    /// Runs of plugged blocks, in order.
    pub(super) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for block in (0..self.len).filter(|block| self.contains(*block)) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_once_and_found_in_runs() {
        let mut blocks = Blocks::new(130);
        blocks.set(60..70, true);
        blocks.set(65..72, true);
        blocks.set(128..200, true);
        assert_eq!(
            (blocks.plugged(), blocks.count(0..66), blocks.count(0..1000)),
            (14, 6, 14)
        );
        assert_eq!(blocks.runs(), [60..72, 128..130]);
        blocks.set(0..64, false);
        blocks.set(66..67, false);
        assert_eq!(blocks.runs(), [64..66, 67..72, 128..130]);
        assert_eq!(blocks.plugged(), 9);
    }
}
