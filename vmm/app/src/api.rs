//! The API server of this process.

use std::sync::Arc;

use anyhow::Context;
use triarch_api::audit::AuditSink;
use triarch_api::server::{Identity, Limits, Listener, Router, Server, Stopper};
use triarch_device_core::{Sandbox, ThreadClass, Worker};
use triarch_machine::Inbox;

use crate::places::ApiSocket;

/// The server on its thread. Dropping it sends what was answered, ends it and removes its socket.
pub(crate) struct Api {
    stopper: Stopper,
    worker: Option<Worker<Server>>,
}

impl Api {
    /// Serves the controller behind `inbox` on `socket`, under the name of `identity`, with a record of each
    /// change to `audit`.
    pub(crate) fn start(
        socket: &ApiSocket,
        identity: &Identity,
        inbox: Inbox,
        audit: Arc<dyn AuditSink>,
        sandbox: &Arc<dyn Sandbox>,
    ) -> anyhow::Result<Self> {
        let listener = match socket {
            ApiSocket::Path(path) => Listener::bind(path),
            ApiSocket::Fd(fd) => Listener::inherit(*fd),
        };
        let listener = listener.context("--api-socket")?;
        let router = Router::new(Arc::new(inbox), identity).with_audit(audit);
        let server = Server::new(listener, Box::new(router), Limits::default())?;
        let stopper = server.stopper();
        let worker = Worker::spawn("http-server", ThreadClass::Http, sandbox, server, |server, _stop| {
            if let Err(error) = server.run() {
                tracing::error!("{:#}", anyhow::Error::from(error));
            }
        });
        let worker = worker.context("cannot start the thread of the API server")?;
        Ok(Self {
            stopper,
            worker: Some(worker),
        })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stopper.stop();
        // The server comes back to this thread, which may remove its socket.
        drop(self.worker.take().and_then(Worker::stop));
    }
}
