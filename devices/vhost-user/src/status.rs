//! How a device stands with its daemon, for whoever asks.

use std::time::SystemTime;

/// What a device does whose daemon is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDisconnect {
    /// Requests wait until a daemon is back, for ever.
    #[default]
    Stall,
    /// They wait this long, then requests fail until a daemon is back.
    ErrorAfter(std::time::Duration),
}

/// Who works on the guest's rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DataPath {
    /// The daemon if it can, otherwise the VMM.
    #[default]
    Auto,
    /// The daemon, and no daemon that cannot.
    Direct,
    /// The VMM, which passes requests on.
    Relay,
}

/// How a device stands with its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// It serves the device.
    Connected,
    /// There is none; requests wait.
    Disconnected,
    /// There is none, and requests fail.
    Failing,
}

/// How a device stands with its daemon, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkStatus {
    /// Whether there is one.
    pub state: LinkState,
    /// Why there is none, or why there was none the last time.
    pub reason: Option<String>,
    /// Whether the daemon works on the guest's rings, or did.
    pub direct: bool,
    /// When `state` began.
    pub since: SystemTime,
    /// How often another connection was made after the first one.
    pub reconnects: u64,
    /// Requests that were given to a daemon once more, because the one before did not answer them.
    pub resubmitted: u64,
    /// Whether the daemon, or the last one, can log which pages of the guest it writes.
    pub logs: bool,
    /// Whether it can hand over what it knows of the device beside its rings.
    pub hands_over: bool,
}
