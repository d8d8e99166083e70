//! The guest is paused, and given away.

use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{
    Guest, NotMoved, Session, Source, SourceError, Whereabouts, answered, greet, post_copy, round, say_no, union,
};
use crate::commit::{Source as Commit, SourceDoes, SourceEvent};
use crate::converge::expected_downtime;
use crate::handle::Phase;
use crate::post_copy::messages;
use crate::stream::{Answer, Interrupt, StreamError};
use crate::wire::{Kind, MAX_STATE, MAX_STATE_PART, Message, Role};

/// What became of an attempt.
pub(super) enum Outcome {
    /// The destination runs the guest, which was paused so long.
    Moved(Duration),
    /// The guest runs on, since the promise would not have been kept. This is left to be sent.
    Retreat(Vec<Range<u64>>),
}

/// How long a destination may take to hear what changes nothing any more.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// What an operator is told while nobody knows whether the guest runs at the destination, and lacks memory there.
const UNKNOWN: &str = "the destination was given the guest, which may run there and lack memory that is here, and does not answer. Make the \
                       network work, and it goes on; or end the destination's VMM, and then the migration here";
/// How often a destination that cannot be reached is tried.
const RETRY: Duration = Duration::from_millis(200);

/// An attempt, driven by the [state machine](crate::commit).
struct Switch<'a> {
    source: &'a Source,
    session: &'a mut Session,
    guest: &'a mut dyn Guest,
    /// The pages that are still to be sent.
    left: Vec<Range<u64>>,
    state: Commit,
    /// What went wrong first.
    why: Option<SourceError>,
}

impl Source {
    /// Pauses the guest and gives it away. `promised`: unless it would be paused for too long.
    pub(super) fn switch(
        &self,
        session: &mut Session,
        guest: &mut dyn Guest,
        written: Vec<Range<u64>>,
        promised: bool,
    ) -> Result<Outcome, NotMoved> {
        guest.before_pause();
        self.handle.enter(Phase::Switching);
        let paused = Instant::now();
        if let Err(source) = guest.pause() {
            let what = "pause the guest";
            return Err(session.keep(SourceError::Guest { what, source }));
        }
        let more = self.memory.fetch_log().map(|more| session.layout.clip(&more));
        let mut switch = Switch {
            source: self,
            session,
            guest,
            left: Vec::new(),
            state: Commit::Running,
            why: None,
        };
        match more {
            Ok(more) => switch.left = union(written, more),
            Err(error) => {
                // Paused, and nothing else: resumed as at any failure from here on.
                switch.state = Commit::Switching;
                switch.failed(SourceError::Memory(error));
                return switch.end(paused);
            }
        }
        if promised && !switch.can_keep_promise(paused) {
            return switch.retreat(paused.elapsed());
        }
        switch.run();
        let outcome = switch.end(paused)?;
        if let Some(line) = session.line.take() {
            self.follow(session, guest, line)?;
        }
        Ok(outcome)
    }

    /// The same of a guest whose memory the destination has already: nothing is left to be sent, and no time is promised that copying
    /// it could change.
    pub(super) fn switch_at_once(&self, session: &mut Session, guest: &mut dyn Guest) -> Result<Duration, NotMoved> {
        match self.switch(session, guest, Vec::new(), false)? {
            Outcome::Moved(downtime) => Ok(downtime),
            Outcome::Retreat(_) => Err(session.keep(SourceError::Cancelled)),
        }
    }
}

impl Switch<'_> {
    fn can_keep_promise(&mut self, paused: Instant) -> bool {
        let limits = &self.source.options.limits;
        let left = round::bytes(&self.left).saturating_add(self.guest.devices_size());
        let rate = self.session.rate(self.source.handle.cap());
        let expected = expected_downtime(left, rate, limits.state_time);
        expected.is_some_and(|expected| paused.elapsed() + expected <= limits.downtime)
    }

    fn retreat(self, pause: Duration) -> Result<Outcome, NotMoved> {
        match self.guest.retreat() {
            Ok(()) => {
                self.source.learn_retreat(self.session, pause);
                self.source.handle.count_retreat();
                self.source.handle.enter(Phase::Copying);
                Ok(Outcome::Retreat(self.left))
            }
            Err(source) => {
                let what = "let the guest run again";
                let kept = self.session.keep(SourceError::Guest { what, source });
                Err(NotMoved {
                    guest: Whereabouts::PausedHere,
                    ..kept
                })
            }
        }
    }

    fn run(&mut self) {
        self.step(SourceEvent::Paused);
        if self.state == Commit::StateSent {
            let deadlines = &self.source.options.deadlines;
            let wait = match self.session.has_devices {
                true => deadlines.prepare(self.session.layout.len()),
                false => deadlines.silence,
            };
            let restored = answered(self.session.control.expect(Kind::Ready, wait, "restore the guest"));
            match restored {
                Ok(()) if self.is_line_lost() => {}
                // From here on a cancel is refused.
                Ok(()) if self.source.handle.commit() => self.step(SourceEvent::Ready),
                Ok(()) => self.cancelled(),
                Err(SourceError::Stream(StreamError::Stopped)) => self.cancelled(),
                Err(why) => self.failed(why),
            }
        }
        if self.state == Commit::Committed {
            let wait = self.source.options.deadlines.ask();
            match self
                .session
                .control
                .expect(Kind::Running, wait, "say that the guest runs")
            {
                Ok(()) => self.step(SourceEvent::Running),
                Err(Answer::Abort(reason)) => self.refused(reason),
                Err(Answer::Stream(error)) => self.failed(error.into()),
            }
        }
    }

    /// Whether memory that the destination lacks cannot be sent any more: then it is not given the guest.
    fn is_line_lost(&mut self) -> bool {
        let why = self.session.line.as_mut().and_then(post_copy::Line::lost);
        if let Some(why) = why {
            self.failed(SourceError::Refused(format!(
                "memory that it lacks cannot be sent: {why}"
            )));
            return true;
        }
        false
    }

    fn failed(&mut self, why: SourceError) {
        self.why.get_or_insert(why);
        self.step(SourceEvent::Lost);
    }

    fn cancelled(&mut self) {
        self.why.get_or_insert(SourceError::Cancelled);
        self.step(SourceEvent::Cancel);
    }

    fn refused(&mut self, reason: String) {
        // It need not wait for us to ask.
        let _ = self.session.control.send_within(&Message::End, LAST_WORDS);
        // What the destination says is why, not the connection that was lost before it could say so.
        self.why = Some(SourceError::Refused(reason));
        self.step(SourceEvent::Refused);
    }

    fn step(&mut self, event: SourceEvent) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let (state, does) = self.state.step(event);
            self.state = state;
            for does in does {
                next = self.perform(*does).or(next);
            }
        }
    }

    /// Does it, and tells what came of it, where that matters.
    fn perform(&mut self, does: SourceDoes) -> Option<SourceEvent> {
        match does {
            SourceDoes::SendState => Some(self.event(Self::send_state, SourceEvent::StateSent)),
            SourceDoes::ReleaseLocks => Some(self.event(Self::release_locks, SourceEvent::Released)),
            SourceDoes::SendGo => {
                self.source.handle.enter(Phase::Committed);
                let sent = self.session.control.send(&Message::Go);
                sent.err().map(|error| {
                    self.why.get_or_insert(error.into());
                    SourceEvent::Lost
                })
            }
            SourceDoes::SendAbort => {
                let why = self.why.as_ref().unwrap_or(&SourceError::Cancelled);
                say_no(&mut self.session.control, why);
                None
            }
            SourceDoes::TakeLocks => {
                let taken = self.guest.take_locks();
                Some(match taken {
                    Ok(()) => SourceEvent::TakenBack,
                    Err(source) => {
                        let what = "take the locks of the guest's disks again";
                        self.why = Some(SourceError::Guest { what, source });
                        SourceEvent::NotTakenBack
                    }
                })
            }
            SourceDoes::Resume => {
                if let Err(source) = self.guest.resume() {
                    let what = "let the guest run again";
                    self.why = Some(SourceError::Guest { what, source });
                    self.state = Commit::Stuck;
                }
                None
            }
            SourceDoes::Ask => Some(self.ask()),
        }
    }

    fn event(&mut self, act: fn(&mut Self) -> Result<(), SourceError>, well: SourceEvent) -> SourceEvent {
        match act(self) {
            Ok(()) => well,
            Err(why) => {
                let cancelled = matches!(why, SourceError::Stream(StreamError::Stopped));
                self.why
                    .get_or_insert(if cancelled { SourceError::Cancelled } else { why });
                SourceEvent::Lost
            }
        }
    }

    fn release_locks(&mut self) -> Result<(), SourceError> {
        let what = "release the locks of the guest's disks";
        self.guest
            .release_locks()
            .map_err(|source| SourceError::Guest { what, source })
    }

    /// Sends the last pages and, at the same time, the state.
    fn send_state(&mut self) -> Result<(), SourceError> {
        self.session.control.send(&Message::Switch)?;
        let left = std::mem::take(&mut self.left);
        // What nobody lacks needs no other way.
        let (left, lacking) = match self.session.lazy {
            true => (Vec::new(), left),
            false => (left, Vec::new()),
        };
        for runs in messages(lacking.iter().cloned()) {
            self.session.control.send(&Message::Missing(runs))?;
        }
        if !lacking.is_empty() {
            self.source.serve(self.session)?;
        }
        let round = self.source.next_round(self.session, left);
        self.session.team.begin(&Arc::new(round));
        let saved = self.guest.save().map_err(|source| {
            let what = "save the guest's state";
            SourceError::Guest { what, source }
        });
        let state = saved?.into_bytes()?;
        let total = state.len() as u64;
        if total > MAX_STATE {
            return Err(SourceError::StateTooLarge(state.len()));
        }
        for part in state.chunks(MAX_STATE_PART) {
            self.session.control.send(&Message::State { total, part })?;
        }
        self.source.finish_devices(self.session, self.guest)?;
        let sent = self.session.team.finish(|| Ok(()));
        sent.and_then(|_| self.session.team.end())
            .map_err(|failed| self.source.reason(self.session, failed))?;
        self.session.control.send(&Message::Complete)?;
        Ok(())
    }

    /// Asks what became of the guest, until somebody answers.
    fn ask(&mut self) -> SourceEvent {
        let end = Instant::now() + self.source.options.deadlines.outcome;
        loop {
            if self.source.handle.is_abandoned() {
                return SourceEvent::NoAnswer;
            }
            match self.ask_once() {
                Ok(()) => return SourceEvent::Running,
                Err(Answer::Abort(reason)) => {
                    self.why = Some(SourceError::Refused(reason));
                    return SourceEvent::Refused;
                }
                Err(Answer::Stream(error)) => {
                    tracing::warn!("the destination was given the guest and does not answer yet: {error}");
                    // A guest that runs there needs us: whoever knows better says so.
                    if self.session.line.is_some() {
                        self.source.handle.stand(UNKNOWN.to_owned());
                    } else if Instant::now() >= end {
                        return SourceEvent::NoAnswer;
                    }
                    thread::sleep(RETRY);
                }
            }
        }
    }

    fn ask_once(&mut self) -> Result<(), Answer> {
        let lost = |_| Answer::Stream(StreamError::Closed);
        let mut stream = self.source.dialer.connect(&Interrupt::default()).map_err(lost)?;
        let (source, token) = (self.source, self.session.token);
        greet(&mut stream, &source.options, token, Role::Ask).map_err(Answer::Stream)?;
        // It may be taking locks right now.
        let wait = source.options.deadlines.outcome;
        let answer = stream.expect(Kind::Running, wait, "say what became of the guest");
        if !matches!(answer, Err(Answer::Stream(_))) {
            let _ = stream.send(&Message::End);
        }
        answer
    }

    fn end(mut self, paused: Instant) -> Result<Outcome, NotMoved> {
        let guest = match self.state {
            Commit::Moved => {
                let downtime = paused.elapsed();
                let _ = self.session.control.send(&Message::End);
                return Ok(Outcome::Moved(downtime));
            }
            Commit::Kept => Whereabouts::RunsHere,
            Commit::Unknown => Whereabouts::Unknown,
            _ => Whereabouts::PausedHere,
        };
        let why = self.why.take().unwrap_or(SourceError::Cancelled);
        Err(NotMoved { why, guest })
    }
}
