//! What a front end said about one ring (vhost-user, "Ring states").

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Addresses of a ring, as the front end sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) used: u64,
    pub(crate) available: u64,
}

/// One ring.
#[derive(Default)]
pub(crate) struct Ring {
    /// Descriptors; zero if nobody said.
    pub(crate) size: u16,
    pub(crate) addresses: Option<Addresses>,
    /// Where the available ring is read next.
    pub(crate) base: u16,
    /// What wakes us. A ring with it is started.
    pub(crate) kick: Option<Arc<EventFd>>,
    pub(crate) enabled: bool,
    /// The device works on it.
    pub(crate) running: bool,
}

impl Ring {
    /// All a ring needs to run, if it should.
    pub(crate) fn ready(&self) -> Option<(Addresses, Arc<EventFd>)> {
        let kick = self.kick.clone().filter(|_| self.enabled && self.size > 0)?;
        Some((self.addresses?, kick))
    }
}
