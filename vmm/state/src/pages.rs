//! Which pages of a chunk hold anything.

use std::ops::Range;

use crate::PAGE;

/// Bytes of a chunk of memory: what one checksum is of.
pub const CHUNK: usize = 4 << 20;

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
}
