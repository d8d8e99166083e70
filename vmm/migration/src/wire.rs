//! Messages and how they are laid out.
//!
//! A message is a head of eight bytes (kind: u16, zeroes: u16, bytes that follow: u32), and a body. Numbers are little-endian. What a
//! kind may be long is known, so a length is checked before a byte of the body is taken. Numbers that no kind has are errors, as are
//! bytes that are left over: a change of the layout is another [`VERSION`].

pub(crate) mod decode;
pub(crate) mod encode;
#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::blocker::{Blocker, MAX_BLOCKERS};
use crate::memory::{Layout, PAGE};

/// Version of the format. A destination takes this one only.
pub const VERSION: u32 = 1;
/// What a stream begins with.
pub(crate) const MAGIC: [u8; 8] = *b"TRIARCHM";
/// Bytes of a head.
pub(crate) const HEAD: usize = 8;

/// Most data streams.
pub const MAX_STREAMS: u16 = 16;
/// Most bytes of memory in one message.
pub(crate) const MAX_BATCH: usize = 4 << 20;
/// Most runs in one message.
pub(crate) const MAX_RUNS: usize = 1024;
/// Most pages that are wanted at once.
pub(crate) const MAX_WANTED: usize = 64;
/// Most bytes of a configuration.
pub(crate) const MAX_CONFIG: usize = 16 << 20;
/// Most bytes of the description of the guest's processors.
pub(crate) const MAX_CPU: usize = 4 << 20;
/// Most bytes of saved state.
pub(crate) const MAX_STATE: u64 = 64 << 20;
/// Most bytes of it in one message.
pub(crate) const MAX_STATE_PART: usize = 1 << 20;
/// Most bytes of a sentence or a name.
pub(crate) const MAX_TEXT: usize = 4096;

/// What tells a session from others, and who belongs to it: random, and said to the destination only.
pub(crate) type Token = [u8; 16];

/// What a message is. `Files` comes only where memory is handed over, before the offer; `Device` of guests with devices of the host. Those from 64 on are of post-copy, and come only in
/// sessions that [`Role::PostCopy`] began, where nothing is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    Hello = 1,
    Welcome = 2,
    Offer = 3,
    Accepted = 4,
    Pages = 5,
    Zeroes = 6,
    RoundEnd = 7,
    RoundDone = 8,
    Switch = 9,
    State = 10,
    Complete = 11,
    Ready = 12,
    Go = 13,
    Running = 14,
    Abort = 15,
    Progress = 16,
    Alive = 17,
    End = 18,
    Blockers = 19,
    Files = 20,
    Device = 21,
    Missing = 64,
    Lacks = 65,
    Serve = 66,
    Want = 67,
    Served = 68,
}

impl Kind {
    pub(crate) const ALL: [Self; 26] = [
        Self::Hello,
        Self::Welcome,
        Self::Offer,
        Self::Accepted,
        Self::Pages,
        Self::Zeroes,
        Self::RoundEnd,
        Self::RoundDone,
        Self::Switch,
        Self::State,
        Self::Complete,
        Self::Ready,
        Self::Go,
        Self::Running,
        Self::Abort,
        Self::Progress,
        Self::Alive,
        Self::End,
        Self::Blockers,
        Self::Files,
        Self::Device,
        Self::Missing,
        Self::Lacks,
        Self::Serve,
        Self::Want,
        Self::Served,
    ];

    fn from_number(number: u16) -> Result<Self, WireError> {
        let found = Self::ALL.into_iter().find(|kind| *kind as u16 == number);
        found.ok_or(WireError::Kind(number))
    }

    /// Most bytes of a body.
    fn limit(self) -> usize {
        const RUN: usize = 16;
        match self {
            Self::Hello | Self::Welcome | Self::Abort => 64 + MAX_TEXT,
            Self::Offer => 64 + crate::memory::MAX_REGIONS * RUN + MAX_CONFIG + MAX_CPU,
            Self::Pages => 64 + MAX_RUNS * RUN + MAX_BATCH,
            Self::Zeroes | Self::Missing | Self::Lacks => 64 + MAX_RUNS * RUN,
            Self::Files => 64 + crate::memory::MAX_REGIONS * RUN,
            Self::Want => 64 + MAX_WANTED * RUN,
            Self::State | Self::Device => 64 + MAX_STATE_PART,
            Self::Blockers => 64 + MAX_BLOCKERS * (16 + 3 * MAX_TEXT),
            Self::RoundEnd | Self::RoundDone | Self::Progress => 64,
            Self::Accepted
            | Self::Switch
            | Self::Complete
            | Self::Ready
            | Self::Go
            | Self::Running
            | Self::Alive
            | Self::End
            | Self::Serve
            | Self::Served => 0,
        }
    }
}

/// Why something is no message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// No kind has the number.
    #[error("a message of the unknown kind {0}; the other side is another version, or no Triarch")]
    Kind(u16),
    /// The reserved bytes are something.
    #[error("a message with reserved bits")]
    Reserved,
    /// Longer than any of its kind.
    #[error("a message of {len} bytes where {limit} is the most")]
    TooLong {
        /// Its bytes.
        len: usize,
        /// Bytes it may have.
        limit: usize,
    },
    /// Its body ends too early.
    #[error("a message that was cut short")]
    Short,
    /// Its body does not end.
    #[error("a message with bytes that mean nothing")]
    Left,
    /// It does not begin as a stream does.
    #[error("a stream that is no migration of Triarch")]
    Magic,
    /// Another version.
    #[error("format {found}; this version of Triarch speaks format {VERSION}")]
    Version {
        /// What it speaks.
        found: u32,
    },
    /// What it says cannot be.
    #[error("{0}")]
    Invalid(&'static str),
}

/// The first message on a stream, by the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    /// To which session the stream belongs.
    pub(crate) token: Token,
    pub(crate) role: Role,
    /// Data streams of the session.
    pub(crate) streams: u16,
    /// Version of the VMM.
    pub(crate) vmm: String,
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Begins a session.
    Control,
    /// Carries memory: one of these numbers, from 0.
    Data(u16),
    /// The source lost its session after it had given the guest away, and asks what became of it.
    Ask,
    /// The source asks whether its guest could come here, and no more. The session that is awaited stays awaited.
    Check,
    /// Begins a session whose guest may run at the destination before all of its memory is there.
    PostCopy,
    /// Of such a session, also after it was lost: carries the pages that the guest waits for.
    Demand,
    /// The same, for those that nobody waits for.
    Push,
    /// As [`Check`](Self::Check), of a guest that could run before all of its memory is there.
    CheckPostCopy,
}

impl Role {
    /// Whether it begins a session.
    pub(crate) fn begins(self) -> bool {
        matches!(self, Self::Control | Self::PostCopy)
    }

    /// Whether it only asks.
    pub(crate) fn checks(self) -> bool {
        matches!(self, Self::Check | Self::CheckPostCopy)
    }
}

/// What the guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer<'a> {
    /// Where its memory is.
    pub layout: Layout,
    /// Its configuration.
    pub config: &'a [u8],
    /// What its processors can do.
    pub cpu: &'a [u8],
    /// Whether it may run before all of its memory is there. It is not in the message: the session is of that kind.
    pub post_copy: bool,
}

/// Pages with what is on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pages<'a> {
    pub(crate) runs: Runs,
    /// Compressed by LZ4 (block format).
    pub(crate) packed: bool,
    /// The pages one after the other, or what they are packed to.
    pub(crate) bytes: &'a [u8],
}

/// Runs of pages: GPA and bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Runs(Vec<(u64, u64)>);

impl Runs {
    /// Adds a page. `joins`: the one before it is of the same region, so that they may be one run.
    pub(crate) fn push(&mut self, gpa: u64, len: u64, joins: bool) {
        match self.0.last_mut() {
            Some((start, bytes)) if joins && *start + *bytes == gpa => *bytes += len,
            _ => self.0.push((gpa, len)),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }

    /// Calls `step` with what is left of them until it has dealt with every byte; it tells with how many.
    pub(crate) fn each<E>(mut self, mut step: impl FnMut(&[(u64, u64)]) -> Result<usize, E>) -> Result<(), E> {
        let mut first = 0;
        while first < self.0.len() {
            let mut done = step(&self.0[first..])? as u64;
            while let Some((gpa, len)) = self.0.get_mut(first) {
                if done < *len {
                    *gpa += done;
                    *len -= done;
                    break;
                }
                done -= *len;
                first += 1;
            }
        }
        Ok(())
    }

    pub(crate) fn as_slice(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// Bytes of all.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn checked(runs: Vec<(u64, u64)>) -> Result<Self, WireError> {
        if runs.is_empty() {
            return Err(WireError::Invalid(decode::NONE));
        }
        for (gpa, len) in &runs {
            let whole = gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && *len > 0;
            if !whole || gpa.checked_add(*len).is_none() {
                return Err(WireError::Invalid("memory that is no whole pages"));
            }
        }
        Ok(Self(runs))
    }
}

/// How far the source is, for whoever asks the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Progress {
    /// Rounds that began.
    pub(crate) round: u32,
    /// Bytes left of this one.
    pub(crate) remaining: u64,
}

/// A message. What is large is borrowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// Source: what this stream is. First on every stream.
    Hello(Hello),
    /// Destination: the stream is taken; the version of its VMM.
    Welcome(String),
    /// Source: what the guest is.
    Offer(Offer<'a>),
    /// Destination: there is a machine for it.
    Accepted,
    /// Source, on data streams.
    Pages(Pages<'a>),
    /// Source, on data streams: pages that became zeroes.
    Zeroes(Runs),
    /// Source, on data streams: nothing more of round number ... comes on this one.
    RoundEnd(u32),
    /// Destination, as the answer: all of it is in memory.
    RoundDone(u32),
    /// Source: the guest is paused.
    Switch,
    /// Source: the next part of the saved state, which has `total` bytes.
    State { total: u64, part: &'a [u8] },
    /// Source: that was all.
    Complete,
    /// Destination: everything is restored.
    Ready,
    /// Source: the guest is yours.
    Go,
    /// Destination: it runs.
    Running,
    /// Either: no. Of a destination: the guest does not run here, and will not.
    Abort(&'a str),
    /// Source, on the control stream, while it sends memory.
    Progress(Progress),
    /// Source, on data streams on which nothing is to be sent.
    Alive,
    /// Source: this stream ends here as it should.
    End,
    /// Destination, of a stream that only asks: what is in the way of the guest that was offered.
    Blockers(Vec<Blocker>),
    /// Source, before the offer: `count` descriptors follow, and the regions of the offer are at these places of their files.
    Files {
        count: u32,
        places: Vec<crate::hand_over::Place>,
    },
    /// Source: what a device is that only its driver understands. All that came before is void if it `begins`.
    Device { device: u16, begins: bool, part: &'a [u8] },
    /// Source, after `Switch`: pages that come when the guest runs.
    Missing(Runs),
    /// Destination, on the stream of wanted pages, at first: pages that are not there.
    Lacks(Runs),
    /// Destination: that was all; send them.
    Serve,
    /// Destination: somebody waits for these pages, of which each is a run.
    Want(Runs),
    /// Source: that were all of those.
    Served,
}

impl Message<'_> {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Welcome(_) => Kind::Welcome,
            Self::Offer(_) => Kind::Offer,
            Self::Accepted => Kind::Accepted,
            Self::Pages(_) => Kind::Pages,
            Self::Zeroes(_) => Kind::Zeroes,
            Self::RoundEnd(_) => Kind::RoundEnd,
            Self::RoundDone(_) => Kind::RoundDone,
            Self::Switch => Kind::Switch,
            Self::State { .. } => Kind::State,
            Self::Complete => Kind::Complete,
            Self::Ready => Kind::Ready,
            Self::Go => Kind::Go,
            Self::Running => Kind::Running,
            Self::Abort(_) => Kind::Abort,
            Self::Progress(_) => Kind::Progress,
            Self::Alive => Kind::Alive,
            Self::End => Kind::End,
            Self::Blockers(_) => Kind::Blockers,
            Self::Files { .. } => Kind::Files,
            Self::Device { .. } => Kind::Device,
            Self::Missing(_) => Kind::Missing,
            Self::Lacks(_) => Kind::Lacks,
            Self::Serve => Kind::Serve,
            Self::Want(_) => Kind::Want,
            Self::Served => Kind::Served,
        }
    }
}
