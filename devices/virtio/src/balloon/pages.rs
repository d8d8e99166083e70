//! Pages in the balloon, and which of the host's pages they make up.

use std::collections::BTreeMap;
use std::ops::Range;

use super::BALLOON_PAGE;

/// Runs of consecutive pages in `pages`, which are sorted on the way. Doubles count once.
pub(super) fn runs(pages: &mut Vec<u32>) -> impl Iterator<Item = Range<u64>> {
    pages.sort_unstable();
    pages.dedup();
    pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)).map(|run| {
        let first = u64::from(run[0]);
        first..first + run.len() as u64
    })
}

/// Host pages larger than those of the balloon can only be given back whole: this remembers which parts of them are in the balloon.
pub(super) struct HugePages {
    /// Balloon pages of a host page; 1: there is nothing to remember.
    parts: u64,
    /// A bit for each part of those host pages that have some in the balloon, by number of the host page. There are only pages of the
    /// guest's memory in it, so that it takes a fraction of that.
    pages: BTreeMap<u64, Vec<u64>>,
}

impl HugePages {
    /// For host pages of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        Self {
            parts: (size / BALLOON_PAGE).max(1),
            pages: BTreeMap::new(),
        }
    }

    /// Whether the host's pages are the balloon's.
    pub(super) fn are_small(&self) -> bool {
        self.parts == 1
    }

    /// Puts `page` in. If that makes a host page whole: the balloon pages it consists of.
    pub(super) fn insert(&mut self, page: u64) -> Option<Range<u64>> {
        let (number, part) = (page / self.parts, page % self.parts);
        let words = self.parts.div_ceil(64) as usize;
        let bits = self.pages.entry(number).or_insert_with(|| vec![0; words]);
        let word = bits.get_mut((part / 64) as usize)?;
        let before = std::mem::replace(word, *word | 1 << (part % 64));
        let new = before != *word;
        let whole = || bits.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() == self.parts;
        (new && whole()).then(|| number * self.parts..(number + 1) * self.parts)
    }

    /// Takes `page` out.
    pub(super) fn remove(&mut self, page: u64) {
        let (number, part) = (page / self.parts, page % self.parts);
        let Some(bits) = self.pages.get_mut(&number) else {
            return;
        };
        if let Some(word) = bits.get_mut((part / 64) as usize) {
            *word &= !(1 << (part % 64));
        }
        if bits.iter().all(|word| *word == 0) {
            self.pages.remove(&number);
        }
    }

    /// Takes everything out.
    pub(super) fn clear(&mut self) {
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_as_long_as_they_can_be() {
        let mut pages = vec![7, 3, 2, 3, u32::MAX, 8, u32::MAX - 1];
        let last = u64::from(u32::MAX);
        let runs: Vec<_> = runs(&mut pages).collect();
        assert_eq!(runs, [2..4, 7..9, last - 1..last + 1]);
    }

    #[test]
    fn a_huge_page_goes_when_all_of_it_is_in_and_once() {
        let mut huge = HugePages::new(2 << 20);
        let order: Vec<u64> = (0..512).map(|i| 512 + (i * 5) % 512).collect();
        for page in &order[..511] {
            assert_eq!(huge.insert(*page), None);
            assert_eq!(huge.insert(*page), None, "a double");
        }
        assert_eq!(huge.insert(order[511]), Some(512..1024));
        assert_eq!(huge.insert(order[511]), None, "it is gone already");
        huge.remove(700);
        assert_eq!(huge.insert(700), Some(512..1024), "it was used in between");
        for page in 512..1024 {
            huge.remove(page);
        }
        assert!(huge.pages.is_empty());
        huge.remove(5);
        assert!(!huge.are_small() && HugePages::new(4096).are_small());
    }
}
