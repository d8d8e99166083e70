//! The two ends of the switch against a network that loses connections, and processes that are killed, at every point.

use std::collections::VecDeque;

use proptest::prelude::*;

use crate::commit::{Destination, DestinationDoes, DestinationEvent, Source, SourceDoes, SourceEvent};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    State,
    Complete,
    Ready,
    Go,
    Running,
    Abort,
    Ask,
}

/// What an adversary may do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// The source goes on by itself: pauses, has sent its state, has released or taken locks.
    SourceActs,
    /// The same, and it fails.
    SourceFails,
    DestinationActs,
    DestinationFails,
    ToDestination,
    ToSource,
    /// The connection is lost with all that is on the way; each side notices later.
    Cut,
    SourceNotices,
    DestinationNotices,
    /// A deadline passes, or a side alone believes the connection lost: what is on the way may still arrive.
    SourceLate,
    DestinationLate,
    /// What was sent on a connection that the source has given up arrives.
    OldArrives,
    Cancel,
    SourceGivesUp,
    KillSource,
    KillDestination,
}

const MOVES: [Move; 16] = [
    Move::SourceActs,
    Move::SourceFails,
    Move::DestinationActs,
    Move::DestinationFails,
    Move::ToDestination,
    Move::ToSource,
    Move::Cut,
    Move::SourceNotices,
    Move::DestinationNotices,
    Move::SourceLate,
    Move::DestinationLate,
    Move::OldArrives,
    Move::Cancel,
    Move::SourceGivesUp,
    Move::KillSource,
    Move::KillDestination,
];

#[derive(Debug)]
struct World {
    source: Source,
    source_alive: bool,
    source_runs: bool,
    source_locks: bool,
    /// What the source does now; told by `SourceActs` how it ended.
    source_busy: Option<SourceDoes>,
    destination: Destination,
    destination_alive: bool,
    destination_runs: bool,
    destination_locks: bool,
    destination_busy: Option<DestinationDoes>,
    /// Whether the connection stands, as seen by each side. A side that was told of its loss sends nothing more.
    source_connected: bool,
    destination_connected: bool,
    cut: bool,
    to_destination: VecDeque<Wire>,
    to_source: VecDeque<Wire>,
    /// On the way on an earlier connection.
    old: VecDeque<Wire>,
    /// Once it said so, it holds.
    refused: bool,
    gave_up: bool,
}

impl World {
    fn new() -> Self {
        Self {
            source: Source::Running,
            source_alive: true,
            source_runs: true,
            source_locks: true,
            source_busy: None,
            destination: Destination::Receiving,
            destination_alive: true,
            destination_runs: false,
            destination_locks: false,
            destination_busy: None,
            source_connected: true,
            destination_connected: true,
            cut: false,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            old: VecDeque::new(),
            refused: false,
            gave_up: false,
        }
    }

    fn check(&self) {
        assert!(!(self.source_runs && self.destination_runs), "two run: {self:?}");
        assert!(
            !(self.source_locks && self.destination_locks),
            "two have the locks: {self:?}"
        );
        assert!(
            !self.source_runs || self.source_locks,
            "runs without its locks: {self:?}"
        );
        assert!(
            !self.destination_runs || self.destination_locks,
            "runs without its locks: {self:?}"
        );
        assert!(
            !(self.refused && self.destination_runs),
            "runs although it said it never would: {self:?}"
        );
    }

    fn source(&mut self, event: SourceEvent) {
        let (next, does) = self.source.step(event);
        self.source = next;
        for does in does {
            match does {
                SourceDoes::SendState => {
                    self.send_to_destination(Wire::State);
                    self.source_busy = Some(SourceDoes::SendState);
                }
                SourceDoes::SendGo => self.send_to_destination(Wire::Go),
                SourceDoes::SendAbort => self.send_to_destination(Wire::Abort),
                SourceDoes::Resume => self.source_runs = true,
                SourceDoes::ReleaseLocks | SourceDoes::TakeLocks => self.source_busy = Some(*does),
                SourceDoes::Ask => {
                    // A new connection: of the old one nothing is read any more, but what was sent may arrive.
                    self.to_source.clear();
                    self.old.append(&mut self.to_destination);
                    self.cut = !self.destination_alive;
                    self.source_connected = true;
                    self.send_to_destination(Wire::Ask);
                }
            }
        }
        self.check();
    }

    fn destination(&mut self, event: DestinationEvent) {
        let (next, does) = self.destination.step(event);
        self.destination = next;
        for does in does {
            match does {
                DestinationDoes::Restore | DestinationDoes::Start => self.destination_busy = Some(*does),
                DestinationDoes::SendReady => self.send_to_source(Wire::Ready),
                DestinationDoes::SendRunning => self.send_to_source(Wire::Running),
                DestinationDoes::SendAbort => {
                    self.refused = true;
                    self.send_to_source(Wire::Abort);
                }
                DestinationDoes::Discard => assert!(!self.destination_runs && !self.destination_locks),
            }
        }
        self.check();
    }

    fn send_to_destination(&mut self, message: Wire) {
        if self.source_connected && !self.cut {
            self.to_destination.push_back(message);
        }
    }

    fn send_to_source(&mut self, message: Wire) {
        if self.destination_connected && !self.cut {
            self.to_source.push_back(message);
        }
    }

    fn play(&mut self, one: Move) {
        match one {
            Move::SourceActs | Move::SourceFails if self.source_alive => self.source_acts(one == Move::SourceActs),
            Move::DestinationActs | Move::DestinationFails if self.destination_alive => {
                self.destination_acts(one == Move::DestinationActs);
            }
            Move::ToDestination if self.destination_alive => self.deliver_to_destination(),
            Move::ToSource if self.source_alive => {
                // It reads when it is not at work itself.
                if self.source_busy.is_none()
                    && let Some(message) = self.to_source.pop_front()
                {
                    self.source(match message {
                        Wire::Ready => SourceEvent::Ready,
                        Wire::Running => SourceEvent::Running,
                        Wire::Abort => SourceEvent::Refused,
                        other => panic!("{other:?} at the source"),
                    });
                }
            }
            Move::OldArrives if self.destination_alive && self.destination_busy.is_none() => {
                if let Some(message) = self.old.pop_front() {
                    self.arrives(message);
                }
            }
            Move::SourceLate if self.source_alive && self.source_waits() => {
                self.source_connected = false;
                self.source_busy = None;
                self.to_source.clear();
                self.source(SourceEvent::Lost);
            }
            Move::DestinationLate if self.destination_alive && self.destination_busy.is_none() => {
                self.destination(DestinationEvent::Lost);
            }
            Move::Cut => {
                self.cut = true;
                self.old.clear();
                self.to_destination.clear();
                self.to_source.clear();
            }
            // Who is at work notices when it reads again; who sends, at once.
            Move::SourceNotices if self.source_alive && self.cut && self.source_connected && self.source_waits() => {
                self.source_connected = false;
                self.source_busy = None;
                self.source(SourceEvent::Lost);
            }
            Move::DestinationNotices
                if self.destination_alive
                    && self.cut
                    && self.destination_connected
                    && self.destination_busy.is_none() =>
            {
                self.destination_connected = false;
                self.destination(DestinationEvent::Lost);
            }
            Move::Cancel if self.source_alive && self.source_busy.is_none() => self.source(SourceEvent::Cancel),
            Move::SourceGivesUp if self.source_alive && self.source_busy.is_none() => {
                self.gave_up |= matches!(self.source, Source::Committed | Source::Asking);
                self.source(SourceEvent::NoAnswer);
            }
            Move::KillSource => {
                (self.source_alive, self.source_runs, self.source_locks) = (false, false, false);
                self.source_busy = None;
                // What it had sent may still arrive.
                self.to_source.clear();
                self.source_connected = false;
                if self.to_destination.is_empty() {
                    self.cut = true;
                }
            }
            Move::KillDestination => {
                (self.destination_alive, self.destination_runs, self.destination_locks) = (false, false, false);
                self.destination_busy = None;
                self.cut = true;
                self.to_destination.clear();
                self.to_source.clear();
            }
            _ => {}
        }
        self.check();
    }

    fn source_acts(&mut self, well: bool) {
        let event = match (self.source_busy.take(), well) {
            (None, true) if self.source == Source::Running => {
                self.source_runs = false;
                SourceEvent::Paused
            }
            (None, _) => return,
            (Some(SourceDoes::SendState), true) => {
                self.send_to_destination(Wire::Complete);
                SourceEvent::StateSent
            }
            (Some(SourceDoes::ReleaseLocks), true) => {
                self.source_locks = false;
                SourceEvent::Released
            }
            (Some(SourceDoes::TakeLocks), true) => {
                self.source_locks = true;
                SourceEvent::TakenBack
            }
            (Some(SourceDoes::TakeLocks), false) => SourceEvent::NotTakenBack,
            (Some(_), _) => SourceEvent::Lost,
        };
        self.source(event);
    }

    fn destination_acts(&mut self, well: bool) {
        let event = match (self.destination_busy.take(), well) {
            (None, _) => return,
            (Some(DestinationDoes::Restore), true) => DestinationEvent::Restored,
            (Some(DestinationDoes::Restore), false) => DestinationEvent::Lost,
            (Some(_), true) => {
                (self.destination_locks, self.destination_runs) = (true, true);
                DestinationEvent::Started
            }
            (Some(_), false) => DestinationEvent::NotStarted,
        };
        self.destination(event);
    }

    fn deliver_to_destination(&mut self) {
        if self.destination_busy.is_some() {
            return;
        }
        if let Some(message) = self.to_destination.pop_front() {
            self.arrives(message);
        }
        // A dead source's last words were read: now the end of the stream is.
        self.cut |= !self.source_alive && self.to_destination.is_empty();
    }

    fn arrives(&mut self, message: Wire) {
        match message {
            Wire::State => {}
            Wire::Complete => self.destination(DestinationEvent::Complete),
            Wire::Go => self.destination(DestinationEvent::Go),
            Wire::Abort => self.destination(DestinationEvent::Lost),
            Wire::Ask => {
                self.destination_connected = true;
                self.destination(DestinationEvent::Asked);
            }
            other => panic!("{other:?} at the destination"),
        }
    }

    /// Whether it would notice that the connection is lost: while it waits, or sends.
    fn source_waits(&self) -> bool {
        matches!(self.source_busy, None | Some(SourceDoes::SendState))
    }

    /// Nothing more goes wrong.
    fn settle(&mut self) {
        for _ in 0..100 {
            for one in [
                Move::SourceActs,
                Move::DestinationActs,
                Move::ToDestination,
                Move::OldArrives,
                Move::ToSource,
                Move::SourceNotices,
                Move::DestinationNotices,
            ] {
                self.play(one);
            }
            // The deadline of whoever waits for a message that was lost with an earlier connection.
            if self.source_alive && !self.source.is_end() && self.source != Source::Running && self.quiet() {
                self.source_connected = false;
                self.source(SourceEvent::Lost);
            }
            let source_ended = self.source.is_end() || !self.source_alive;
            if self.destination_alive && !self.destination.is_end() && self.quiet() && source_ended {
                self.destination(DestinationEvent::Lost);
            }
            // Nobody answers for the dead: the source waits until it gives up.
            if !self.destination_alive {
                self.play(Move::SourceGivesUp);
            }
        }
    }

    fn quiet(&self) -> bool {
        let nobody_works = self.source_busy.is_none() && self.destination_busy.is_none();
        nobody_works && self.old.is_empty() && self.to_source.is_empty() && self.to_destination.is_empty()
    }

    /// What must hold in the end.
    fn verdict(&self) {
        match (self.source_alive, self.destination_alive) {
            (true, true) => {
                assert!(
                    self.source.is_end() && self.destination.is_end(),
                    "somebody still waits: {self:?}"
                );
                let running = u8::from(self.source_runs) + u8::from(self.destination_runs);
                match self.source {
                    Source::Unknown => assert!(!self.source_runs && self.gave_up, "{self:?}"),
                    Source::Stuck => assert_eq!(running, 0, "{self:?}"),
                    _ => assert_eq!(running, 1, "not one runs: {self:?}"),
                }
            }
            (true, false) => {
                // Alone: it has its guest, unless that was given away, or its disks are somebody else's.
                let away = matches!(self.source, Source::Moved | Source::Unknown | Source::Stuck);
                assert!(self.source.is_end() && self.source_runs != away, "{self:?}");
            }
            (false, true) => assert!(self.destination.is_end(), "{self:?}"),
            (false, false) => {}
        }
    }
}

fn play(moves: &[Move]) -> World {
    let mut world = World::new();
    moves.iter().for_each(|one| world.play(*one));
    world.settle();
    world.verdict();
    world
}

/// The moves of a migration on which nothing fails.
const GOOD: [Move; 11] = [
    Move::SourceActs,
    Move::ToDestination,
    Move::SourceActs,
    Move::ToDestination,
    Move::DestinationActs,
    Move::ToSource,
    Move::SourceActs,
    Move::ToDestination,
    Move::DestinationActs,
    Move::ToSource,
    Move::SourceActs,
];

#[test]
fn without_failures_it_moves() {
    let world = play(&GOOD);
    assert_eq!((world.source, world.destination), (Source::Moved, Destination::Running));
    assert!(world.destination_runs && !world.source_runs);
}

#[test]
fn every_failure_at_every_point_leaves_one() {
    let mut ends = Vec::new();
    for at in 0..=GOOD.len() {
        for first in MOVES {
            for later in MOVES {
                for distance in 0..3 {
                    let mut moves = GOOD[..at].to_vec();
                    moves.push(first);
                    moves.extend(GOOD[at..].iter().take(distance));
                    moves.push(later);
                    ends.push(play(&moves).source);
                }
            }
        }
    }
    // All ends were seen, or this test looks at less than it thinks.
    for end in [Source::Moved, Source::Kept, Source::Stuck, Source::Unknown] {
        assert!(ends.contains(&end), "{end:?}");
    }
}

#[test]
fn a_connection_lost_after_go_is_asked_about() {
    // `Go` was lost: the destination gave up, the source goes on.
    let mut lost = GOOD[..7].to_vec();
    lost.extend([Move::Cut, Move::SourceNotices]);
    let world = play(&lost);
    assert_eq!((world.source, world.destination), (Source::Kept, Destination::Failed));
    // The answer was lost: the source learns that it moved.
    let mut lost = GOOD[..9].to_vec();
    lost.extend([Move::Cut, Move::SourceNotices]);
    let world = play(&lost);
    assert_eq!((world.source, world.destination), (Source::Moved, Destination::Running));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn any_order_of_failures_leaves_one(
        at in 0..=GOOD.len(),
        // Kills, cuts and their like are rarer than progress, or no run would get far.
        moves in prop::collection::vec(prop_oneof![
            4 => prop::sample::select(&MOVES[..6]),
            1 => prop::sample::select(&MOVES[..]),
        ], 0..30),
    ) {
        let mut all = GOOD[..at].to_vec();
        all.extend(moves);
        play(&all);
    }
}
