//! The guest moves to another process, which has another daemon.

use std::sync::Arc;

use triarch_virtio::DeviceId;

use super::lanes::Lane;
use super::{Engine, Link};
use crate::session::Session;
use crate::{LinkError, PageLog};

/// A step of that.
pub(crate) enum Move {
    /// The daemon lets go of what only one may have: another guest's daemon is to take it. No queue runs.
    LetGo,
    /// The daemon takes it. There must be one.
    Take,
    /// The guest is here now: its network learns of it, and its daemon tells others.
    Announce,
}

impl Engine {
    pub(super) fn step(&mut self, step: &Move) -> Result<(), LinkError> {
        match step {
            Move::LetGo => self.shared.peer.set_away(true),
            Move::Take => self.shared.peer.set_away(false),
            Move::Announce => {}
        }
        // One that was lost meanwhile may be back.
        self.tend();
        let wake = &self.shared.wake;
        // Nothing but images has an owner.
        let owned = self.shared.peer.kind.id() == DeviceId::Block;
        let done = match (&self.link, step) {
            // It has nothing any more.
            (Link::Down { .. }, Move::LetGo) => return Ok(()),
            (Link::Down { .. }, Move::Take) => {
                let reason = self.told.clone().unwrap_or_else(|| "there is none".to_owned());
                self.shared.peer.set_away(true);
                return Err(LinkError::Unfit(reason));
            }
            (Link::Down { .. }, Move::Announce) => {
                self.shared.peer.kind.announce();
                return Ok(());
            }
            (Link::Up { .. }, Move::LetGo | Move::Take) if !owned => Ok(()),
            (Link::Up { session, .. }, Move::LetGo) => session.keep(false, wake),
            (Link::Up { session, .. }, Move::Take) => session.keep(true, wake),
            (Link::Up { session, .. }, Move::Announce) => session.set(self.shared.peer.kind.returned(), wake),
        };
        match done {
            // It goes on as it was, and so does whoever has what it is to take.
            Err(error @ LinkError::Failed(_)) => {
                self.shared.peer.set_away(matches!(step, Move::Take));
                Err(error)
            }
            Err(error) => {
                self.lost(&error);
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Has the daemon log which pages it writes, also the one after it, or no longer. Fails when there is one and it cannot.
    pub(super) fn log_pages(&mut self, log: Option<Arc<PageLog>>) -> Result<(), LinkError> {
        if log.is_some() {
            self.session().map_or(Ok(()), Session::check_log)?;
        }
        self.pages = log;
        // The next daemon logs from its beginning.
        let done = self.announce_log();
        self.check(done);
        Ok(())
    }

    fn announce_log(&mut self) -> Result<(), LinkError> {
        let (Some(context), Link::Up { session, way, .. }) = (&self.context, &mut self.link) else {
            return Ok(());
        };
        if way.is_none() {
            return Ok(());
        }
        let wake = &self.shared.wake;
        session.set_log(self.pages.as_deref(), wake)?;
        session.set_features(context.features, wake)?;
        for lane in self.lanes.iter().flatten() {
            if let Lane::Direct(direct) = lane
                && let Some(ring) = direct.ring()
            {
                session.set_addresses(&ring, wake)?;
            }
        }
        Ok(())
    }
}
