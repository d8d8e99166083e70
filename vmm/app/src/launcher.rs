//! Whoever started this process, as the controller sees them.

use std::time::Duration;

use triarch_api::Phase;
use triarch_machine::Supervisor;

use crate::audit::Reopener;
use crate::notify::Notify;
use crate::sink::Sink;

/// A service manager, if there is one, and the log they read.
pub(crate) struct Launcher {
    manager: Option<Notify>,
    log: Sink,
    audit: Option<Reopener>,
    phase: Phase,
    ready: bool,
}

impl Launcher {
    /// The one the environment tells of, the log, and the audit log if that is a file.
    pub(crate) fn new(log: Sink, audit: Option<Reopener>) -> Self {
        Self {
            manager: Notify::from_env(),
            log,
            audit,
            phase: Phase::Absent,
            ready: false,
        }
    }
}

impl Supervisor for Launcher {
    fn ready(&mut self) {
        self.ready = true;
        if let Some(manager) = &self.manager {
            manager.ready(self.phase);
        }
    }

    fn phase(&mut self, phase: Phase) {
        self.phase = phase;
        // What comes before tells whoever waits for the start nothing.
        if let Some(manager) = self.manager.as_ref().filter(|_| self.ready) {
            manager.phase(phase);
        }
    }

    fn stopping(&mut self) {
        if let Some(manager) = &self.manager {
            manager.stopping();
        }
        self.ready = false;
    }

    fn alive_every(&self) -> Option<Duration> {
        self.manager.as_ref()?.alive_every()
    }

    fn alive(&mut self) {
        if let Some(manager) = &self.manager {
            manager.alive();
        }
    }

    fn reopen_log(&mut self) -> bool {
        match self.audit.as_ref().map(Reopener::reopen) {
            None => {}
            Some(Ok(())) => tracing::info!("the audit log begins in a new file"),
            Some(Err(error)) => tracing::warn!("cannot open the file of the audit log again: {error}"),
        }
        match self.log.reopen() {
            None => return self.audit.is_some(),
            Some(Ok(())) => tracing::info!("the log begins in a new file"),
            // It goes where it went.
            Some(Err(error)) => tracing::warn!("cannot open the log file again: {error}"),
        }
        true
    }
}
