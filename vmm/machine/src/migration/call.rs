//! How the thread of a migration has the controller do something.

use std::fmt;
use std::sync::mpsc::sync_channel;

use triarch_migration::Cause;

use crate::control::Controller;
use crate::{Inbox, MachineError, Message};

type Work = Box<dyn FnOnce(&mut Controller) + Send>;

/// What the thread of a migration wants done with the guest.
pub struct Call(Work);

impl Call {
    pub(crate) fn run(self, controller: &mut Controller) {
        (self.0)(controller);
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

/// The way of that thread to the controller.
#[derive(Clone)]
pub(super) struct Caller(pub(super) Inbox);

impl Caller {
    /// Has `work` done, and waits for what comes of it.
    pub(super) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Controller) -> Result<T, MachineError> + Send + 'static,
    ) -> Result<T, Cause> {
        let (sender, receiver) = sync_channel(1);
        self.post(move |controller| {
            // Nobody receives only when the thread has ended.
            let _ = sender.send(work(controller));
        });
        match receiver.recv() {
            Ok(result) => Ok(result?),
            Err(_) => Err("the VMM is shutting down".into()),
        }
    }

    /// Has `work` done.
    pub(super) fn post(&self, work: impl FnOnce(&mut Controller) + Send + 'static) {
        self.0.post(Message::Call(Call(Box::new(work))));
    }
}
