//! Who runs the guest: the two ends of the switch, as state machines without any input or output.
//!
//! ```text
//!         source                                       destination
//!
//!         Running  ── memory ───────────────────────▶  Receiving
//!   pause    │                                             │
//!         Switching ─ Switch, last pages, State,           │
//!            │          Complete ───────────────────▶  Restoring
//!            │                                             │ everything is restored, no lock is taken
//!         StateSent ◀────────────────────────── Ready ─  Ready
//!            │ releases the locks of disks                 │
//!         Committed ─ Go ───────────────────────────▶  Taking
//!            │                                             │ takes the locks and runs
//!          Moved  ◀─────────────────────────── Running ─ Running
//! ```
//!
//! The guest belongs to the source until it has sent `Go`, and to nobody else: a destination runs it after `Go` only. So
//!
//! - any failure before `Go` (a lost connection, a deadline, `Abort` of either side, a cancel) ends with the source taking its guest up
//!   again, and the destination throwing away what it has;
//! - **after `Go` the source never takes it up by itself**, unless the destination said that it does not run it and will not (`Abort`,
//!   after which a destination never does);
//! - when the connection is lost after `Go`, the destination may have got it or not. The source connects anew and asks, by the token of
//!   the session. A destination that is asked while it still waits for `Go` gives up first and answers then, so that a `Go` on its
//!   way comes too late. It answers for a while after the end of the session;
//! - if no answer comes, nobody can know: the guest stays paused at the source ([`Unknown`](Source::Unknown)), and the operator is told
//!   to look at the destination. If it runs there, the source's VMM is to be ended; if it does not (there is no such VMM any more, or it
//!   says that it gave up), it is to be resumed at the source.
//!
//! | fails | before `Go` | after `Go` |
//! |---|---|---|
//! | connection | source runs | the one runs that the answer names; none answers: operator |
//! | source dies | nobody: the guest died with it | destination runs if `Go` arrived |
//! | destination dies | source runs | nobody: the guest had been given away; the source has it paused |
//!
//! A guest that is switched before all of its memory is there ([post-copy](crate::PostCopy)) is given away in the same way. That the source
//! serves its memory afterwards gives it no say: [`Moved`](Source::Moved) is an end as always. Only the question of a source that lost
//! its connection after `Go` has no end by itself then, since a guest that runs there needs it.
//!
//! The machines say what is to be done ([`SourceDoes`], [`DestinationDoes`]); the engines do it in that order and tell what came of it.

/// The source's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The guest runs here while its memory is copied.
    Running,
    /// It is paused, and the rest of its memory and its state are on the way.
    Switching,
    /// All was sent; the destination restores it.
    StateSent,
    /// The locks are being released; nothing was given away yet.
    Releasing,
    /// `Go` was sent, or may have been. The guest is no longer ours.
    Committed,
    /// The connection was lost after that, and we ask for the outcome.
    Asking,
    /// It does not run there and never will; we take the locks again.
    TakingBack,
    /// End: the destination runs it.
    Moved,
    /// End: it is here, and runs.
    Kept,
    /// End: it is here, paused, and nobody has it: its locks could not be taken again.
    Stuck,
    /// End: it is here, paused, and may run there.
    Unknown,
}

/// What happens to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// Its guest was paused.
    Paused,
    /// Memory and state were sent wholly.
    StateSent,
    /// The destination has restored everything.
    Ready,
    /// The locks of disks were released.
    Released,
    /// The destination runs the guest.
    Running,
    /// The destination does not run the guest and will not.
    Refused,
    /// The connection broke, a deadline passed, the other side talks nonsense, or something failed here.
    Lost,
    /// Somebody wants to keep the guest.
    Cancel,
    /// No answer will be waited for any longer.
    NoAnswer,
    /// The locks are ours again.
    TakenBack,
    /// They are not.
    NotTakenBack,
}

/// What the source does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceDoes {
    /// Sends `Switch`, then memory and state.
    SendState,
    /// Releases the locks of disks.
    ReleaseLocks,
    /// Sends `Go`.
    SendGo,
    /// Sends `Abort`, if there is a connection.
    SendAbort,
    /// Takes the locks again that it had released.
    TakeLocks,
    /// Lets the guest run.
    Resume,
    /// Connects anew and asks what became of the guest.
    Ask,
}

impl Source {
    /// The next state, and what is to be done in this order. What does not matter in a state changes nothing.
    pub fn step(self, event: SourceEvent) -> (Self, &'static [SourceDoes]) {
        use SourceDoes::{Ask, ReleaseLocks, Resume, SendAbort, SendGo, SendState, TakeLocks};
        use SourceEvent as E;
        match (self, event) {
            (Self::Running, E::Paused) => (Self::Switching, &[SendState]),
            (Self::Switching, E::StateSent) => (Self::StateSent, &[]),
            (Self::StateSent, E::Ready) => (Self::Releasing, &[ReleaseLocks]),
            // From here on what is sent may arrive.
            (Self::Releasing, E::Released) => (Self::Committed, &[SendGo]),

            (Self::Running, E::Lost | E::Refused | E::Cancel) => (Self::Kept, &[SendAbort]),
            (Self::Switching | Self::StateSent, E::Lost | E::Refused | E::Cancel) => (Self::Kept, &[SendAbort, Resume]),
            (Self::Releasing, E::Lost | E::Refused | E::Cancel) => (Self::TakingBack, &[SendAbort, TakeLocks]),

            (Self::Committed | Self::Asking, E::Running) => (Self::Moved, &[]),
            (Self::Committed | Self::Asking, E::Refused) => (Self::TakingBack, &[TakeLocks]),
            (Self::Committed | Self::Asking, E::Lost) => (Self::Asking, &[Ask]),
            (Self::Committed | Self::Asking, E::NoAnswer) => (Self::Unknown, &[]),
            (Self::TakingBack, E::TakenBack) => (Self::Kept, &[Resume]),
            (Self::TakingBack, E::NotTakenBack) => (Self::Stuck, &[]),

            // A message that is not awaited: the other side is not what it should be.
            (Self::Running | Self::Switching | Self::StateSent, E::Running | E::Ready) => self.step(E::Lost),
            (same, _) => (same, &[]),
        }
    }

    /// Whether nothing more happens.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Moved | Self::Kept | Self::Stuck | Self::Unknown)
    }
}

/// The destination's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Memory and state come.
    Receiving,
    /// All is there and is being restored.
    Restoring,
    /// It could run at once, and waits for `Go`.
    Ready,
    /// `Go` came: the locks are taken and the guest is let run.
    Taking,
    /// End: it runs.
    Running,
    /// End: it does not run, and never will.
    Failed,
}

/// What happens to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The source has sent everything.
    Complete,
    /// Everything was restored.
    Restored,
    /// The source gave the guest away.
    Go,
    /// The guest runs here.
    Started,
    /// It does not, and holds no lock.
    NotStarted,
    /// The source wants it no more, the connection broke, a deadline passed, or something failed here.
    Lost,
    /// The source asks on a new connection what became of it.
    Asked,
}

/// What the destination does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationDoes {
    /// Restores the state.
    Restore,
    /// Sends `Ready`.
    SendReady,
    /// Takes the locks of disks and lets the guest run: both or nothing.
    Start,
    /// Sends `Running`.
    SendRunning,
    /// Throws away what there is of the guest.
    Discard,
    /// Sends `Abort`, if there is a connection.
    SendAbort,
}

impl Destination {
    /// The next state, and what is to be done in this order. What does not matter in a state changes nothing.
    pub fn step(self, event: DestinationEvent) -> (Self, &'static [DestinationDoes]) {
        use DestinationDoes::{Discard, Restore, SendAbort, SendReady, SendRunning, Start};
        use DestinationEvent as E;
        match (self, event) {
            (Self::Receiving, E::Complete) => (Self::Restoring, &[Restore]),
            (Self::Restoring, E::Restored) => (Self::Ready, &[SendReady]),
            (Self::Ready, E::Go) => (Self::Taking, &[Start]),
            (Self::Taking, E::Started) => (Self::Running, &[SendRunning]),
            (Self::Taking, E::NotStarted) => (Self::Failed, &[Discard, SendAbort]),

            // Whoever asks has lost the connection; a `Go` that was on its way there shall not be found any more.
            (Self::Receiving | Self::Restoring | Self::Ready, E::Lost | E::Asked) => {
                (Self::Failed, &[Discard, SendAbort])
            }
            // Not awaited: the other side is not what it should be.
            (Self::Receiving | Self::Restoring, E::Go) | (Self::Restoring | Self::Ready, E::Complete) => {
                self.step(E::Lost)
            }

            (Self::Running, E::Asked) => (Self::Running, &[SendRunning]),
            (Self::Failed, E::Asked) => (Self::Failed, &[SendAbort]),
            (same, _) => (same, &[]),
        }
    }

    /// Whether nothing more happens but answers.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Running | Self::Failed)
    }
}
