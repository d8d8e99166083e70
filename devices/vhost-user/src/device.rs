//! The disk as its transport sees it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use triarch_device_core::{Sandbox, ThreadClass, Worker};
use triarch_virtio::{
    ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, block_feature, read_config_bytes,
};

use crate::connection::Wake;
use crate::engine::{Command, Engine};
use crate::offer::WRITEBACK;
use crate::peer::DiskPeer;
use crate::{LinkState, LinkStatus, PeerError};

/// Called when a device's standing with its daemon changed. It must not wait.
pub type Notify = Arc<dyn Fn(&LinkStatus) + Send + Sync>;

/// What the device and its thread have together.
pub(crate) struct Shared {
    pub(crate) id: Arc<str>,
    pub(crate) wake: Wake,
    pub(crate) peer: Arc<DiskPeer>,
    /// Whether the driver lets writes stay in the cache.
    pub(crate) writeback: AtomicBool,
    pub(crate) status: Mutex<LinkStatus>,
    pub(crate) notify: Notify,
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

/// A virtio block device (virtio 1.2, 5.2) that a daemon serves. Its thread is called `{id}_vu`.
///
/// [`stop_queue`](VirtioDevice::stop_queue) differs from other devices in one thing: with no daemon there may be requests that nobody
/// answered. They are kept, and go to the next daemon when the same queue is started again.
pub struct VhostUserBlock {
    shared: Arc<Shared>,
    sizes: Vec<u16>,
    features: u64,
    negotiated: Option<u64>,
    running: Vec<bool>,
    commands: Sender<Command>,
    worker: Option<Worker<Engine>>,
}

impl VhostUserBlock {
    /// A device called `id` (`_disk0`). `notify` is called when its standing with the daemon changes.
    ///
    /// # Errors
    /// Its thread cannot be started.
    pub fn new(id: &str, peer: Arc<DiskPeer>, sandbox: &Arc<dyn Sandbox>, notify: Notify) -> Result<Self, PeerError> {
        let (features, writeback) = {
            let known = peer.known();
            (known.guest_features(&peer.demand), known.writeback())
        };
        let demand = peer.demand;
        let shared = Arc::new(Shared {
            id: id.into(),
            wake: Wake::new().map_err(PeerError::Thread)?,
            peer,
            writeback: AtomicBool::new(writeback),
            status: Mutex::new(LinkStatus {
                state: LinkState::Disconnected,
                reason: None,
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
            sizes: vec![demand.queue_size; demand.queues.into()],
            features,
            negotiated: None,
            running: vec![false; demand.queues.into()],
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

impl VirtioDevice for VhostUserBlock {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let peer = &self.shared.peer;
        let mut config = peer.known().guest_config(&peer.demand);
        if let Some(byte) = config.get_mut(WRITEBACK) {
            *byte = u8::from(self.shared.writeback.load(Relaxed));
        }
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let negotiated = self.negotiated.unwrap_or(0);
        if let (true, [value], true) = (
            offset == WRITEBACK as u64,
            data,
            negotiated & block_feature::CONFIG_WCE != 0,
        ) {
            self.shared.writeback.store(value & 1 != 0, Relaxed);
            self.shared.wake.ring();
        }
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.negotiated.is_some() {
            return Err(ActivateError::Driver("the disk is active already"));
        }
        self.negotiated = Some(context.features);
        // Without a way to flush or to choose, every write has to be durable (virtio 1.2, 5.2.6.2).
        if context.features & (block_feature::FLUSH | block_feature::CONFIG_WCE) == 0 {
            self.shared.writeback.store(false, Relaxed);
        }
        self.order(Command::Activate(Box::new(context)));
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        if self.negotiated.is_none() {
            return Err(ActivateError::Driver("a queue of a disk that is not active"));
        }
        match self.running.get_mut(usize::from(queue.index())) {
            Some(running @ false) => *running = true,
            _ => {
                return Err(ActivateError::Driver(
                    "a queue the disk does not have, or that runs already",
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

    fn reset(&mut self) {
        if self.negotiated.take().is_some() {
            self.urgent(Command::Reset);
        }
        let default = self.shared.peer.known().writeback();
        self.shared.writeback.store(default, Relaxed);
    }
}

impl Drop for VhostUserBlock {
    fn drop(&mut self) {
        self.shared.wake.hurry();
        self.shared.wake.ring();
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}
