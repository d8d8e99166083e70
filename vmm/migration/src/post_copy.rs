//! Memory that follows a guest that runs at the destination already.
//!
//! ```text
//!        source                                            destination
//!
//!  pauses the guest, Switch, Missing, State, Complete ──▶  has these pages fault, restores
//!        ◀─────────────── on the stream Demand: Lacks, Serve
//!  Pages on the stream Push, one after the other ───────▶  provides them
//!        ◀─────────────────────────── on Demand: Want      somebody touched a page that is missing
//!  Pages on Demand, Served ─────────────────────────────▶  provides them; whoever waited goes on
//!        ◀─────────────────────────── on Demand: End       nothing is missing any more
//!  End, throws its memory away
//! ```
//!
//! Both streams are there from the begin of a session that may come to this. Whose guest it is, is decided as always
//! ([`commit`](crate::commit)): until `Go` it is the source's, and a connection lost by then ends the migration with the guest where it
//! was; those who waited for memory of the one that is thrown away see zeroes, and nobody sees what they make of them. After `Go` the
//! guest lives by both sides: the destination has it and the source has its memory, which it never runs again.
//!
//! A connection that is lost then is made anew by the source, by the same address, certificates and token. The destination tells again
//! what it lacks, so that nothing has to be known of what was on its way. Whoever touches a missing page waits as long as that takes.
//!
//! A page that comes twice, or that nobody lacks, is not written: what the guest made of it is newer. Pages that there are not, of
//! either side, end the connection.

use std::time::Duration;

use crate::wire::{MAX_RUNS, Runs};

/// How it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PostCopy {
    /// For how long a lost connection is tried again without being asked. `None`: until it is there, or somebody gives up.
    pub recover: Option<Duration>,
}

/// What happens to a guest that runs at the destination before all of its memory is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn<'a> {
    /// It runs there.
    Begun,
    /// The connection was lost, for this reason.
    Lost(&'a str),
    /// It is there again.
    Recovered,
}

/// How long either side may say nothing on the two streams: so late a connection is noticed that ended without a word.
pub(crate) const SILENCE: Duration = Duration::from_secs(15);

/// Runs in messages.
pub(crate) fn messages(runs: impl IntoIterator<Item = std::ops::Range<u64>>) -> impl Iterator<Item = Runs> {
    let mut runs = runs.into_iter();
    std::iter::from_fn(move || {
        let mut some = Runs::default();
        runs.by_ref()
            .take(MAX_RUNS)
            .for_each(|run| some.push(run.start, run.end - run.start, false));
        (!some.is_empty()).then_some(some)
    })
}
