//! The side that takes a guest.

mod post_copy;
mod session;
mod worker;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use worker::Writer;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use triarch_device_core::Sandbox;
use triarch_state::{PayloadError, Payloads};

use crate::address::Address;
use crate::blocker::Blocker;
use crate::commit::Destination as Commit;
use crate::connect::{ConnectError, Deadlines, Listener};
use crate::hand_over::{self, Handed};
use crate::handle::{Handle, Phase};
use crate::memory::{Lacking, Target};
use crate::post_copy::Turn;
use crate::stream::{Answer, Interrupt, Stream, StreamError, unexpected};
use crate::tls::TlsFiles;
use crate::wire::{Hello, Kind, Message, Offer, Role, Token};
use crate::{Cause, sentence};
use session::Session;

/// Makes a machine of what comes. Called on the thread that runs the migration.
pub trait Sink {
    /// Makes a machine for the guest that is offered, or says why that cannot be: its processors can do what these cannot, there is too
    /// little memory, a device is missing. Nothing of the offer was looked at, but that the layout is in order. All memory of it reads
    /// as zeroes when this returns. What it returns is used until [`restore`](Self::restore) or [`abort`](Self::abort) is called.
    /// Keep it as well: whoever drops the last reference frees the guest's memory, and that while it is paused.
    ///
    /// `handed`: files that have all of its memory, of which nothing was looked at. The guest still runs with it: nothing is written there
    /// before [`take_locks_and_run`](Self::take_locks_and_run).
    fn prepare(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause>;

    /// What [`prepare`](Self::prepare) of this guest would fail for: all of it, not only the first. Nothing is kept of it.
    fn check(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Vec<Blocker>;

    /// What device number `device` is that only its driver understands. All that came of it before is void if it `begins`. Called before
    /// [`restore`](Self::restore), while memory comes.
    fn load_device(&mut self, _device: u16, _begins: bool, _part: &[u8]) -> Result<(), Cause> {
        Err("no device of this guest has such a state".into())
    }

    /// Restores everything beside memory, of which all is there. No lock of a disk is taken: the source still has them.
    fn restore(&mut self, state: Payloads) -> Result<(), Cause>;

    /// Takes the locks of disks and lets the guest run. After an error it does not run, holds no lock, and never will run.
    fn take_locks_and_run(&mut self) -> Result<(), Cause>;

    /// Has memory of the guest fault that comes only when the guest runs: nothing may be there of `missing`, runs of GPAs in order. Called
    /// before [`restore`](Self::restore), of a guest that was offered with [`post_copy`](Offer::post_copy).
    fn lack(&mut self, _missing: &[Range<u64>]) -> Result<Arc<dyn Lacking>, Cause> {
        Err("post-copy cannot be done here".into())
    }

    /// The guest runs, and lacks memory.
    fn post_copy(&mut self, _turn: Turn<'_>) {}

    /// Throws away what there is of the guest, which may be nothing. It never runs here.
    fn abort(&mut self, why: &str);
}

/// How a guest is to be taken.
#[derive(Debug, Clone)]
pub struct DestinationOptions {
    /// Where to listen.
    pub address: Address,
    /// Who we are and whom to expect; none for unix sockets and `tcp-plain:`.
    pub tls: Option<TlsFiles>,
    /// How long to wait for what. The first connection is awaited as long as it takes.
    pub deadlines: Deadlines,
    /// Version of the VMM, for the other side's log.
    pub vmm: String,
}

/// Why no guest was taken.
#[derive(Debug, Error)]
pub enum DestinationError {
    /// No connection.
    #[error("cannot be reached by a source")]
    Connect(#[from] ConnectError),
    /// The source has its reasons.
    #[error("the source ended the migration: {0}")]
    Refused(String),
    /// The conversation failed.
    #[error("the conversation with the source failed")]
    Stream(#[from] StreamError),
    /// Not all streams came.
    #[error("only {found} of {expected} streams came in time")]
    Streams {
        /// How many came.
        found: usize,
        /// How many were said to come.
        expected: u16,
    },
    /// Memory outside of the guest's.
    #[error("the source sent memory at {gpa:#x}, where this guest has none")]
    Outside {
        /// Where.
        gpa: u64,
    },
    /// Pages that cannot be unpacked.
    #[error("the source sent pages whose compression is damaged")]
    Damaged,
    /// The source cannot be asked for it any more.
    #[error("memory that the guest lacked here could not be fetched")]
    Lacking,
    /// Guest memory.
    #[error("cannot write to the guest's memory")]
    Memory(#[source] std::io::Error),
    /// The state is not what it was said to be.
    #[error("the source sent a state of another length than it said")]
    StateLength,
    /// It is none.
    #[error("the guest's state is invalid")]
    State(#[from] PayloadError),
    /// Something of the machine failed.
    #[error("cannot {what}")]
    Sink {
        /// What was tried.
        what: &'static str,
        /// Cause.
        #[source]
        source: Cause,
    },
    /// The source asked for the outcome before it was one.
    #[error("the source lost its connection and asked what became of the guest, before it was given away")]
    Asked,
    /// Somebody does not want it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// A destination that waits for a guest.
pub struct Destination {
    listener: Listener,
    vmm: String,
}

/// A guest that was taken, and runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// Bytes of memory written.
    pub bytes: u64,
    /// Whether the source confirmed that it knows. If not, it may be paused and ask its operator.
    pub confirmed: bool,
}

/// What became of a session, for a source that lost its connection.
struct Outcome<'a> {
    token: Token,
    /// What is to be answered: it runs, or why not.
    ran: Result<(), &'a str>,
}

impl Destination {
    /// Listens. Certificates are read and names resolved here: the thread that runs the migration may do neither.
    pub fn bind(options: DestinationOptions) -> Result<Self, DestinationError> {
        let listener = Listener::bind(&options.address, options.tls.as_ref(), options.deadlines)?;
        Ok(Self {
            listener,
            vmm: options.vmm,
        })
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn address(&self) -> &Address {
        self.listener.address()
    }

    /// Takes one guest. After a session that ended without the source's confirmation this stays for a while, to answer a source that
    /// lost its connection; the guest runs, or was thrown away, long before.
    ///
    /// # Errors
    /// The guest does not run here and never will; [`Sink::abort`] was called if [`Sink::prepare`] was.
    pub fn run(
        self,
        sink: &mut dyn Sink,
        handle: &Handle,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Taken, DestinationError> {
        let taken = self.take(sink, handle, sandbox);
        handle.enter(Phase::Over);
        taken.map_err(|error| match error {
            DestinationError::Stream(StreamError::Stopped) | DestinationError::Connect(ConnectError::Stopped)
                if handle.is_cancelled() =>
            {
                DestinationError::Cancelled
            }
            error => error,
        })
    }

    fn take(
        &self,
        sink: &mut dyn Sink,
        handle: &Handle,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Taken, DestinationError> {
        let (control, hello) = self.first(sink, handle)?;
        let mut session = Session::new(control, hello.token, handle, self.listener.deadlines);
        let result = self.converse(&mut session, &hello, sink, sandbox);
        if let Err(error) = result {
            session.failed(sink, error);
        }
        let taken = |confirmed| Taken {
            bytes: session.bytes(),
            confirmed,
        };
        let why = session.why().map(sentence);
        let outcome = Outcome {
            token: hello.token,
            ran: why.as_deref().map_or(Ok(()), Err),
        };
        match session.state() {
            Commit::Running if session.lacks() => {
                let confirmed = self.follow(&mut session, sink, handle)?;
                Ok(Taken {
                    bytes: session.bytes(),
                    confirmed,
                })
            }
            Commit::Running if session.is_confirmed() => Ok(taken(true)),
            Commit::Running => Ok(taken(self.answer(&outcome))),
            _ => {
                // Who was never told that we are ready has not given anything away.
                if session.may_be_asked() {
                    self.answer(&outcome);
                }
                Err(session.into_why())
            }
        }
    }

    /// Waits for a source, and for the first stream of it. Whoever only asks is answered.
    fn first(&self, sink: &mut dyn Sink, handle: &Handle) -> Result<(Stream, Hello), DestinationError> {
        loop {
            let Some(stream) = self.listener.accept(handle.interrupt(), None)? else {
                continue;
            };
            if let Some((stream, hello)) = self.greeted(stream) {
                match hello.role {
                    Role::Control | Role::PostCopy => return Ok((stream, hello)),
                    Role::Check | Role::CheckPostCopy => self.look(stream, hello.role, sink),
                    Role::Data(_) | Role::Ask | Role::Demand | Role::Push => {
                        tracing::warn!("a stream came that is of no migration here");
                    }
                }
            }
        }
    }

    /// Answers a source that only asks. What comes of that matters to nobody here.
    fn look(&self, mut stream: Stream, role: Role, sink: &mut dyn Sink) {
        // Others wait meanwhile.
        let wait = self.listener.deadlines.hello();
        stream.set_message_time(wait);
        let answered = self.welcome(&mut stream).and_then(|()| {
            let post_copy = role == Role::CheckPostCopy;
            let (offer, handed) = match hand_over::offered(&mut stream, wait, "say what its guest is", post_copy)? {
                (Message::Offer(offer), handed) => (offer, handed),
                (other, _) => return Err(unexpected(&other, "an offer")),
            };
            let blockers = sink.check(&offer, handed);
            tracing::info!(
                "a source asked whether its guest could come: {} in the way",
                blockers.len()
            );
            stream.send(&Message::Blockers(blockers)).map(drop)
        });
        match answered {
            // Its end, lest the kernel throw away what was said.
            Ok(()) => drop(stream.receive(wait, "end")),
            Err(error) => tracing::warn!("a source that asked was not answered: {}", sentence(&error)),
        }
    }

    /// What a connection is, if it says so as it should. Others are told why not, and dropped.
    fn greeted(&self, mut stream: Stream) -> Option<(Stream, Hello)> {
        let Deadlines { message, .. } = self.listener.deadlines;
        let wait = self.listener.deadlines.hello();
        // Others wait meanwhile, and perhaps a guest that stands still: for the whole of it, not for its first byte only.
        stream.set_message_time(wait);
        let found = match stream.receive(wait, "say who it is") {
            Ok(Message::Hello(hello)) => Ok(hello),
            Ok(other) => Err(unexpected(&other, "a hello")),
            Err(error) => Err(error),
        };
        match found {
            Ok(hello) => {
                stream.set_message_time(message);
                Some((stream, hello))
            }
            Err(error) => {
                let why = sentence(&error);
                tracing::warn!("a connection for a migration was refused: {why}");
                let _ = stream.send_within(&Message::Abort(&why), Duration::from_secs(2));
                None
            }
        }
    }

    fn welcome(&self, stream: &mut Stream) -> Result<(), StreamError> {
        stream.send(&Message::Welcome(self.vmm.clone())).map(|_| ())
    }

    /// Everything up to the guest that runs.
    fn converse(
        &self,
        session: &mut Session,
        hello: &Hello,
        sink: &mut dyn Sink,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<(), DestinationError> {
        tracing::info!("a guest comes from Triarch {}", hello.vmm);
        self.welcome(session.control())?;
        let data = self.data_streams(session, hello)?;
        session.prepare(sink, data, sandbox)?;
        session.receive_all(sink)?;
        session.begin_post_copy(sink, sandbox)?;
        session.restore(sink)?;
        session.wait_for_go(sink, |session| self.is_asked(session))
    }

    /// Waits for the streams of memory.
    fn data_streams(&self, session: &mut Session, hello: &Hello) -> Result<Vec<Stream>, DestinationError> {
        let end = Instant::now() + self.listener.deadlines.connect;
        let mut streams: Vec<Option<Stream>> = (0..hello.streams).map(|_| None).collect();
        let (mut demand, mut push) = (None, None);
        let lazy = hello.role == Role::PostCopy;
        while streams.iter().any(Option::is_none) || (lazy && (demand.is_none() || push.is_none())) {
            let Some(stream) = self.listener.accept(session.interrupt(), Some(end))? else {
                return Err(DestinationError::Streams {
                    found: streams.iter().flatten().count(),
                    expected: hello.streams,
                });
            };
            let Some((mut stream, theirs)) = self.greeted(stream) else {
                continue;
            };
            let place = match theirs.role {
                Role::Data(index) if same(&theirs.token, &hello.token) => streams.get_mut(usize::from(index)),
                Role::Demand if lazy && same(&theirs.token, &hello.token) => Some(&mut demand),
                Role::Push if lazy && same(&theirs.token, &hello.token) => Some(&mut push),
                _ => None,
            };
            match place {
                Some(place) if place.is_none() => {
                    self.welcome(&mut stream)?;
                    *place = Some(stream);
                }
                _ if !theirs.role.checks() => tracing::warn!("a stream came that is not of this migration"),
                // Who only asks may know why there is no answer.
                _ => {
                    let why = Message::Abort("another guest is being moved here");
                    let _ = stream.send_within(&why, Duration::from_secs(2));
                }
            }
        }
        session.set_aside(demand.zip(push));
        Ok(streams.into_iter().flatten().collect())
    }

    /// Whether the source, on another connection, asks what became of the guest; that connection.
    fn is_asked(&self, session: &Session) -> Option<Stream> {
        let accepted = self.listener.accept(session.interrupt(), Some(Instant::now()));
        let (stream, hello) = self.greeted(accepted.ok()??)?;
        (hello.role == Role::Ask && same(&hello.token, &session.token())).then_some(stream)
    }

    /// Answers a source that asks, for a while; a cancel does not keep us from it. Whether it confirmed that it knows.
    fn answer(&self, outcome: &Outcome) -> bool {
        let end = Instant::now() + self.listener.deadlines.outcome;
        while let Ok(Some(stream)) = self.listener.accept(&Interrupt::default(), Some(end)) {
            let Some((mut stream, hello)) = self.greeted(stream) else {
                continue;
            };
            if hello.role == Role::Ask && same(&hello.token, &outcome.token) && tell(&mut stream, outcome.ran) {
                return true;
            }
        }
        false
    }
}

/// Says what became of the guest, and waits for the source to say that it knows.
fn tell(stream: &mut Stream, ran: Result<(), &str>) -> bool {
    const WAIT: Duration = Duration::from_secs(5);
    let message = match ran {
        Ok(()) => Message::Running,
        Err(why) => Message::Abort(why),
    };
    let sent = stream.send(&message).map_err(Answer::Stream);
    sent.and_then(|_| stream.expect(Kind::End, WAIT, "confirm")).is_ok()
}

/// Whether two tokens are the same, in a time that does not tell where they differ.
fn same(one: &Token, other: &Token) -> bool {
    let differ = one.iter().zip(other).fold(0, |differ, (a, b)| differ | (a ^ b));
    std::hint::black_box(differ) == 0
}
