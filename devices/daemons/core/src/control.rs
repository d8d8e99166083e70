//! The control socket: HTTP and JSON, served by the same code as the VMM's API.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use thiserror::Error;
use triarch_api::server::{Limits, Listener, Server, ServerError, Service, Stopper};
use triarch_device_core::{Sandbox, ThreadClass};

/// Why there is no control socket.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The server could not be made.
    #[error("cannot serve the control socket")]
    Server(#[from] ServerError),
    /// Its thread could not be made.
    #[error("cannot start the thread of the control socket")]
    Thread(#[source] io::Error),
}

/// A control socket that is served. Dropped, it sends what it has to send and ends.
pub struct Control {
    stopper: Stopper,
    /// The thread waits for it.
    begin: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    /// The server comes back here: removing its socket takes more than its thread may do.
    ended: Receiver<Server>,
}

impl Control {
    /// Serves `service` on `listener`, on a thread of class [`ThreadClass::Http`].
    pub fn start(
        listener: Listener,
        service: Box<dyn Service>,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Self, ControlError> {
        let mut control = Self::prepare(listener, service, sandbox)?;
        control.begin();
        Ok(control)
    }

    /// Makes all that [`start`](Self::start) does, and serves nobody before [`begin`](Self::begin).
    pub fn prepare(
        listener: Listener,
        service: Box<dyn Service>,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Self, ControlError> {
        let mut server = Server::new(listener, service, Limits::default())?;
        let stopper = server.stopper();
        let confine = sandbox.clone();
        let (give_back, ended) = sync_channel(1);
        let (begin, begun) = sync_channel(1);
        let body = move || {
            if let Err(error) = confine.enter(ThreadClass::Http) {
                tracing::error!("cannot confine the thread of the control socket: {error}");
                std::process::abort();
            }
            // It may also end before it began.
            if begun.recv().is_ok()
                && let Err(error) = server.run()
            {
                tracing::error!("the control socket is not served any more: {error}");
            }
            // Nobody waits when the process ends without dropping this.
            let _ = give_back.send(server);
        };
        let thread = sandbox
            .spawn("control".to_owned(), Box::new(body))
            .map_err(ControlError::Thread)?;
        Ok(Self {
            stopper,
            begin: Some(begin),
            thread: Some(thread),
            ended,
        })
    }

    /// Begins to serve.
    pub fn begin(&mut self) {
        if let Some(begin) = self.begin.take() {
            // There is room, and the thread waits for it.
            let _ = begin.send(());
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stopper.stop();
        self.begin = None;
        drop(self.ended.recv());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
