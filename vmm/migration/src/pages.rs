//! Sets of pages.

use std::ops::Range;

use crate::memory::{Layout, PAGE, Region};

/// Some of the pages of a region, by their numbers: a bit for each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

impl PageSet {
    /// None of so many pages.
    pub fn none(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
            count: 0,
        }
    }

    /// All of so many pages.
    pub fn all(pages: u64) -> Self {
        let mut set = Self::none(pages);
        set.insert(0..pages);
        set
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether it has page `page`.
    pub fn contains(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Adds `pages`, as far as there are so many.
    pub fn insert(&mut self, pages: Range<u64>) {
        self.change(pages, |word, mask| *word |= mask);
    }

    /// Takes `pages` away, and returns how many of them it had.
    pub fn remove(&mut self, pages: Range<u64>) -> u64 {
        let before = self.count;
        self.change(pages, |word, mask| *word &= !mask);
        before - self.count
    }

    fn change(&mut self, pages: Range<u64>, change: impl Fn(&mut u64, u64)) {
        let (mut at, end) = (pages.start, pages.end.min(self.pages));
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            let word = &mut self.words[(at / 64) as usize];
            let before = word.count_ones();
            change(word, mask);
            self.count = self.count - u64::from(before) + u64::from(word.count_ones());
            at += bits;
        }
    }

    /// The first run of pages in `within` that it has.
    pub fn first(&self, within: Range<u64>) -> Option<Range<u64>> {
        let end = within.end.min(self.pages);
        let start = self.next(within.start, end, true)?;
        Some(start..self.next(start, end, false).unwrap_or(end))
    }

    /// The first page from `at` to before `end` that it has, or has not.
    fn next(&self, mut at: u64, end: u64, has: bool) -> Option<u64> {
        while at < end {
            let word = self.words[(at / 64) as usize];
            let bits = if has { word } else { !word } >> (at % 64);
            if bits != 0 {
                return Some(at + u64::from(bits.trailing_zeros())).filter(|found| *found < end);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

/// Pages of guest memory that one side lacks, or has to send.
#[derive(Debug)]
pub(crate) struct Lacks {
    regions: Vec<(Region, PageSet)>,
    /// Where [`take`](Self::take) goes on: region and page.
    next: (usize, u64),
}

impl Lacks {
    pub(crate) fn none(layout: &Layout) -> Self {
        let regions = layout.regions().iter();
        Self {
            regions: regions
                .map(|region| (*region, PageSet::none(region.len / PAGE)))
                .collect(),
            next: (0, 0),
        }
    }

    /// The region of whole pages at `gpa` and their numbers there; `None`: they are not in one.
    fn find(&self, gpa: u64, len: u64) -> Option<(usize, Range<u64>)> {
        let after = self.regions.partition_point(|(region, _)| region.gpa <= gpa);
        let at = after.checked_sub(1)?;
        let (region, _) = self.regions.get(at)?;
        let start = gpa - region.gpa;
        let end = start.checked_add(len).filter(|end| *end <= region.len)?;
        Some((at, start / PAGE..end / PAGE))
    }

    /// Adds the pages at `gpa`. `false`: there are none.
    #[must_use]
    pub(crate) fn insert(&mut self, gpa: u64, len: u64) -> bool {
        let found = self.find(gpa, len);
        if let Some((at, pages)) = found.clone() {
            self.regions[at].1.insert(pages);
        }
        found.is_some()
    }

    /// Takes the pages at `gpa` away; the next that are [taken](Self::take) are those behind them. `false`: there are none.
    #[must_use]
    pub(crate) fn remove(&mut self, gpa: u64, len: u64) -> bool {
        let found = self.find(gpa, len);
        if let Some((at, pages)) = found.clone() {
            self.next = (at, pages.end);
            self.regions[at].1.remove(pages);
        }
        found.is_some()
    }

    /// Takes the next pages away, `most` bytes of them, in pieces that lie in one region each. None: it is empty.
    pub(crate) fn take(&mut self, most: u64) -> Vec<Range<u64>> {
        let (mut pieces, mut room) = (Vec::new(), most / PAGE);
        // Once round, and the begin of where it began.
        for _ in 0..=self.regions.len() {
            let Some((region, set)) = self.regions.get_mut(self.next.0) else {
                self.next = (0, 0);
                continue;
            };
            while let Some(run) = set.first(self.next.1..u64::MAX).filter(|_| room > 0) {
                let run = run.start..run.end.min(run.start + room);
                room -= set.remove(run.clone());
                self.next.1 = run.end;
                pieces.push(region.gpa + run.start * PAGE..region.gpa + run.end * PAGE);
            }
            if room == 0 {
                break;
            }
            self.next = (self.next.0 + 1, 0);
        }
        if pieces.is_empty() && self.bytes() > 0 {
            // Behind the place where it began was nothing more.
            self.next = (0, 0);
            return self.take(most);
        }
        pieces
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.regions.iter().map(|(_, set)| set.count() * PAGE).sum()
    }

    /// All of them, in order.
    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        for (region, set) in &self.regions {
            let mut at = 0;
            while let Some(run) = set.first(at..u64::MAX) {
                at = run.end;
                runs.push(region.gpa + run.start * PAGE..region.gpa + run.end * PAGE);
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_has_what_was_put_in(changes in proptest::collection::vec((any::<bool>(), 0..200_u64, 0..90_u64), 0..40)) {
            let mut set = PageSet::none(170);
            let mut model = [false; 170];
            for (add, start, len) in changes {
                let pages = start..start + len;
                let inside = start.min(170) as usize..(start + len).min(170) as usize;
                let had = model[inside.clone()].iter().filter(|has| **has).count() as u64;
                match add {
                    true => set.insert(pages),
                    false => assert_eq!(set.remove(pages), had),
                }
                model[inside].fill(add);
                assert_eq!(set.count(), model.iter().filter(|has| **has).count() as u64);
                assert!((0..200).all(|page| set.contains(page) == model.get(page as usize).copied().unwrap_or(false)));
                let mut found = Vec::new();
                let mut at = 0;
                while let Some(run) = set.first(at..u64::MAX) {
                    assert!(!run.is_empty());
                    at = run.end;
                    found.extend(run);
                }
                assert!(found.into_iter().eq((0..170).filter(|page| model[*page as usize])));
            }
        }
    }

    #[test]
    fn pages_are_taken_once_and_from_behind_what_was_wanted() {
        let region = |gpa: u64, pages: u64| Region {
            gpa: gpa * PAGE,
            len: pages * PAGE,
        };
        let layout = Layout::new(vec![region(0, 100), region(100, 10), region(1000, 10)]).expect("a layout");
        let mut lacks = Lacks::none(&layout);
        let page = |lacks: &mut Lacks, gpa: u64, len: u64| lacks.insert(gpa * PAGE, len * PAGE);
        assert!(page(&mut lacks, 90, 10) && page(&mut lacks, 100, 10) && page(&mut lacks, 1003, 2));
        for (gpa, len) in [(99, 2), (110, 1), (1009, 2), (2000, 1), (u64::MAX / PAGE, 1)] {
            assert!(!page(&mut lacks, gpa, len) && !lacks.remove(gpa * PAGE, len * PAGE));
        }
        assert_eq!(lacks.bytes(), 22 * PAGE);
        assert!(lacks.remove(104 * PAGE, PAGE));
        let pages = |runs: Vec<Range<u64>>| -> Vec<_> {
            runs.into_iter().map(|run| run.start / PAGE..run.end / PAGE).collect()
        };
        assert_eq!(pages(lacks.runs()), [90..100, 100..104, 105..110, 1003..1005]);
        assert_eq!(pages(lacks.take(3 * PAGE)), std::slice::from_ref(&(105..108)));
        assert_eq!(pages(lacks.take(5 * PAGE)), [108..110, 1003..1005, 90..91]);
        assert_eq!(pages(lacks.take(100 * PAGE)), [91..100, 100..104]);
        assert_eq!((lacks.take(PAGE), lacks.bytes()), (vec![], 0));
        // What nobody lacks may be wanted all the same.
        assert!(lacks.remove(1009 * PAGE, PAGE) && page(&mut lacks, 1, 1));
        assert_eq!(pages(lacks.take(PAGE)), std::slice::from_ref(&(1..2)));
    }
}
