//! What came of changes that guests were asked for: processors, memory and devices that come and go.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Which way something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The guest gets it.
    Add,
    /// It should give it back.
    Remove,
}

impl Direction {
    const ALL: [Self; 2] = [Self::Add, Self::Remove];

    fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
        }
    }
}

/// What came of one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest did it.
    Done,
    /// It said that it does not want to.
    Refused,
    /// It did not answer in time.
    Timeout,
    /// It was asked for something else before it answered.
    Replaced,
    /// It ended before it answered.
    Reset,
    /// It was not waited for any more.
    Forced,
    /// The host could not.
    Failed,
}

impl Outcome {
    const COUNT: usize = Self::Failed as usize + 1;

    fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Replaced => "replaced",
            Self::Reset => "reset",
            Self::Forced => "forced",
            Self::Failed => "failed",
        }
    }
}

/// What changes are counted of: how it stands now.
pub(crate) trait Changing: Copy {
    /// What can come of a change. The others are never counted, and not shown.
    const OUTCOMES: &'static [Outcome];
}

/// How something stands and what came of changes, for whoever asks.
pub(crate) struct ChangeMeters<C> {
    stand: Mutex<Option<C>>,
    changes: [[AtomicU64; Outcome::COUNT]; Direction::ALL.len()],
}

impl<C> Default for ChangeMeters<C> {
    fn default() -> Self {
        Self {
            stand: Mutex::new(None),
            changes: Default::default(),
        }
    }
}

/// Counted changes: direction, outcome, how many.
pub(crate) type Counted = Vec<(&'static str, &'static str, u64)>;

impl<C: Changing> ChangeMeters<C> {
    /// `number` of them went this way and ended so.
    pub(crate) fn count(&self, direction: Direction, outcome: Outcome, number: usize) {
        debug_assert!(C::OUTCOMES.contains(&outcome), "{outcome:?} would not be shown");
        self.cell(direction, outcome)
            .fetch_add(number as u64, Ordering::Relaxed);
    }

    /// Shows how it stands from now on; `None` without a guest.
    pub(crate) fn show(&self, stand: Option<C>) {
        *self.stand.lock().unwrap_or_else(PoisonError::into_inner) = stand;
    }

    /// How it stands and what was counted, while there is a guest.
    pub(crate) fn read(&self) -> Option<(C, Counted)> {
        let stand = (*self.stand.lock().unwrap_or_else(PoisonError::into_inner))?;
        Some((stand, self.changes()))
    }

    /// What was counted.
    pub(crate) fn changes(&self) -> Counted {
        let mut counted = Vec::new();
        for direction in Direction::ALL {
            counted.extend(C::OUTCOMES.iter().map(|&outcome| {
                let count = self.cell(direction, outcome).load(Ordering::Relaxed);
                (direction.name(), outcome.name(), count)
            }));
        }
        counted
    }

    fn cell(&self, direction: Direction, outcome: Outcome) -> &AtomicU64 {
        &self.changes[direction as usize][outcome as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Things(u64);

    impl Changing for Things {
        const OUTCOMES: &'static [Outcome] = &[Outcome::Done, Outcome::Failed];
    }

    #[test]
    fn what_can_come_of_a_change_is_shown_while_there_is_a_guest() {
        let meters = ChangeMeters::default();
        meters.count(Direction::Add, Outcome::Failed, 1);
        assert_eq!(meters.read(), None);
        meters.show(Some(Things(3)));
        meters.count(Direction::Remove, Outcome::Done, 2);
        let (stand, counted) = meters.read().expect("a guest");
        let expected = [
            ("add", "done", 0),
            ("add", "failed", 1),
            ("remove", "done", 2),
            ("remove", "failed", 0),
        ];
        assert_eq!((stand, counted.as_slice()), (Things(3), &expected[..]));
        meters.show(None);
        assert_eq!(meters.read(), None);
    }
}
