//! Requests of the driver and their answers (virtio 1.2, 5.15.6).

/// Bytes of a request.
pub(super) const REQUEST: usize = 24;
/// Bytes of an answer.
pub(super) const RESPONSE: usize = 10;

/// What a driver asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Span),
    Unplug(Span),
    UnplugAll,
    State(Span),
    /// A type that the specification does not know.
    Unknown,
}

/// Blocks as the driver names them: any numbers at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) addr: u64,
    pub(super) blocks: u16,
}

impl Request {
    pub(super) fn parse(bytes: &[u8; REQUEST]) -> Self {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, ..] = *bytes;
        let span = Span {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            blocks: u16::from_le_bytes([b0, b1]),
        };
        match u16::from_le_bytes([t0, t1]) {
            0 => Self::Plug(span),
            1 => Self::Unplug(span),
            2 => Self::UnplugAll,
            3 => Self::State(span),
            _ => Self::Unknown,
        }
    }
}

/// What it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// That is more than the host wants.
    Nack,
    /// Not now.
    Busy,
    /// No such request.
    Error,
    /// How the blocks it asked about are.
    State(State),
}

/// How some blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Answer {
    pub(super) fn bytes(self) -> [u8; RESPONSE] {
        let (kind, state) = match self {
            Self::Ack | Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}
