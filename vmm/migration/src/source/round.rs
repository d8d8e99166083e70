//! One pass over memory, shared by the threads that send it.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use crate::handle::Counters;
use crate::memory::{Memory, PAGE};

/// Bytes of memory that are looked at and sent at once.
pub(super) const BATCH: u64 = 512 << 10;
/// Bytes of memory that a thread takes for itself: a huge page. Where several threads of the destination begin to write to one, each has one
/// cleared, and all but one are thrown away.
pub(super) const SHARE: u64 = 2 << 20;

/// What is to be sent in a round.
pub(super) struct Round {
    pub(super) number: u32,
    /// All memory at the destination still reads as zeroes, where nothing was sent to.
    pub(super) first: bool,
    left: Mutex<Left>,
}

struct Left {
    /// Runs in order, each in one region.
    runs: std::vec::IntoIter<Range<u64>>,
    /// What is left of the one that was begun.
    current: Range<u64>,
    /// In the first round: until where `current` is known to hold something.
    data_end: u64,
}

impl Round {
    pub(super) fn new(number: u32, first: bool, runs: Vec<Range<u64>>) -> Self {
        Self {
            number,
            first,
            left: Mutex::new(Left {
                runs: runs.into_iter(),
                current: 0..0,
                data_end: 0,
            }),
        }
    }

    /// Ends it early: nobody takes anything any more. Returns what nobody took.
    pub(super) fn stop(&self) -> Vec<Range<u64>> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let current = std::mem::replace(&mut left.current, 0..0);
        let runs = std::mem::take(&mut left.runs);
        std::iter::once(current)
            .chain(runs)
            .filter(|run| !run.is_empty())
            .collect()
    }

    /// The next pieces to send, each in one region; `most` bytes at most, and not beyond the next multiple of that where memory is in one
    /// piece. None: nothing is left.
    pub(super) fn take(&self, memory: &dyn Memory, counters: &Counters, most: u64) -> io::Result<Vec<Range<u64>>> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut pieces, mut room) = (Vec::new(), most);
        let mut done = 0;
        while room > 0 {
            if left.current.is_empty() {
                let Some(next) = left.runs.next() else { break };
                left.data_end = if self.first { next.start } else { next.end };
                left.current = next;
            }
            if left.data_end <= left.current.start {
                let data = memory.data(left.current.clone())?;
                // Whatever is said about what was not asked for is not believed, and widened to whole pages.
                let data = data.map_or(left.current.end..left.current.end, |data| {
                    let start = (data.start - data.start % PAGE).clamp(left.current.start, left.current.end);
                    let end = data.end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
                    start..end.clamp(start, left.current.end)
                });
                let hole = data.start - left.current.start;
                counters.zero_pages.fetch_add(hole / PAGE, Ordering::Relaxed);
                done += hole;
                left.current.start = data.start;
                // An empty run of data would never end.
                left.data_end = match data.is_empty() {
                    true => left.current.end,
                    false => data.end,
                };
                continue;
            }
            if pieces.is_empty() {
                room -= left.current.start % most;
            }
            let end = (left.current.start + room).min(left.data_end);
            let piece = left.current.start..end;
            left.current.start = end;
            room -= piece.end - piece.start;
            done += piece.end - piece.start;
            pieces.push(piece);
        }
        counters.remaining.fetch_sub(done, Ordering::Relaxed);
        Ok(pieces)
    }
}

/// Bytes of runs.
pub(super) fn bytes(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}

/// The same runs in parts of [`BATCH`] bytes at most.
pub(super) fn batches(runs: Vec<Range<u64>>) -> Vec<Vec<Range<u64>>> {
    let (mut batches, mut room) = (Vec::<Vec<_>>::new(), 0);
    for mut run in runs {
        while !run.is_empty() {
            if room == 0 {
                batches.push(Vec::new());
                room = BATCH;
            }
            let end = run.end.min(run.start + room);
            room -= end - run.start;
            if let Some(batch) = batches.last_mut() {
                batch.push(run.start..end);
            }
            run.start = end;
        }
    }
    batches
}

/// What is in either, in order.
pub(super) fn union(mut runs: Vec<Range<u64>>, more: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.extend(more);
    runs.sort_by_key(|run| run.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(runs.len());
    for run in runs {
        match merged.last_mut() {
            // Runs that only touch may be of two regions.
            Some(last) if run.start < last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    /// Memory of which every second page holds something.
    struct Striped;

    impl Memory for Striped {
        fn regions(&self) -> Vec<Region> {
            Vec::new()
        }

        fn read(&self, _gpa: u64, _buffer: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
            let start = range.start.next_multiple_of(2 * PAGE);
            Ok((start < range.end).then_some(start..start + PAGE))
        }

        fn start_log(&self) -> io::Result<()> {
            Ok(())
        }

        fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
            Ok(Vec::new())
        }

        fn stop_log(&self) {}
    }

    fn all(first: bool, pages: &[Range<u64>]) -> (Vec<Range<u64>>, u64) {
        let counters = Counters::default();
        let runs: Vec<_> = pages.iter().map(|run| run.start * PAGE..run.end * PAGE).collect();
        counters.remaining.store(bytes(&runs), Ordering::Relaxed);
        let round = Round::new(0, first, runs);
        let mut taken = Vec::new();
        loop {
            let batch = round.take(&Striped, &counters, BATCH).expect("taken");
            if batch.is_empty() {
                break;
            }
            assert!(bytes(&batch) <= BATCH);
            taken.extend(batch);
        }
        assert_eq!(counters.remaining.load(Ordering::Relaxed), 0);
        (taken, counters.zero_pages.load(Ordering::Relaxed))
    }

    #[test]
    fn holes_are_left_out_the_first_time_only() {
        let pages = |taken: Vec<Range<u64>>| {
            taken
                .iter()
                .map(|run| run.start / PAGE..run.end / PAGE)
                .collect::<Vec<_>>()
        };
        let (taken, holes) = all(true, &[0..4, 5..6, 8..9]);
        assert_eq!((pages(taken), holes), (vec![0..1, 2..3, 8..9], 3));
        let (taken, holes) = all(false, &[0..4, 5..6, 8..9]);
        assert_eq!((pages(taken), holes), (vec![0..4, 5..6, 8..9], 0));
    }

    #[test]
    fn long_runs_are_cut_to_batches() {
        let (taken, _) = all(false, std::slice::from_ref(&(0..1000)));
        assert_eq!(taken.len() as u64, (1000 * PAGE).div_ceil(BATCH));
        assert_eq!(bytes(&taken), 1000 * PAGE);
    }

    #[test]
    fn a_thread_has_huge_pages_for_itself() {
        let counters = Counters::default();
        let runs = vec![5 * PAGE..2 * SHARE + 7 * PAGE, 3 * SHARE - PAGE..3 * SHARE + PAGE];
        counters.remaining.store(bytes(&runs), Ordering::Relaxed);
        let round = Round::new(1, false, runs);
        let take = || {
            let taken = round.take(&Striped, &counters, SHARE).expect("taken");
            taken.iter().map(|run| (run.start, run.end)).collect::<Vec<_>>()
        };
        assert_eq!(take(), [(5 * PAGE, SHARE)]);
        assert_eq!(take(), [(SHARE, 2 * SHARE)]);
        assert_eq!(
            take(),
            [(2 * SHARE, 2 * SHARE + 7 * PAGE), (3 * SHARE - PAGE, 3 * SHARE + PAGE)]
        );
        assert_eq!(take(), []);
    }

    #[test]
    fn batches_have_everything_in_order() {
        const HALF: u64 = BATCH / 2;
        let halves = |runs: Vec<Range<u64>>| {
            let half = |run: &Range<u64>| (run.start / HALF, run.end / HALF);
            let batches = batches(runs);
            batches
                .iter()
                .map(|batch| batch.iter().map(half).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert!(halves(vec![]).is_empty());
        assert_eq!(
            halves(vec![0..HALF, 2 * HALF..4 * HALF, 8 * HALF..12 * HALF]),
            [
                vec![(0, 1), (2, 3)],
                vec![(3, 4), (8, 9)],
                vec![(9, 11)],
                vec![(11, 12)]
            ]
        );
    }

    #[test]
    fn a_union_has_each_page_once() {
        assert_eq!(
            union(vec![0..4, 8..9], vec![2..6, 6..7, 20..21]),
            [0..6, 6..7, 8..9, 20..21]
        );
        assert_eq!(union(vec![0..10, 20..21], vec![2..4, 3..12]), [0..12, 20..21]);
    }
}
