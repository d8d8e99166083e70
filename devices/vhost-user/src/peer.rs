//! A daemon as the configuration of a VM names it. It outlives the guest's resets, and what guests were told of it stays true.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use triarch_device_core::{Sandbox, ThreadClass, Worker};

use crate::connection::Wake;
use crate::kind::{self, Kind, Offer};
use crate::session::{Session, Terms};
use crate::{DataPath, Endpoint, LinkError, OnDisconnect};

/// How long until the next try, at the start.
const RETRY: Duration = Duration::from_millis(50);

/// Where a daemon is, and what happens without it.
#[derive(Clone)]
pub struct PeerOptions {
    /// Where it is met.
    pub endpoint: Endpoint,
    /// What happens to requests while there is no daemon.
    pub on_disconnect: OnDisconnect,
    /// Who works on the guest's rings.
    pub data_path: DataPath,
}

/// Why no daemon could be had for a new guest.
#[derive(Debug, Error)]
pub enum PeerError {
    /// None that answers.
    #[error("no daemon serves it")]
    Link(#[source] LinkError),
    /// A resource of the host.
    #[error("cannot start the thread that talks to its daemon")]
    Thread(#[source] std::io::Error),
}

/// The daemon of a device.
pub struct Peer {
    pub(crate) options: PeerOptions,
    pub(crate) kind: Arc<dyn Kind>,
    /// What guests know of it.
    known: Mutex<Offer>,
    /// Rung when that changes.
    learnt: Condvar,
    /// What only one daemon may have, another process's has: this one's must not take it.
    away: AtomicBool,
    /// The connection it was asked on, for the first device.
    first: Mutex<Option<Session>>,
}

impl Peer {
    /// Asks the daemon what it offers; waits some seconds for one that is just starting. `id` names the device. A guest that comes from
    /// another process was `shown` another daemon.
    ///
    /// # Errors
    /// There is none, or it is not one that can serve a device of this kind, or with which that guest could go on.
    pub fn open(
        id: &str,
        options: PeerOptions,
        kind: Arc<dyn Kind>,
        shown: Option<Offer>,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Arc<Self>, PeerError> {
        let wake = Arc::new(Wake::new().map_err(PeerError::Thread)?);
        let (done, ended) = sync_channel(1);
        let (endpoint, doorbell, wanted) = (options.endpoint.clone(), wake.clone(), kind.clone());
        let (data_path, patience) = (options.data_path, endpoint.patience());
        let before = shown.clone();
        let ask = move |answer: &mut Option<Result<Session, LinkError>>, _: &_| {
            let deadline = Instant::now() + patience;
            let mut last = LinkError::Silent("the first questions");
            *answer = Some(loop {
                let terms = Terms {
                    kind: &*wanted,
                    data_path,
                    shown: before.as_ref().map_or(0, |offer| kind::features(&*wanted, offer)),
                };
                let connection = endpoint.connect();
                let session = connection.and_then(|connection| Session::open(connection, &terms, &doorbell));
                let fits = |offer: &Offer| match &before {
                    Some(before) => kind::continues(&*wanted, before, offer),
                    None => kind::check(&*wanted, offer),
                };
                match session.and_then(|s| fits(&s.offer).map(|()| s)) {
                    Err(LinkError::Interrupted) => break Err(last),
                    // Waiting makes none of these another one.
                    session @ (Ok(_) | Err(LinkError::Unfit(_) | LinkError::Nonsense(_))) => break session,
                    Err(error) if Instant::now() >= deadline => break Err(error),
                    Err(error) => last = error,
                }
                thread::sleep(RETRY);
            });
            // Whoever waits may have given up.
            let _ = done.send(());
        };
        let name = format!("{id}_vu");
        let worker = Worker::spawn(&name, ThreadClass::VhostUser, sandbox, None, ask).map_err(PeerError::Thread)?;
        if ended.recv_timeout(patience + 2 * RETRY).is_err() {
            // A daemon that takes connections and does not answer.
            wake.hurry();
            wake.ring();
        }
        let gone = || Err(LinkError::Silent("the first questions"));
        let session = worker.stop().flatten().unwrap_or_else(gone).map_err(PeerError::Link)?;
        let away = AtomicBool::new(shown.is_some());
        let known = shown.unwrap_or_else(|| session.offer.clone());
        kind.adopt(&known);
        Ok(Arc::new(Self {
            options,
            kind,
            known: Mutex::new(known),
            learnt: Condvar::new(),
            away,
            first: Mutex::new(Some(session)),
        }))
    }

    /// What the next daemon is asked for.
    pub(crate) fn terms(&self) -> Terms<'_> {
        Terms {
            kind: &*self.kind,
            data_path: self.options.data_path,
            shown: self.features(),
        }
    }

    /// Features a guest is offered.
    pub(crate) fn features(&self) -> u64 {
        kind::features(&*self.kind, &self.known())
    }

    /// Whether what only one daemon may have is with another process's.
    pub(crate) fn is_away(&self) -> bool {
        self.away.load(Ordering::Acquire)
    }

    pub(crate) fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::Release);
    }

    /// The guest that went to another process, or was to come from one, does not: the next guest's daemon takes what it needs.
    pub fn come_back(&self) {
        self.set_away(false);
    }

    /// What guests were shown.
    pub(crate) fn shown(&self) -> Offer {
        let known = self.known();
        Offer {
            features: kind::features(&*self.kind, &known),
            queues: known.queues,
            config: self.kind.config(&known),
        }
    }

    /// Whether its guests can go on with a daemon that offers this; if not, why.
    pub(crate) fn continues(&self, offer: &Offer) -> Result<(), LinkError> {
        kind::continues(&*self.kind, &self.known(), offer)
    }

    /// What guests know of it.
    pub(crate) fn known(&self) -> MutexGuard<'_, Offer> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on guests know this configuration space.
    pub(crate) fn learn(&self, config: &Vec<u8>) {
        self.known().config.clone_from(config);
        self.learnt.notify_all();
    }

    /// Waits until guests know a configuration space that `is_so`, no longer than `patience`. Returns whether they do.
    pub(crate) fn wait_known(&self, patience: Duration, is_so: impl Fn(&[u8]) -> bool) -> bool {
        let other = |known: &mut Offer| !is_so(&known.config);
        let waited = self.learnt.wait_timeout_while(self.known(), patience, other);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Whether nobody took the connection yet that it was asked on.
    pub(crate) fn has_first(&self) -> bool {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The connection it was asked on, once.
    pub(crate) fn take_first(&self) -> Option<Session> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
