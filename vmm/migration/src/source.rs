//! The side that has the guest.

mod check;
mod devices;
mod measure;
mod pack;
mod post_copy;
mod round;
mod switch;
mod worker;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use triarch_device_core::Sandbox;
use triarch_state::{PayloadError, Payloads};

use crate::Cause;
use crate::address::Address;
use crate::connect::{ConnectError, Deadlines, Dialer};
use crate::converge::{Decision, Limits, Rate, decide};
use crate::hand_over;
use crate::handle::{Handle, Phase, Progress};
use crate::memory::{Layout, Memory};
use crate::post_copy::{PostCopy, Turn};
use crate::stream::{Answer, Interrupt, Stream, StreamError};
use crate::tls::TlsFiles;
use crate::wire::{self, Hello, Kind, MAX_CONFIG, MAX_CPU, MAX_STREAMS, Message, Offer, Role, Token, WireError};
pub use check::Check;
pub use devices::DevicePart;
use measure::Tried;
use round::{Round, union};
use worker::{Failed, Team};

/// The guest at the source. Called on the thread that runs the migration.
pub trait Guest {
    /// The guest will be paused next: what would keep it paused for longer can be done now.
    fn before_pause(&mut self) {}
    /// Pauses vCPUs and devices: nothing of the guest writes to memory or disks from then on.
    fn pause(&mut self) -> Result<(), Cause>;
    /// The state of everything beside memory, of the paused guest.
    fn save(&mut self) -> Result<Payloads, Cause>;
    /// Gives up the locks of disks: all, or none.
    fn release_locks(&mut self) -> Result<(), Cause>;
    /// Takes them again: all, or none. Also called when only some, or none, were released.
    fn take_locks(&mut self) -> Result<(), Cause>;
    /// Lets the paused guest run.
    fn resume(&mut self) -> Result<(), Cause>;
    /// The same, since it would stand still for too long: the migration goes on.
    fn retreat(&mut self) -> Result<(), Cause> {
        self.resume()
    }
    /// The guest runs at the destination, which still needs its memory from here.
    fn post_copy(&mut self, _turn: Turn<'_>) {}
    /// How many bytes devices have to tell beside memory and state, while the guest runs.
    fn devices_ahead(&mut self) -> u64 {
        0
    }
    /// About how many they would have in all if it was paused now.
    fn devices_size(&mut self) -> u64 {
        0
    }
    /// Reads the next of them. `None`: there are none now, and if the guest is paused, none at all.
    fn read_devices(&mut self, _buffer: &mut [u8]) -> Result<Option<DevicePart>, Cause> {
        Ok(None)
    }
    /// Lets the vCPUs run less than they could, by `percent`; 0: as they could.
    fn throttle(&mut self, percent: u8) -> Result<(), Cause>;
}

/// How a guest is to be moved.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// Where to.
    pub address: Address,
    /// Who we are and whom to expect; none for unix sockets and `tcp-plain:`.
    pub tls: Option<TlsFiles>,
    /// Streams for memory, 1 to 16.
    pub streams: u16,
    /// Hand the files of the memory over instead of copying what is in them: by unix sockets only.
    pub hand_over: bool,
    /// Compress pages by LZ4 where that is faster.
    pub compress: bool,
    /// What to keep to.
    pub limits: Limits,
    /// Whether, and how, the guest may run at the destination before all of its memory is there. No destination takes that with
    /// [`hand_over`](Self::hand_over).
    pub post_copy: Option<PostCopy>,
    /// How long to wait for what.
    pub deadlines: Deadlines,
    /// Version of the VMM, for the other side's log.
    pub vmm: String,
}

/// Why a guest was not moved.
#[derive(Debug, Error)]
pub enum SourceError {
    /// No connection.
    #[error("cannot reach the destination")]
    Connect(#[from] ConnectError),
    /// What it is told cannot be.
    #[error("{0}")]
    Options(&'static str),
    /// Its memory is laid out in a way that cannot be moved.
    #[error("this guest cannot be described to a destination")]
    Layout(#[source] WireError),
    /// It said no.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The conversation failed.
    #[error("the conversation with the destination failed")]
    Stream(#[from] StreamError),
    /// Somebody wants it to stay.
    #[error("the migration was cancelled")]
    Cancelled,
    /// It took too long.
    #[error(
        "the guest writes memory faster than it can be sent, is slow to pause, or has a device whose state is large: after {} s it would still \
         be paused for {expected_ms} ms, and {limit_ms} ms are allowed",
        .elapsed.as_secs()
    )]
    TimedOut {
        /// How long was tried.
        elapsed: Duration,
        /// How long it would be paused.
        expected_ms: u128,
        /// What is allowed.
        limit_ms: u128,
    },
    /// Memory of the guest could not be read.
    #[error("cannot read the guest's memory, or what of it was written")]
    Memory(#[source] std::io::Error),
    /// Memory cannot be handed over.
    #[error("cannot hand the guest's memory over")]
    HandOver(#[source] Cause),
    /// Something of the guest failed.
    #[error("cannot {what}")]
    Guest {
        /// What was tried.
        what: &'static str,
        /// Cause.
        #[source]
        source: Cause,
    },
    /// The state cannot be sent.
    #[error("the guest's state cannot be sent")]
    State(#[from] PayloadError),
    /// There is too much of it.
    #[error("the guest's state has {0} bytes, more than a destination takes")]
    StateTooLarge(usize),
    /// The destination was given up while memory was lacking there.
    #[error("it was given up while the destination, which runs it, lacked memory that was here")]
    Lost,
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// Where the guest is after a migration that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// Here, and it runs as before.
    RunsHere,
    /// Here, paused. It does not run at the destination and never will.
    PausedHere,
    /// Here, paused; it may run at the destination.
    Unknown,
    /// At the destination, if anywhere, without some of its memory. It never runs here again.
    Lost,
}

/// A migration that did not succeed.
#[derive(Debug, Error)]
pub struct NotMoved {
    /// Why.
    #[source]
    pub why: SourceError,
    /// Where the guest is.
    pub guest: Whereabouts,
}

impl fmt::Display for NotMoved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.guest {
            Whereabouts::RunsHere => "the guest was not moved, and runs here as before",
            Whereabouts::PausedHere => {
                "the guest was not moved and is paused here, since it could not be let run; it does not run at the \
                 destination: resume it here once the cause is gone"
            }
            Whereabouts::Lost => {
                "the guest is lost: it ran at the destination before all of its memory was there, and cannot go on here"
            }
            Whereabouts::Unknown => {
                "the destination was given the guest, and does not answer: the guest is paused here and may run there. Look \
                 whether it runs at the destination: if so, end this VMM; if not, end the destination's VMM, and resume here"
            }
        })
    }
}

/// A migration that succeeded.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// From the pause here until the destination said that the guest runs.
    pub downtime: Duration,
    /// What it took.
    pub progress: Progress,
}

/// A guest that is offered to a destination.
pub struct Source {
    options: SourceOptions,
    dialer: Dialer,
    memory: Arc<dyn Memory>,
    handle: Handle,
    sandbox: Arc<dyn Sandbox>,
}

/// What a session is while memory is copied.
struct Session {
    token: Token,
    control: Stream,
    team: Team,
    /// The streams for post-copy, until they are used.
    aside: Option<(Stream, Stream)>,
    /// The guest is switched before all of its memory is there.
    lazy: bool,
    /// What sends memory then.
    line: Option<post_copy::Line>,
    layout: Layout,
    rate: Rate,
    /// Bytes a second of the first round, if it sent nothing but zeroes.
    guess: f64,
    rounds: u32,
    throttle: u8,
    tried: Tried,
    /// Devices told what they are: the destination's have to reach all of its memory before they become that.
    has_devices: bool,
    began: Instant,
    /// When the destination heard last how far this is. Many rounds may pass in the time in which it gives up a source that is silent.
    said: Instant,
}

impl SourceOptions {
    fn check(&self) -> Result<(), SourceError> {
        if !(1..=MAX_STREAMS).contains(&self.streams) {
            return Err(SourceError::Options("a migration has 1 to 16 streams"));
        }
        match (self.hand_over, &self.address) {
            (true, Address::Tcp { .. }) => Err(SourceError::Options(
                "memory is handed over within one host, by a unix socket: give unix:/path, or leave local out",
            )),
            _ => Ok(()),
        }
    }
}

impl Source {
    /// Reads certificates and resolves names: the thread that runs the migration may do neither.
    pub fn new(
        options: SourceOptions,
        memory: Arc<dyn Memory>,
        handle: &Handle,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Self, SourceError> {
        options.check()?;
        let dialer = Dialer::new(&options.address, options.tls.as_ref(), options.deadlines)?;
        Ok(Self {
            options,
            dialer,
            memory,
            handle: handle.clone(),
            sandbox: sandbox.clone(),
        })
    }

    /// Moves the guest. `config` and `cpu` are for the destination's [`prepare`](crate::Sink::prepare).
    ///
    /// # Errors
    /// The error says where the guest is; only after [`Moved`] it is not here.
    pub fn run(self, guest: &mut dyn Guest, config: &[u8], cpu: &[u8]) -> Result<Moved, NotMoved> {
        let result = self.copy_and_switch(guest, config, cpu);
        self.handle.enter(Phase::Over);
        result.map(|downtime| Moved {
            downtime,
            progress: self.handle.progress(),
        })
    }

    fn copy_and_switch(&self, guest: &mut dyn Guest, config: &[u8], cpu: &[u8]) -> Result<Duration, NotMoved> {
        let runs_here = |why| NotMoved {
            why: self.cancelled_or(why),
            guest: Whereabouts::RunsHere,
        };
        let mut session = self.open(config, cpu).map_err(runs_here)?;
        self.handle.enter(match self.options.hand_over {
            true => Phase::HandingOver,
            false => Phase::Copying,
        });
        let result = match self.memory.start_log() {
            Ok(()) if self.options.hand_over => self.switch_at_once(&mut session, guest),
            Ok(()) => self.copy_until_switched(&mut session, guest),
            Err(error) => Err(session.keep(SourceError::Memory(error))),
        };
        if let Err(NotMoved { guest: whereabouts, .. }) = &result {
            if !matches!(whereabouts, Whereabouts::Unknown | Whereabouts::Lost) {
                self.memory.stop_log();
            }
            if session.throttle > 0
                && let Err(error) = guest.throttle(0)
            {
                tracing::error!("the guest's vCPUs stay slowed down: {error}");
            }
            self.handle.set_throttle(0);
        }
        result.map_err(|NotMoved { why, guest }| NotMoved {
            why: self.cancelled_or(why),
            guest,
        })
    }

    /// What failed because of a cancel did not fail.
    fn cancelled_or(&self, why: SourceError) -> SourceError {
        match why {
            SourceError::Stream(StreamError::Stopped) | SourceError::Connect(_) if self.handle.is_cancelled() => {
                SourceError::Cancelled
            }
            why => why,
        }
    }

    /// Connects all streams, and has the destination make a machine.
    fn open(&self, config: &[u8], cpu: &[u8]) -> Result<Session, SourceError> {
        fits(config, cpu)?;
        let layout = Layout::new(self.memory.regions()).map_err(SourceError::Layout)?;
        self.handle.set_total(layout.len());
        let token = random()?;
        let role = match self.options.post_copy {
            Some(_) => Role::PostCopy,
            None => Role::Control,
        };
        let mut control = self.connect(token, role)?;
        let data: Result<Vec<_>, _> = (0..self.options.streams)
            .map(|index| self.connect(token, Role::Data(index)))
            .collect();
        let aside =
            || -> Result<_, SourceError> { Ok((self.connect(token, Role::Demand)?, self.connect(token, Role::Push)?)) };
        let data = data.and_then(|data| Ok((data, self.options.post_copy.map(|_| aside()).transpose()?)));
        let wait = self.options.deadlines.prepare(layout.len());
        let accepted = data.and_then(|data| {
            let offer = Offer {
                layout: layout.clone(),
                config,
                cpu,
                post_copy: self.options.post_copy.is_some(),
            };
            if self.options.hand_over {
                let handed = self.memory.hand_over().map_err(SourceError::HandOver)?;
                hand_over::send(&mut control, &handed)?;
            }
            control.send(&Message::Offer(offer))?;
            answered(control.expect(Kind::Accepted, wait, "prepare a machine"))?;
            Ok(data)
        });
        let interrupt = self.handle.interrupt().child();
        let team = accepted.and_then(|(data, aside)| {
            let team = Team::start(data, &self.common(), &interrupt, &self.sandbox);
            Ok((team.map_err(SourceError::Thread)?, aside))
        });
        match team {
            Ok((team, aside)) => Ok(Session {
                token,
                control,
                team,
                aside,
                lazy: false,
                line: None,
                layout,
                rate: Rate::default(),
                guess: 0.0,
                rounds: 0,
                throttle: 0,
                tried: Tried::default(),
                has_devices: false,
                began: Instant::now(),
                said: Instant::now(),
            }),
            Err(error) => {
                say_no(&mut control, &error);
                Err(error)
            }
        }
    }

    fn connect(&self, token: Token, role: Role) -> Result<Stream, SourceError> {
        connect(&self.dialer, &self.options, self.handle.interrupt(), token, role)
    }

    /// Copies memory in rounds, until the guest is switched or that is given up.
    fn copy_until_switched(&self, session: &mut Session, guest: &mut dyn Guest) -> Result<Duration, NotMoved> {
        let all = session.layout.regions().iter();
        let mut next: Vec<Range<u64>> = all.map(|region| region.gpa..region.gpa + region.len).collect();
        let (mut before, mut lull) = (None, false);
        loop {
            let began = Instant::now();
            if std::mem::take(&mut lull) {
                thread::sleep(measure::LULL);
            }
            let copied = self
                .copy_devices(session, guest)
                .and_then(|()| self.copy(session, next));
            let written = match copied {
                Ok(written) => written,
                Err(why) => return Err(session.keep(why)),
            };
            let remaining = round::bytes(&written);
            let measured = self.measure(session, remaining, before, began.elapsed(), guest.devices_size());
            before = Some(remaining);
            let decision = match self.is_post_copy_due(session.began) {
                true => Decision::PostCopy,
                false => decide(&measured, &self.options.limits),
            };
            match decision {
                Decision::Again => {
                    // It may wait for nothing but a time to pause the guest again, or for a device that is less then.
                    lull =
                        !measured.pause.is_zero() || measured.devices > 0 && !measured.may_keep(&self.options.limits);
                    next = written;
                }
                Decision::Throttle(percent) => {
                    if let Err(source) = guest.throttle(percent) {
                        let what = "slow the guest's vCPUs down";
                        return Err(session.keep(SourceError::Guest { what, source }));
                    }
                    session.throttle = percent;
                    self.handle.set_throttle(percent);
                    next = written;
                }
                Decision::TimedOut => return Err(session.keep(self.timed_out(&measured))),
                switch @ (Decision::Switch | Decision::SwitchAnyway | Decision::PostCopy) => {
                    session.lazy = switch == Decision::PostCopy;
                    match self.switch(session, guest, written, switch == Decision::Switch)? {
                        switch::Outcome::Moved(downtime) => return Ok(downtime),
                        switch::Outcome::Retreat(left) => next = left,
                    }
                }
            }
        }
    }

    /// Sends `runs`, and returns what was written meanwhile.
    fn copy(&self, session: &mut Session, runs: Vec<Range<u64>>) -> Result<Vec<Range<u64>>, SourceError> {
        let began = Instant::now();
        let round = Arc::new(self.next_round(session, runs));
        session.team.begin(&round);
        let (rounds, start) = (session.rounds, session.began);
        let (control, said, mut cut) = (&mut session.control, &mut session.said, None);
        let mut say = || -> Result<(), Failed> {
            if cut.is_none() && self.is_post_copy_due(start) {
                cut = Some(round.stop());
            }
            // The interrupt of the control stream is that of a cancel.
            if said.elapsed() >= worker::ALIVE.min(self.options.deadlines.silence / 3) {
                *said = Instant::now();
                let remaining = self.handle.counters().remaining.load(Ordering::Relaxed);
                control.send(&Message::Progress(wire::Progress {
                    round: rounds,
                    remaining,
                }))?;
            }
            Ok(())
        };
        let done = session.team.finish(&mut say).and_then(|done| {
            // A round may be over before there was time for that.
            say()?;
            Ok(done)
        });
        let done = done.map_err(|failed| self.reason(session, failed))?;
        session.learn(&done, began.elapsed(), self.handle.cap());
        let written = self.memory.fetch_log().map_err(SourceError::Memory)?;
        let written = session.layout.clip(&written);
        match cut {
            Some(left) if round.first => Ok(union(self.touched(left)?, written)),
            Some(left) => Ok(union(left, written)),
            None => Ok(written),
        }
    }

    fn next_round(&self, session: &mut Session, runs: Vec<Range<u64>>) -> Round {
        let counters = self.handle.counters();
        let number = session.rounds;
        session.rounds += 1;
        counters.rounds.store(session.rounds, Ordering::Relaxed);
        counters.remaining.store(round::bytes(&runs), Ordering::Relaxed);
        Round::new(number, number == 0, runs)
    }

    /// Why memory could not be sent: the destination says more than a connection that it closed.
    fn reason(&self, session: &mut Session, failed: Failed) -> SourceError {
        const WAIT: Duration = Duration::from_secs(2);
        match failed {
            Failed::Memory(error) => SourceError::Memory(error),
            Failed::Stream(StreamError::Stopped) => StreamError::Stopped.into(),
            Failed::Stream(error) => match session.control.receive(WAIT, "say why") {
                Ok(Message::Abort(reason)) => SourceError::Refused(reason.to_owned()),
                _ => error.into(),
            },
        }
    }
}

impl Session {
    /// Tells the destination that the guest stays, which it does.
    fn keep(&mut self, why: SourceError) -> NotMoved {
        say_no(&mut self.control, &why);
        NotMoved {
            why,
            guest: Whereabouts::RunsHere,
        }
    }
}

/// A stream that the destination has welcomed.
fn connect(
    dialer: &Dialer,
    options: &SourceOptions,
    interrupt: &Interrupt,
    token: Token,
    role: Role,
) -> Result<Stream, SourceError> {
    let mut stream = dialer.connect(interrupt)?;
    greet(&mut stream, options, token, role)?;
    match stream.receive(options.deadlines.connect, "answer")? {
        Message::Welcome(vmm) => {
            if role.begins() {
                tracing::info!("the destination is Triarch {vmm}");
            }
            Ok(stream)
        }
        Message::Abort(reason) => Err(SourceError::Refused(reason.to_owned())),
        other => Err(crate::stream::unexpected(&other, "a welcome").into()),
    }
}

fn greet(stream: &mut Stream, options: &SourceOptions, token: Token, role: Role) -> Result<(), StreamError> {
    let hello = Hello {
        token,
        role,
        streams: options.streams,
        vmm: options.vmm.clone(),
    };
    stream.send(&Message::Hello(hello)).map(|_| ())
}

fn random() -> Result<Token, SourceError> {
    let mut token = Token::default();
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| SourceError::Thread(error.into()))?;
    Ok(token)
}

/// Whether a destination takes that much.
fn fits(config: &[u8], cpu: &[u8]) -> Result<(), SourceError> {
    match config.len() > MAX_CONFIG || cpu.len() > MAX_CPU {
        true => Err(SourceError::Options(
            "the configuration is larger than a destination takes",
        )),
        false => Ok(()),
    }
}

fn answered(answer: Result<(), Answer>) -> Result<(), SourceError> {
    answer.map_err(|answer| match answer {
        Answer::Abort(reason) => SourceError::Refused(reason),
        Answer::Stream(error) => error.into(),
    })
}

/// Sends `Abort`, which may fail; also after a cancel, which interrupts everything else.
fn say_no(control: &mut Stream, why: &SourceError) {
    control.set_interrupt(&Interrupt::default());
    let _ = control.send_within(&Message::Abort(&crate::sentence(why)), Duration::from_secs(2));
}
