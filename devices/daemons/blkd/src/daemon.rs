//! All exports of the process, and the thread that accepts their front ends.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use triarch_api::server::Passage;
use triarch_device_core::{Sandbox, ThreadClass};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Export, ExportError, ExportOptions};
use triarch_daemon::backend::borrow;

/// How long nobody is accepted when there is no descriptor or thread left for it.
const PAUSE: Duration = Duration::from_millis(100);

struct State {
    exports: BTreeMap<String, Arc<Export>>,
    /// The control socket, for the process that goes on in this one's place.
    control: Option<Arc<Passage>>,
    ended: bool,
}

/// The exports.
pub struct Daemon {
    state: Mutex<State>,
    /// The list has changed.
    changed: EventFd,
    sandbox: Arc<dyn Sandbox>,
}

impl Daemon {
    /// A daemon with no export yet, whose threads are made with `sandbox`.
    pub fn new(sandbox: Arc<dyn Sandbox>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                exports: BTreeMap::new(),
                control: None,
                ended: false,
            }),
            changed: EventFd::new(EFD_NONBLOCK)?,
            sandbox,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        // Fails only when it is readable already.
        let _ = self.changed.write(1);
    }

    /// Adds an export.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn add(&self, options: ExportOptions) -> Result<(), ExportError> {
        if self.state().exports.contains_key(&options.name) {
            return Err(ExportError::Name(options.name));
        }
        self.put(Export::open(options)?);
        Ok(())
    }

    /// Adds an export that was taken over.
    pub fn put(&self, export: Arc<Export>) {
        self.state().exports.insert(export.name().to_owned(), export);
        self.tell();
    }

    /// The control socket is this one.
    pub fn set_control(&self, passage: Passage) {
        self.state().control = Some(Arc::new(passage));
    }

    pub(crate) fn control(&self) -> Option<Arc<Passage>> {
        self.state().control.clone()
    }

    /// Ends all connections once what is in flight is finished; front ends wait at the sockets.
    pub(crate) fn pause(&self) {
        let exports = self.exports();
        exports.iter().for_each(|export| export.stop());
        self.tell();
        exports.iter().for_each(|export| export.wait());
    }

    /// Goes on after a [`pause`](Self::pause).
    pub(crate) fn resume(&self) {
        self.exports().iter().for_each(|export| export.resume());
        self.tell();
    }

    /// The sockets belong to another process now.
    pub(crate) fn leave(&self) {
        self.exports().iter().for_each(|export| export.listener().leave());
        if let Some(control) = self.control() {
            control.leave();
        }
    }

    /// Every export, by name.
    pub fn exports(&self) -> Vec<Arc<Export>> {
        self.state().exports.values().cloned().collect()
    }

    /// The export called `name`.
    pub fn export(&self, name: &str) -> Option<Arc<Export>> {
        self.state().exports.get(name).cloned()
    }

    /// Takes an export off the list and ends it. Its front end is gone once [`Export::wait`] returns.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        let export = self.state().exports.remove(name)?;
        export.stop();
        self.tell();
        Some(export)
    }

    /// Makes the thread that accepts front ends. It begins when `begin` says so, and ends at once when that is dropped.
    pub fn prepare(self: &Arc<Self>, begin: Receiver<()>) -> io::Result<JoinHandle<()>> {
        let (daemon, confine) = (self.clone(), self.sandbox.clone());
        let body = move || {
            if let Err(error) = confine.enter(ThreadClass::BackEnd) {
                tracing::error!("cannot confine a thread: {error}");
                std::process::abort();
            }
            if begin.recv().is_ok() {
                daemon.accept();
            }
        };
        self.sandbox.spawn("accept".to_owned(), Box::new(body))
    }

    /// Ends all exports, and the thread that accepts. What is in flight is finished when this returns.
    pub fn end(&self) {
        let exports = {
            let mut state = self.state();
            state.ended = true;
            std::mem::take(&mut state.exports)
        };
        self.tell();
        exports.values().for_each(|export| export.stop());
        exports.values().for_each(|export| export.wait());
    }

    fn accept(&self) {
        loop {
            let exports = {
                let state = self.state();
                if state.ended {
                    return;
                }
                let _ = self.changed.read();
                let running = state.exports.values().filter(|export| !export.stopped());
                running.cloned().collect::<Vec<_>>()
            };
            let mut fds: Vec<_> = exports
                .iter()
                .map(|e| PollFd::from_borrowed_fd(e.as_fd(), PollFlags::IN))
                .collect();
            fds.push(PollFd::from_borrowed_fd(borrow(&self.changed), PollFlags::IN));
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!("cannot wait for front ends: {error}");
                    std::thread::sleep(PAUSE);
                }
            }
            for (export, fd) in exports.iter().zip(&fds) {
                if fd.revents().is_empty() {
                    continue;
                }
                if let Err(error) = export.accept(&self.sandbox) {
                    tracing::warn!(export = export.name(), "cannot accept a front end: {error}");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
}
