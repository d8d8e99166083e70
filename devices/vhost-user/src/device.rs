//! The device as its transport sees it.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use triarch_device_core::{Sandbox, ThreadClass, Worker};
use triarch_memory::{GuestMemory, GuestRegion};
use triarch_vhost_protocol::MAX_CONFIG;
use triarch_virtio::net::NetStateV1;
use triarch_virtio::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, read_config_bytes};

use crate::connection::Wake;
use crate::engine::{Command, Engine, Move, Remap};
use crate::room::with_rooms;
use crate::{Kind, LinkError, LinkState, LinkStatus, Offer, Own, PageLog, Peer, PeerError};

/// How long a driver that reads or writes the configuration space waits for the daemon.
const ACCESS: Duration = Duration::from_secs(1);

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
    /// Where memory comes and goes in parts.
    rooms: OnceLock<Vec<Arc<GuestRegion>>>,
    pub(crate) notify: Notify,
}

impl Shared {
    /// What the driver wrote into the configuration space.
    pub(crate) fn written(&self) -> MutexGuard<'_, BTreeMap<usize, u8>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's memory as the daemon is told of it.
    pub(crate) fn whole(&self, memory: &GuestMemory) -> GuestMemory {
        with_rooms(memory, self.rooms.get().map_or(&[], Vec::as_slice))
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
pub struct VhostUserHandle(Arc<Shared>, Sender<Command>);

impl VhostUserHandle {
    /// How the device stands with its daemon.
    pub fn status(&self) -> LinkStatus {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the daemon's configuration space, as the guest knows it, `is_so`, and no longer than `patience`. Returns whether it is.
    pub fn wait_config(&self, patience: Duration, is_so: impl Fn(&[u8]) -> bool) -> bool {
        self.0.peer.wait_known(patience, is_so)
    }

    /// Has daemons log which pages of the guest they write in `log`, from now on until [`stop_log`](Self::stop_log); also one that comes in
    /// place of this, and after a reset by the driver. What the VMM itself writes, also where requests pass through the relay, is marked
    /// in guest memory's own bitmap.
    ///
    /// # Errors
    /// The daemon cannot.
    pub fn start_log(&self, log: &Arc<PageLog>) -> Result<(), LinkError> {
        // Not urgent: that would end what is being told to the daemon, and with it the connection.
        self.ask(|reply| Command::Log(Some(log.clone()), reply))
            .unwrap_or(Ok(()))
    }

    /// Has daemons log nothing any more. It does not wait for that: nobody reads the log any more.
    pub fn stop_log(&self) {
        let (reply, _) = sync_channel(1);
        self.order(Command::Log(None, reply));
    }

    /// Whether the guest can move to another process, with another daemon; if not, why.
    ///
    /// # Errors
    /// What the daemon lacks.
    pub fn check_movable(&self) -> Result<(), LinkError> {
        let status = self.status();
        let unfit = |text: &str| Err(LinkError::Unfit(text.to_owned()));
        match status.state == LinkState::Connected && !status.logs {
            true => unfit("it cannot log which pages it writes (LOG_SHMFD, VHOST_F_LOG_ALL), which migration needs"),
            false => self.check_state(),
        }
    }

    /// The same if nobody has to know which pages the daemon writes.
    ///
    /// # Errors
    /// What the daemon lacks.
    pub fn check_state(&self) -> Result<(), LinkError> {
        let status = self.status();
        let unfit = |text: &str| Err(LinkError::Unfit(text.to_owned()));
        let connected = status.state == LinkState::Connected;
        // Disks and interfaces have no state in their daemons.
        let stateful = !matches!(self.0.peer.kind.id(), DeviceId::Block | DeviceId::Net);
        if stateful && !connected {
            unfit("there is none, and nobody else has its state")
        } else if stateful && !status.hands_over {
            unfit("it cannot hand over its state (protocol feature DEVICE_STATE)")
        } else {
            Ok(())
        }
    }

    /// What guests were shown of the daemon, for a process that goes on with the guest.
    pub fn shown(&self) -> Offer {
        self.0.peer.shown()
    }

    /// Has the daemon let go of what only one may have, as the lock of an image: another process's daemon is to take it. No queue may run.
    ///
    /// # Errors
    /// It does not, or cannot be reached.
    pub fn let_go(&self) -> Result<(), LinkError> {
        self.ask(|reply| Command::Move(Move::LetGo, reply)).unwrap_or(Ok(()))
    }

    /// Has the daemon take what only one may have, after [`let_go`](Self::let_go) of this or another one.
    ///
    /// # Errors
    /// Somebody else has it, or there is no daemon.
    pub fn take(&self) -> Result<(), LinkError> {
        self.ask(|reply| Command::Move(Move::Take, reply)).unwrap_or(Ok(()))
    }

    /// Tells the network where the guest is now, if it is an interface; whether it is. It does not wait for that.
    pub fn announce(&self) -> bool {
        let (reply, _) = sync_channel(1);
        let is_interface = self.0.peer.kind.id() == DeviceId::Net;
        if is_interface {
            self.order(Command::Move(Move::Announce, reply));
        }
        is_interface
    }

    /// Leaves an order, as [`VhostUser::order`].
    fn order(&self, command: Command) {
        let _ = self.1.send(command);
        self.0.wake.ring();
    }

    /// Leaves an order and waits for what comes of it; `None` if the device is gone.
    fn ask<T>(&self, command: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> Command) -> Option<T> {
        let (reply, answer) = sync_channel(1);
        self.order(command(reply));
        answer.recv().ok()
    }

    /// Has the daemon told which memory the guest has now, as its [`DeviceContext`] shows it.
    pub fn remap(&self) -> Remap {
        let (reply, answer) = sync_channel(1);
        // Not urgent: that would end what is being told to the daemon, and with it the connection.
        self.order(Command::Memory(reply));
        Remap::new(answer)
    }
}

/// A virtio device that a daemon serves. Its thread is called `{id}_vu`. What kind it is tells its [`Kind`](crate::Kind).
///
/// [`stop_queue`](VirtioDevice::stop_queue) differs from other devices in one thing: with no daemon there may be requests that nobody
/// answered. They are kept, and go to the next daemon when the same queue is started again.
pub struct VhostUser {
    shared: Arc<Shared>,
    features: u64,
    sizes: Vec<u16>,
    context: Option<DeviceContext>,
    /// Queues that the daemon serves, and whether they run.
    running: Vec<bool>,
    /// The queue that is served here, while it runs.
    own: Option<Own>,
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
        let mut sizes = peer.kind.queue_sizes().to_vec();
        sizes.extend(peer.kind.own_queue_size());
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
                logs: false,
                hands_over: false,
            }),
            rooms: OnceLock::new(),
            notify,
        });
        let (commands, orders) = channel();
        let engine = Engine::new(shared.clone()).map_err(PeerError::Thread)?;
        let name = format!("{id}_vu");
        let worker = Worker::spawn(&name, ThreadClass::VhostUser, sandbox, engine, move |engine, stop| {
            engine.run(&orders, stop);
        });
        Ok(Self {
            shared,
            features,
            sizes,
            context: None,
            running: vec![false; queues],
            own: None,
            commands,
            worker: Some(worker.map_err(PeerError::Thread)?),
        })
    }

    /// Shows daemons all of `rooms`, where memory of the guest comes and goes in parts. Only before the driver comes, and once.
    pub fn show_rooms(&self, rooms: Vec<Arc<GuestRegion>>) {
        // A second time would be a fault of ours, and changes nothing.
        let _ = self.shared.rooms.set(rooms);
    }

    /// A handle that outlives the device's move into its transport.
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle(self.shared.clone(), self.commands.clone())
    }

    /// What the VMM itself keeps of an interface for its driver, for a snapshot.
    pub fn port(&self) -> Option<NetStateV1> {
        self.kind().port()
    }

    /// Makes the next activation continue from that.
    pub fn restore_port(&self, state: NetStateV1) {
        self.kind().restore_port(state);
    }

    /// What the driver wrote into the configuration space, for a snapshot: bytes by their offsets. Where the daemon alone knows it, nothing.
    pub fn written(&self) -> BTreeMap<usize, u8> {
        self.shared.written().clone()
    }

    /// Has the driver's daemons told that, after `activate` and before queues start. What a driver cannot write is left out.
    pub fn write_again(&mut self, written: &BTreeMap<usize, u8>) {
        for (at, byte) in written {
            self.write_config(*at as u64, &[*byte]);
        }
    }

    fn kind(&self) -> &dyn Kind {
        &*self.shared.peer.kind
    }

    /// Reads the configuration space where only the daemon knows it. Without one, or one that answers late, it reads as zero.
    fn ask_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let place = usize::try_from(offset).ok();
        let end = place.and_then(|at| at.checked_add(data.len()));
        // Nothing is behind that, and some daemons end the connection over such a question.
        let end = end.filter(|end| *end <= MAX_CONFIG as usize);
        let (Some(at), Some(end)) = (place, end) else {
            return;
        };
        let (reply, answer) = sync_channel(1);
        self.order(Command::Read(end, reply));
        let bytes = answer.recv_timeout(ACCESS).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(bytes.into_iter().skip(at)) {
            *to = from;
        }
    }

    /// Leaves an order. It is lost only when the thread has ended, and then nothing works any more.
    pub(crate) fn order(&self, command: Command) {
        let _ = self.commands.send(command);
        self.shared.wake.ring();
    }

    /// Leaves an order for which the thread leaves all else, and waits until it is done.
    pub(crate) fn urgent<T>(&self, command: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> Command) -> Option<T> {
        let (reply, answer) = sync_channel(1);
        self.shared.wake.hurry();
        self.order(command(reply));
        answer.recv().ok()
    }
}

impl VirtioDevice for VhostUser {
    fn id(&self) -> DeviceId {
        self.shared.peer.kind.id()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if self.kind().asks() {
            return self.ask_config(offset, data);
        }
        let known = self.shared.peer.known().clone();
        read_config_bytes(&self.shared.config(&known), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let features = self.context.as_ref().map_or(0, |context| context.features);
        let Ok(at) = usize::try_from(offset) else {
            return;
        };
        if !self.kind().writable(features, at, data) {
            return;
        }
        if !self.kind().asks() {
            return self.shared.write(at, data);
        }
        let (reply, answer) = sync_channel(1);
        // Places that are written are below 4 GiB.
        self.order(Command::Write(at as u32, data.to_vec(), reply));
        // A daemon that is slower is not waited for; it gets it all the same.
        let _ = answer.recv_timeout(ACCESS);
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the device is active already"));
        }
        self.context = Some(context.clone());
        self.kind().attach(&context, self.shared.wake.event());
        let peer = &self.shared.peer;
        let first = peer.kind.first_write(&peer.known(), context.features);
        if let Some((at, bytes)) = first {
            self.shared.write(at, &bytes);
        }
        self.order(Command::Activate(Box::new(context)));
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver("a queue of a device that is not active"));
        };
        if self.kind().own_queue(context.features) == Some(queue.index()) {
            if self.own.is_some() {
                return Err(ActivateError::Driver("a queue that runs already"));
            }
            let served = self.kind().serve(&self.shared.id, queue, &context.sandbox);
            let what = "the thread of a queue";
            self.own = Some(served.map_err(|source| ActivateError::Host { what, source })?);
            return Ok(());
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
        let features = self.context.as_ref()?.features;
        if self.kind().own_queue(features) == Some(index) {
            return self.own.take()?();
        }
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
        self.own.take().map(|stop| stop());
        if self.context.take().is_some() {
            self.urgent(Command::Reset);
            self.kind().detach();
        }
        self.shared.written().clear();
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.own.take().map(|stop| stop());
        self.kind().detach();
        self.shared.wake.hurry();
        self.shared.wake.ring();
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}
