//! The device as its transport sees it.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use triarch_device_core::{Sandbox, ThreadClass, Worker};
use triarch_virtio::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, read_config_bytes};

use crate::connection::Wake;
use crate::engine::{Command, Engine};
use crate::{LinkError, LinkState, LinkStatus, Offer, PageLog, Peer, PeerError};

/// Called when a device's standing with its daemon changed. It must not wait.
pub type Notify = Arc<dyn Fn(&LinkStatus) + Send + Sync>;

/// What the device and its thread have together.
pub(crate) struct Shared {
    pub(crate) id: Arc<str>,
    pub(crate) wake: Wake,
    pub(crate) peer: Arc<Peer>,
    /// Bytes of the configuration space that the driver wrote, by their offsets. Each daemon is told them.
    written: Mutex<BTreeMap<usize, u8>>,
    pub(crate) status: Mutex<LinkStatus>,
    pub(crate) notify: Notify,
}

impl Shared {
    /// What the driver wrote into the configuration space.
    pub(crate) fn written(&self) -> MutexGuard<'_, BTreeMap<usize, u8>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space as the guest reads it, with a daemon that offers this.
    pub(crate) fn config(&self, offer: &Offer) -> Vec<u8> {
        let mut config = self.peer.kind.config(offer);
        for (at, byte) in self.written().iter() {
            if let Some(field) = config.get_mut(*at) {
                *field = *byte;
            }
        }
        config
    }

    /// Notes what the driver writes at byte `at` of the configuration space, as far as there is one.
    fn write(&self, at: usize, data: &[u8]) {
        let length = self.peer.kind.config_length();
        let bytes = (at..length).zip(data.iter().copied());
        self.written().extend(bytes);
        self.wake.ring();
    }
}

/// Tells of a device that the transport owns.
#[derive(Clone)]
pub struct VhostUserHandle(Arc<Shared>);

impl VhostUserHandle {
    /// How the device stands with its daemon.
    pub fn status(&self) -> LinkStatus {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A virtio device that a daemon serves. Its thread is called `{id}_vu`. What kind it is tells its [`Kind`](crate::Kind).
///
/// [`stop_queue`](VirtioDevice::stop_queue) differs from other devices in one thing: with no daemon there may be requests that nobody
/// answered. They are kept, and go to the next daemon when the same queue is started again.
pub struct VhostUser {
    shared: Arc<Shared>,
    features: u64,
    negotiated: Option<u64>,
    running: Vec<bool>,
    commands: Sender<Command>,
    worker: Option<Worker<Engine>>,
}

impl VhostUser {
    /// A device called `id` (`_disk0`). `notify` is called when its standing with the daemon changes.
    ///
    /// # Errors
    /// Its thread cannot be started.
    pub fn new(id: &str, peer: Arc<Peer>, sandbox: &Arc<dyn Sandbox>, notify: Notify) -> Result<Self, PeerError> {
        let features = peer.features();
        let queues = peer.kind.queue_sizes().len();
        let shared = Arc::new(Shared {
            id: id.into(),
            wake: Wake::new().map_err(PeerError::Thread)?,
            peer,
            written: Mutex::default(),
            status: Mutex::new(LinkStatus {
                state: LinkState::Disconnected,
                reason: None,
                direct: false,
                since: SystemTime::now(),
                reconnects: 0,
                resubmitted: 0,
            }),
            notify,
        });
        let (commands, orders) = channel();
        let engine = Engine::new(shared.clone(), orders).map_err(PeerError::Thread)?;
        let name = format!("{id}_vu");
        let worker = Worker::spawn(&name, ThreadClass::VhostUser, sandbox, engine, Engine::run);
        Ok(Self {
            shared,
            features,
            negotiated: None,
            running: vec![false; queues],
            commands,
            worker: Some(worker.map_err(PeerError::Thread)?),
        })
    }

    /// A handle that outlives the device's move into its transport.
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle(self.shared.clone())
    }

    /// Leaves an order. It is lost only when the thread has ended, and then nothing works any more.
    fn order(&self, command: Command) {
        let _ = self.commands.send(command);
        self.shared.wake.ring();
    }

    /// Leaves an order for which the thread leaves all else, and waits until it is done.
    fn urgent<T>(&self, command: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> Command) -> Option<T> {
        let (reply, answer) = sync_channel(1);
        self.shared.wake.hurry();
        self.order(command(reply));
        answer.recv().ok()
    }
}

impl VhostUser {
    /// Has daemons log which pages of the guest they write, from now on until [`stop_log`](Self::stop_log) or until the driver resets the
    /// device; also one that comes in place of this. `None` if there is no driver: nobody writes anything, then. What the VMM itself
    /// writes, also where requests pass through the relay, is marked in guest memory's own bitmap.
    ///
    /// # Errors
    /// The daemon cannot, or there is no memory for the log.
    pub fn start_log(&mut self) -> Result<Option<Arc<PageLog>>, LinkError> {
        self.urgent(|reply| Command::Log(true, reply)).unwrap_or(Ok(None))
    }

    /// Has daemons log nothing any more.
    pub fn stop_log(&mut self) {
        self.urgent(|reply| Command::Log(false, reply));
    }
}

impl VirtioDevice for VhostUser {
    fn id(&self) -> DeviceId {
        self.shared.peer.kind.id()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.shared.peer.kind.queue_sizes()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let known = self.shared.peer.known().clone();
        read_config_bytes(&self.shared.config(&known), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let (features, at) = (self.negotiated.unwrap_or(0), usize::try_from(offset));
        if let Ok(at) = at
            && self.shared.peer.kind.writable(features, at, data)
        {
            self.shared.write(at, data);
        }
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.negotiated.is_some() {
            return Err(ActivateError::Driver("the device is active already"));
        }
        self.negotiated = Some(context.features);
        let peer = &self.shared.peer;
        let first = peer.kind.first_write(&peer.known(), context.features);
        if let Some((at, bytes)) = first {
            self.shared.write(at, &bytes);
        }
        self.order(Command::Activate(Box::new(context)));
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        if self.negotiated.is_none() {
            return Err(ActivateError::Driver("a queue of a device that is not active"));
        }
        match self.running.get_mut(usize::from(queue.index())) {
            Some(running @ false) => *running = true,
            _ => {
                return Err(ActivateError::Driver(
                    "a queue the device does not have, or that runs already",
                ));
            }
        }
        self.order(Command::Start(Box::new(queue)));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let running = self.running.get_mut(usize::from(index))?;
        if !std::mem::replace(running, false) {
            return None;
        }
        self.urgent(|reply| Command::Stop(index, reply)).flatten()
    }

    fn interrupts_changed(&mut self) {
        self.order(Command::Interrupts);
    }

    fn reset(&mut self) {
        if self.negotiated.take().is_some() {
            self.urgent(Command::Reset);
        }
        self.shared.written().clear();
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.shared.wake.hurry();
        self.shared.wake.ring();
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}
