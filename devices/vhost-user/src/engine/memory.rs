//! Memory of the guest that came or went while its devices run.

use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use vm_memory::GuestAddressSpace;

use super::{Engine, Link, Way};
use crate::LinkError;

/// How long a device's thread may take for it: it may just be waiting for the answer of a daemon that never comes.
const PATIENCE: Duration = Duration::from_secs(6);

/// A daemon that is being told which memory the guest has now.
pub struct Remap(Receiver<Result<(), LinkError>>);

impl Remap {
    pub(crate) fn new(answer: Receiver<Result<(), LinkError>>) -> Self {
        Self(answer)
    }

    /// Waits until the daemon knows. One that is not there, or goes meanwhile, hears of it when it comes back: that is no error.
    ///
    /// # Errors
    /// It cannot have this memory, and goes on with what it had; or its device's thread is busy with a daemon that does not answer.
    pub fn wait(self) -> Result<(), LinkError> {
        let late = || Err(LinkError::Silent("a change of the guest's memory"));
        self.0.recv_timeout(PATIENCE).unwrap_or_else(|_| late())
    }
}

impl Engine {
    pub(super) fn remap(&mut self, reply: &SyncSender<Result<(), LinkError>>) {
        let done = match self.share_anew() {
            refused @ Err(LinkError::Unfit(_) | LinkError::Failed(_)) => refused,
            done => {
                self.check(done);
                Ok(())
            }
        };
        // Whoever asked may have given up.
        let _ = reply.send(done);
    }

    /// Tells the daemon which memory the guest has now, if it was told of any.
    fn share_anew(&mut self) -> Result<(), LinkError> {
        let (Some(context), Link::Up { session, way, .. }) = (&self.context, &mut self.link) else {
            return Ok(());
        };
        let memory = self.shared.whole(&context.memory.memory());
        if self.pages.as_ref().is_some_and(|log| !log.covers(&memory)) {
            return Err(LinkError::Unfit(
                "the log of the pages it writes does not reach so far".into(),
            ));
        }
        let wake = &self.shared.wake;
        match way {
            None => Ok(()),
            Some(Way::Direct) => session.share_while_running(&[&memory], wake),
            Some(Way::Relay(rings)) => session.share_while_running(&[&memory, rings.memory()], wake),
        }
    }
}
