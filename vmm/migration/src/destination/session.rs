//! A conversation with one source, driven by the [state machine](crate::commit).

use std::sync::Arc;
use std::time::{Duration, Instant};

use triarch_device_core::Sandbox;
use triarch_state::Payloads;

use super::post_copy::{Common, Line};
use super::worker::Team;
use super::{DestinationError, Sink, tell};
use crate::commit::{Destination as Commit, DestinationDoes, DestinationEvent};
use crate::connect::Deadlines;
use crate::hand_over;
use crate::handle::{Handle, Phase};
use crate::memory::Layout;
use crate::pages::Lacks;
use crate::sentence;
use crate::stream::{Interrupt, Stream, StreamError, unexpected};
use crate::wire::{Message, Runs, Token};

/// After so much silence where `Go` is due we look whether the source asks elsewhere.
const LOOK_ELSEWHERE: Duration = Duration::from_secs(2);
/// How long a source that was refused may take to hear it.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a source should do whose guest is on its way.
const AWAITED: &str = "send memory or state";

/// Notes that the pages of `runs` come when the guest runs.
fn note(missing: &mut Option<Lacks>, layout: Option<&Layout>, runs: &Runs) -> Result<(), DestinationError> {
    let Some(layout) = layout else { return Ok(()) };
    let missing = missing.get_or_insert_with(|| Lacks::none(layout));
    for (gpa, len) in runs.iter() {
        if !layout.holds(gpa, len) || !missing.insert(gpa, len) {
            return Err(DestinationError::Outside { gpa });
        }
    }
    Ok(())
}

pub(super) struct Session<'a> {
    control: Stream,
    token: Token,
    handle: &'a Handle,
    deadlines: Deadlines,
    interrupt: Interrupt,
    team: Option<Team>,
    bytes: u64,
    saved: Vec<u8>,
    state: Commit,
    prepared: bool,
    /// `Ready` was sent, or may have been.
    said_ready: bool,
    confirmed: bool,
    why: Option<DestinationError>,
    /// The streams for post-copy, in a session that may come to that.
    aside: Option<(Stream, Stream)>,
    layout: Option<Layout>,
    /// What comes when the guest runs, as the source said.
    missing: Option<Lacks>,
    /// What fetches it.
    line: Option<(Common, Option<Line>)>,
}

impl<'a> Session<'a> {
    pub(super) fn new(mut control: Stream, token: Token, handle: &'a Handle, deadlines: Deadlines) -> Self {
        let interrupt = handle.interrupt().child();
        control.set_interrupt(&interrupt);
        Self {
            control,
            token,
            handle,
            deadlines,
            interrupt,
            team: None,
            bytes: 0,
            saved: Vec::new(),
            state: Commit::Receiving,
            prepared: false,
            said_ready: false,
            confirmed: false,
            why: None,
            aside: None,
            layout: None,
            missing: None,
            line: None,
        }
    }

    pub(super) fn control(&mut self) -> &mut Stream {
        &mut self.control
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    pub(super) fn state(&self) -> Commit {
        self.state
    }

    pub(super) fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    /// Whether the source may have given the guest away and not know what became of it.
    pub(super) fn may_be_asked(&self) -> bool {
        self.said_ready && !self.confirmed
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn why(&self) -> Option<&DestinationError> {
        self.why.as_ref()
    }

    pub(super) fn set_aside(&mut self, streams: Option<(Stream, Stream)>) {
        self.aside = streams;
    }

    /// Whether memory comes when the guest runs.
    pub(super) fn lacks(&self) -> bool {
        self.line.is_some()
    }

    /// What fetches memory, for whoever sees to that from now on.
    pub(super) fn take_line(&mut self) -> Option<(Common, Option<Line>)> {
        self.line.take()
    }

    pub(super) fn into_why(self) -> DestinationError {
        self.why.unwrap_or(DestinationError::Cancelled)
    }

    /// Has a machine made for what the source offers, and begins to take its memory.
    pub(super) fn prepare(
        &mut self,
        sink: &mut dyn Sink,
        data: Vec<Stream>,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<(), DestinationError> {
        let (wait, what) = (self.deadlines.silence, "say what its guest is");
        let (offer, handed) = match hand_over::offered(&mut self.control, wait, what, self.aside.is_some())? {
            (Message::Offer(offer), handed) => (offer, handed),
            (Message::Abort(reason), _) => return Err(DestinationError::Refused(reason.to_owned())),
            (other, _) => return Err(unexpected(&other, "an offer").into()),
        };
        let phase = match handed {
            Some(_) => Phase::HandingOver,
            None => Phase::Copying,
        };
        self.handle.set_total(offer.layout.len());
        self.prepared = true;
        let what = "make a machine for the guest";
        let target = sink
            .prepare(&offer, handed)
            .map_err(|source| DestinationError::Sink { what, source })?;
        let layout = offer.layout;
        let team = Team::start(data, &target, &layout, &self.interrupt, self.deadlines.silence, sandbox);
        self.layout = Some(layout);
        self.team = Some(team.map_err(DestinationError::Thread)?);
        self.control.send(&Message::Accepted)?;
        self.handle.enter(phase);
        Ok(())
    }

    /// Takes everything: memory on the other streams, the rest here.
    pub(super) fn receive_all(&mut self, sink: &mut dyn Sink) -> Result<(), DestinationError> {
        let mut expected = None;
        loop {
            let came = self.control.take(self.deadlines.silence, AWAITED);
            // Whoever takes memory has interrupted us.
            self.team.as_ref().map_or(Ok(()), Team::check)?;
            let came = match came {
                // Other streams tell that it lives. Here it says nothing while it writes disks out or sends the last of a large memory.
                Err(StreamError::Late(AWAITED)) if self.team.as_ref().is_some_and(Team::is_open) => continue,
                other => other,
            };
            let message = came.and_then(|came| self.control.message(came));
            match message? {
                Message::Progress(progress) => {
                    let counters = self.handle.counters();
                    let relaxed = std::sync::atomic::Ordering::Relaxed;
                    counters.rounds.store(progress.round, relaxed);
                    counters.remaining.store(progress.remaining, relaxed);
                }
                Message::Switch => self.handle.enter(Phase::Switching),
                Message::Missing(runs) if self.aside.is_some() => {
                    note(&mut self.missing, self.layout.as_ref(), &runs)?;
                }
                Message::State { total, part } => {
                    let left = total - (self.saved.len() as u64).min(total);
                    if *expected.get_or_insert(total) != total || part.len() as u64 > left {
                        return Err(DestinationError::StateLength);
                    }
                    self.saved.extend_from_slice(part);
                }
                // A guest that may lack memory has no such devices.
                Message::Device { device, begins, part } if self.aside.is_none() => {
                    let what = "take the state of a device";
                    sink.load_device(device, begins, part)
                        .map_err(|source| DestinationError::Sink { what, source })?;
                }
                Message::Complete if expected == Some(self.saved.len() as u64) => break,
                Message::Complete => return Err(DestinationError::StateLength),
                Message::Abort(reason) => return Err(DestinationError::Refused(reason.to_owned())),
                other => return Err(unexpected(&other, "memory or state").into()),
            }
        }
        // The threads that write to memory end before anything is done with it.
        if let Some(team) = self.team.take() {
            self.bytes = team.finish(self.deadlines.message)?;
        }
        Ok(())
    }

    /// Has memory fault that comes when the guest runs, if the source said so, and fetches it from now on: restoring may touch it.
    pub(super) fn begin_post_copy(
        &mut self,
        sink: &mut dyn Sink,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<(), DestinationError> {
        let aside = self.aside.take();
        let (Some(missing), Some((demand, push)), Some(layout)) = (self.missing.take(), aside, &self.layout) else {
            return Ok(());
        };
        let what = "let the guest run before all of its memory is there";
        let lacking = sink
            .lack(&missing.runs())
            .map_err(|source| DestinationError::Sink { what, source })?;
        let common = Common::new(lacking, layout, self.deadlines, sandbox);
        // Before a thread is: what fails from here on is to be undone.
        let (_, line) = self.line.insert((common.clone(), None));
        *line = Some(Line::start(demand, push, &common).map_err(DestinationError::Thread)?);
        Ok(())
    }

    /// Whether memory that it lacks could not be fetched, and the guest will not run here.
    fn check_lacking(&self) -> Result<(), DestinationError> {
        match self.line.as_ref().is_some_and(|(common, _)| common.is_abandoned()) {
            true => Err(DestinationError::Lacking),
            false => Ok(()),
        }
    }

    pub(super) fn restore(&mut self, sink: &mut dyn Sink) -> Result<(), DestinationError> {
        self.step(DestinationEvent::Complete, sink)
    }

    /// Waits until the guest is ours, and lets it run. `asked` looks for a source that lost this connection.
    pub(super) fn wait_for_go(
        &mut self,
        sink: &mut dyn Sink,
        asked: impl Fn(&Self) -> Option<Stream>,
    ) -> Result<(), DestinationError> {
        let end = Instant::now() + self.deadlines.silence;
        loop {
            let message = match self.control.receive(LOOK_ELSEWHERE, "give the guest away") {
                Err(StreamError::Late(_)) if Instant::now() < end => match asked(self) {
                    None => continue,
                    Some(mut stream) => {
                        self.why.get_or_insert(DestinationError::Asked);
                        self.step(DestinationEvent::Asked, sink)?;
                        let why = self.why.as_ref().map(sentence);
                        self.confirmed = tell(&mut stream, why.as_deref().map_or(Ok(()), Err));
                        return Ok(());
                    }
                },
                other => other?,
            };
            match message {
                Message::Go => break,
                Message::Abort(reason) => {
                    // It has not given anything away, and will not.
                    let why = DestinationError::Refused(reason.to_owned());
                    self.confirmed = true;
                    return Err(why);
                }
                other => return Err(unexpected(&other, "the guest").into()),
            }
        }
        // From here on nobody but the sink can keep the guest from running.
        if !self.handle.commit() {
            return Err(DestinationError::Cancelled);
        }
        if self.line.as_ref().is_some_and(|(common, _)| !common.commit()) {
            return Err(DestinationError::Lacking);
        }
        self.step(DestinationEvent::Go, sink)
    }

    /// Ends the session after a failure, which is told to the source.
    pub(super) fn failed(&mut self, sink: &mut dyn Sink, error: DestinationError) {
        // What failed first is why.
        self.why.get_or_insert(error);
        let _ = self.step(DestinationEvent::Lost, sink);
    }

    fn step(&mut self, event: DestinationEvent, sink: &mut dyn Sink) -> Result<(), DestinationError> {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let (state, does) = self.state.step(event);
            self.state = state;
            for does in does {
                next = self.perform(*does, sink)?.or(next);
            }
        }
        Ok(())
    }

    /// Does it, and tells what came of it, where that matters. Errors are of what the machine is told as a loss.
    fn perform(
        &mut self,
        does: DestinationDoes,
        sink: &mut dyn Sink,
    ) -> Result<Option<DestinationEvent>, DestinationError> {
        match does {
            DestinationDoes::Restore => {
                let state = Payloads::from_bytes(&std::mem::take(&mut self.saved))?;
                let what = "restore the guest";
                sink.restore(state)
                    .map_err(|source| DestinationError::Sink { what, source })?;
                self.check_lacking()?;
                Ok(Some(DestinationEvent::Restored))
            }
            DestinationDoes::SendReady => {
                self.said_ready = true;
                self.control.send(&Message::Ready)?;
                Ok(None)
            }
            DestinationDoes::Start => {
                self.handle.enter(Phase::Committed);
                Ok(Some(match sink.take_locks_and_run() {
                    Ok(()) => DestinationEvent::Started,
                    Err(source) => {
                        let what = "take the locks of the guest's disks and let it run";
                        self.why = Some(DestinationError::Sink { what, source });
                        DestinationEvent::NotStarted
                    }
                }))
            }
            DestinationDoes::SendRunning => {
                if self.line.is_some() {
                    self.handle.enter(Phase::PostCopy);
                }
                // Whether it hears that or not, the guest runs; a source that does not, asks.
                self.confirmed = tell(&mut self.control, Ok(()));
                Ok(None)
            }
            DestinationDoes::Discard => {
                // Nothing writes to memory any more.
                self.interrupt.raise();
                self.team = None;
                if let Some((common, line)) = self.line.take() {
                    common.lacking.abandon();
                    drop(line);
                }
                if self.prepared {
                    sink.abort(&self.why.as_ref().map(sentence).unwrap_or_default());
                }
                Ok(None)
            }
            DestinationDoes::SendAbort => {
                self.say_no();
                Ok(None)
            }
        }
    }

    /// Tells the source why, and takes what it still sends, lest the kernel throw away what we said.
    fn say_no(&mut self) {
        let why = self.why.as_ref().map(sentence).unwrap_or_default();
        // What interrupted the session does not interrupt this.
        self.control.set_interrupt(&Interrupt::default());
        // Also of one that hears nothing any more, we want to know what it said before it went.
        let _ = self.control.send_within(&Message::Abort(&why), LAST_WORDS);
        let end = Instant::now() + LAST_WORDS;
        while Instant::now() < end {
            match self.control.receive(Duration::from_millis(200), "end") {
                // Whoever says no itself has not given anything away, and will not: it did not hear that we were ready.
                Ok(Message::End | Message::Abort(_)) => {
                    self.confirmed = true;
                    return;
                }
                Ok(_) | Err(StreamError::Late(_)) => {}
                Err(_) => return,
            }
        }
    }
}
