//! Which pages of a chunk hold anything, and which pages of a region are meant.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::PAGE;

/// Bytes of a chunk of memory: what one checksum is of.
pub const CHUNK: usize = 4 << 20;

/// Pages of a chunk.
const PAGES: usize = CHUNK / PAGE as usize;
/// Words with a bit for each page of a chunk.
const WORDS: usize = PAGES / u64::BITS as usize;
/// Hexadecimal digits of a word.
const DIGITS: usize = 16;

static ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// Runs of pages of `bytes` that are not all zeroes, as ranges of bytes.
pub fn filled(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let pages = bytes.len().div_ceil(PAGE as usize);
    let page = |n: usize| n * PAGE as usize..bytes.len().min((n + 1) * PAGE as usize);
    // Compared at once: a loop over bytes is slow in builds without optimisation.
    let is_zero = move |n: usize| {
        let page = &bytes[page(n)];
        *page == ZEROES[..page.len()]
    };
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = (next..pages).find(|n| !is_zero(*n))?;
        let end = (start..pages).find(|n| is_zero(*n)).unwrap_or(pages);
        next = end;
        Some(page(start).start..page(end - 1).end)
    })
}

/// Some pages of a region. In `state.json` it is a text for each chunk: empty without pages, or 16 words of 16 hexadecimal digits, a bit
/// for each page, the first in the lowest bit of the first word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Vec<String>", try_from = "Vec<String>")]
pub struct Pages {
    words: Vec<u64>,
    /// How many there are before each chunk, and in all.
    before: Vec<u64>,
}

impl Pages {
    /// Those of a region of `size` bytes that lie in one of `runs`, ranges of bytes behind its begin; a page that is partly in one is meant
    /// as a whole.
    pub fn of(size: u64, runs: impl IntoIterator<Item = Range<u64>>) -> Self {
        let chunks = size.div_ceil(CHUNK as u64) as usize;
        let mut words = vec![0_u64; chunks * WORDS];
        for run in runs {
            for page in run.start / PAGE..run.end.min(size).div_ceil(PAGE) {
                words[(page / 64) as usize] |= 1 << (page % 64);
            }
        }
        Self::new(words)
    }

    fn new(words: Vec<u64>) -> Self {
        let mut sum = 0;
        let mut before = vec![0];
        for chunk in words.chunks(WORDS) {
            sum += chunk.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            before.push(sum);
        }
        Self { words, before }
    }

    /// Of how many chunks they are.
    pub(crate) fn chunks(&self) -> usize {
        self.before.len() - 1
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.before.last().copied().unwrap_or(0)
    }

    /// How many there are before chunk `chunk`.
    pub(crate) fn before(&self, chunk: usize) -> u64 {
        self.before.get(chunk).copied().unwrap_or(0)
    }

    /// How many are in chunk `chunk`.
    pub(crate) fn count_in(&self, chunk: usize) -> usize {
        (self.before(chunk + 1).saturating_sub(self.before(chunk))) as usize
    }

    /// Those of chunk `chunk`, as runs of bytes behind its begin.
    pub(crate) fn runs(&self, chunk: usize) -> impl Iterator<Item = Range<usize>> {
        let words = self.words.get(chunk * WORDS..(chunk + 1) * WORDS).unwrap_or_default();
        let has = |n: usize| words.get(n / 64).is_some_and(|word| word >> (n % 64) & 1 != 0);
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..PAGES).find(|n| has(*n))?;
            let end = (start..PAGES).find(|n| !has(*n)).unwrap_or(PAGES);
            next = end;
            Some(start * PAGE as usize..end * PAGE as usize)
        })
    }

    /// Whether none is behind the end of a region of `size` bytes.
    pub(crate) fn fit(&self, size: u64) -> bool {
        let last = self.words.iter().rposition(|word| *word != 0);
        let end = last.map_or(0, |at| at as u64 * 64 + u64::from(64 - self.words[at].leading_zeros()));
        end * PAGE <= size
    }
}

impl From<Pages> for Vec<String> {
    fn from(pages: Pages) -> Self {
        let text = |words: &[u64]| match words.iter().all(|word| *word == 0) {
            true => String::new(),
            false => words.iter().map(|word| format!("{word:016x}")).collect(),
        };
        pages.words.chunks(WORDS).map(text).collect()
    }
}

impl TryFrom<Vec<String>> for Pages {
    type Error = &'static str;

    fn try_from(texts: Vec<String>) -> Result<Self, Self::Error> {
        let mut words = Vec::with_capacity(texts.len() * WORDS);
        for text in &texts {
            if text.is_empty() {
                words.extend([0; WORDS]);
                continue;
            }
            if text.len() != WORDS * DIGITS || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err("the pages of a chunk are 256 hexadecimal digits");
            }
            let word = |at: usize| u64::from_str_radix(&text[at * DIGITS..][..DIGITS], 16);
            for at in 0..WORDS {
                words.push(word(at).map_err(|_| "the pages of a chunk are 256 hexadecimal digits")?);
            }
        }
        Ok(Self::new(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_wherever_they_are() {
        const P: usize = PAGE as usize;
        let runs = |dirty: &[usize], len: usize| {
            let mut bytes = vec![0; len];
            dirty.iter().for_each(|at| bytes[*at] = 1);
            filled(&bytes).collect::<Vec<_>>()
        };
        for (dirty, len, expected) in [
            (&[][..], 4 * P, vec![]),
            (&[0], 4 * P, vec![(0, P)]),
            (&[P, 2 * P, 4 * P - 1], 4 * P, vec![(P, 4 * P)]),
            (&[0, 2 * P + 5], 3 * P, vec![(0, P), (2 * P, 3 * P)]),
            (&[P + 1], P + 2, vec![(P, P + 2)]),
            (&[], 0, vec![]),
        ] {
            let found: Vec<_> = runs(dirty, len).iter().map(|run| (run.start, run.end)).collect();
            assert_eq!(found, expected, "{dirty:?}");
        }
    }

    #[test]
    fn pages_are_told_and_understood() {
        const C: u64 = CHUNK as u64;
        let size = 2 * C + 3 * PAGE;
        let pages = Pages::of(
            size,
            [PAGE..PAGE + 1, C - PAGE..C + 2 * PAGE, 2 * C + 2 * PAGE..size + C],
        );
        assert_eq!((pages.chunks(), pages.count()), (3, 5));
        assert_eq!([0, 1, 2, 3].map(|chunk| pages.before(chunk)), [0, 2, 4, 5]);
        assert_eq!([0, 1, 2, 3].map(|chunk| pages.count_in(chunk)), [2, 2, 1, 0]);
        let runs = |chunk| {
            let runs = pages
                .runs(chunk)
                .map(|run| (run.start / PAGE as usize, run.end / PAGE as usize));
            runs.collect::<Vec<_>>()
        };
        assert_eq!(
            [runs(0), runs(1), runs(2), runs(3)],
            [vec![(1, 2), (1023, 1024)], vec![(0, 2)], vec![(2, 3)], vec![]]
        );
        assert!(pages.fit(size) && !pages.fit(size - PAGE));
        let text = serde_json::to_string(&pages).expect("JSON");
        assert_eq!(serde_json::from_str::<Pages>(&text).expect("pages"), pages);
        assert_eq!(serde_json::to_string(&Pages::of(C, [])).expect("JSON"), "[\"\"]");
        for bad in ["[\"0\"]", "[null]", "[\"+000000000000000\"]"] {
            assert!(serde_json::from_str::<Pages>(bad).is_err(), "{bad}");
        }
    }
}
