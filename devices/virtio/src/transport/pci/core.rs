//! The device and its queues: status, start, stop, pause and reset (virtio 1.2, 2.1, 2.6 and 3.1).

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use triarch_device_core::{IoAddress, IoEvents, RateLimit, Sandbox};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::{Interrupts, NO_VECTOR};
use super::{DeviceEvent, layout, status};
use crate::{
    DeviceContext, DeviceMemory, QueueLayout, QueueStateV1, VirtQueue, VirtioDevice, VirtioInterrupt, feature,
};

/// What a device is attached to.
pub(super) struct Surroundings {
    pub(super) memory: DeviceMemory,
    pub(super) io_events: Arc<dyn IoEvents>,
    pub(super) sandbox: Arc<dyn Sandbox>,
}

/// One queue as its registers and the device's work on it stand.
pub(super) struct QueueSlot {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    /// Signalled by the driver's notifications.
    kick: Option<Arc<EventFd>>,
    /// GPA the kernel watches for `kick`.
    doorbell: Option<u64>,
    /// The device works on it, or would if it were not paused.
    started: bool,
    /// The queue itself while the device is paused.
    held: Option<VirtQueue>,
}

impl QueueSlot {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            kick: None,
            doorbell: None,
            started: false,
            held: None,
        }
    }

    /// How far a started queue was worked off; only known while paused.
    pub(super) fn progress(&self) -> Option<QueueStateV1> {
        self.held.as_ref().map(VirtQueue::state)
    }
}

/// Everything about a device that only one thread at a time may touch.
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) interrupts: Arc<Interrupts>,
    surroundings: Surroundings,
    pub(super) queues: Vec<QueueSlot>,
    pub(super) driver_features: u64,
    /// The driver acknowledged a feature past bit 63: nothing offers those.
    pub(super) foreign_features: bool,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    active: bool,
    pub(super) paused: bool,
    removed: bool,
    /// GPA of the BAR while the guest can reach it.
    bar: Option<u64>,
    log: RateLimit,
}

impl Core {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        interrupts: Arc<Interrupts>,
        surroundings: Surroundings,
        paused: bool,
    ) -> Self {
        let queues = device.queue_sizes().iter().map(|max| QueueSlot::new(*max)).collect();
        Self {
            device,
            interrupts,
            surroundings,
            queues,
            driver_features: 0,
            foreign_features: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            active: false,
            paused,
            removed: false,
            bar: None,
            log: RateLimit::default(),
        }
    }

    /// The features that the driver can choose from. One that does not take ACCESS_PLATFORM is translated all the same: what keeps devices
    /// apart is not for a driver to choose.
    pub(super) fn offered(&self) -> u64 {
        let behind = self.surroundings.memory.endpoint().is_some();
        self.device.features() | if behind { feature::ACCESS_PLATFORM } else { 0 }
    }

    /// The device is at the PCI requester id `requester` from now on.
    pub(super) fn place(&self, requester: u32) {
        if let Some(endpoint) = self.surroundings.memory.endpoint() {
            // Its memory is reached by its queues alone, which nothing has to follow.
            let _ = endpoint.place(requester);
        }
    }

    /// Queues that the device works on, or would if it were not paused.
    pub(super) fn started(&self) -> Vec<u16> {
        let started = |(index, queue): (u16, &QueueSlot)| queue.started.then_some(index);
        (0u16..).zip(&self.queues).filter_map(started).collect()
    }

    /// Whether the driver may still choose features.
    pub(super) fn negotiating(&self) -> bool {
        self.interrupts.status() & status::FEATURES_OK == 0
    }

    /// The driver writes device_status. What the state machine does not allow leaves it as it is, and the driver sees that when
    /// it reads the register back.
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            let active = self.active;
            self.reset();
            if active {
                self.interrupts.tell(DeviceEvent::Reset);
            }
            return;
        }
        if self.removed {
            return;
        }
        let old = self.interrupts.status();
        let new = value & !old & status::BY_DRIVER;
        let missing = old & !value & status::BY_DRIVER;
        if missing != 0 {
            self.warn(&format_args!(
                "the driver tried to clear status bits {missing:#x} without a reset"
            ));
            return;
        }
        self.interrupts.add_status(new & status::ALWAYS);
        if new & status::FEATURES_OK != 0 {
            if self.features_are_ok() {
                self.interrupts.add_status(status::FEATURES_OK);
            } else {
                self.warn(&"the driver's choice of features was refused");
            }
        }
        if new & status::DRIVER_OK != 0 {
            if old & status::FEATURES_OK != 0 {
                self.interrupts.add_status(status::DRIVER_OK);
                self.activate();
            } else {
                self.warn(&"the driver set DRIVER_OK before the features were agreed on");
            }
        }
    }

    fn features_are_ok(&self) -> bool {
        let greeted = status::ACKNOWLEDGE | status::DRIVER;
        self.interrupts.status() & greeted == greeted
            && !self.foreign_features
            && self.driver_features & !self.offered() == 0
            && self.driver_features & feature::VERSION_1 != 0
    }

    /// Activates an idle device and starts the queues that are enabled.
    pub(super) fn activate(&mut self) {
        let context = DeviceContext {
            features: self.driver_features,
            memory: self.surroundings.memory.ram().clone(),
            interrupt: self.interrupts.clone(),
            sandbox: self.surroundings.sandbox.clone(),
        };
        if let Err(error) = self.device.activate(context) {
            self.broken(&error);
            return;
        }
        self.active = true;
        for index in 0..self.queues.len() as u16 {
            if self.queues[usize::from(index)].enabled && !self.start(index, None) {
                return;
            }
        }
        self.interrupts.tell(DeviceEvent::Activated);
    }

    /// The driver sets queue_enable of the selected queue.
    pub(super) fn enable(&mut self, index: u16) {
        let Some(queue) = self.queues.get_mut(usize::from(index)).filter(|q| !q.enabled) else {
            return;
        };
        queue.enabled = true;
        if self.active {
            self.start(index, None);
        }
    }

    /// Starts an enabled queue, from `progress` on when it was worked on before; whether that worked. It is only held while
    /// paused.
    pub(super) fn start(&mut self, index: u16, progress: Option<&QueueStateV1>) -> bool {
        match self.build(index, progress) {
            Ok(queue) => self.run(queue),
            Err(error) => {
                self.broken(&error);
                false
            }
        }
    }

    fn build(&mut self, index: u16, progress: Option<&QueueStateV1>) -> Result<VirtQueue, Box<dyn std::error::Error>> {
        let slot = self
            .queues
            .get_mut(usize::from(index))
            .ok_or(io::ErrorKind::InvalidInput)
            .map_err(io::Error::from)?;
        let kick = match &slot.kick {
            Some(kick) => kick.clone(),
            None => slot.kick.insert(Arc::new(EventFd::new(EFD_NONBLOCK)?)).clone(),
        };
        let layout = QueueLayout {
            index,
            size: slot.size,
            max_size: slot.max_size,
            descriptors: slot.descriptors,
            driver: slot.driver,
            device: slot.device,
            event_idx: self.driver_features & feature::EVENT_IDX != 0,
        };
        let interrupt: Arc<dyn VirtioInterrupt> = self.interrupts.clone();
        let mut queue = VirtQueue::new(&layout, self.surroundings.memory.clone(), kick, interrupt)?;
        if let Some(progress) = progress {
            queue.restore(progress);
        }
        Ok(queue)
    }

    /// Hands a queue to the device, or keeps it while paused.
    fn run(&mut self, queue: VirtQueue) -> bool {
        let index = queue.index();
        let Some(slot) = self.queues.get_mut(usize::from(index)) else {
            return false;
        };
        slot.started = true;
        if self.paused {
            slot.held = Some(queue);
        } else if let Err(error) = self.device.start_queue(queue) {
            slot.started = false;
            self.broken(&error);
            return false;
        }
        self.attach_doorbell(index);
        true
    }

    /// The driver sets the vector of a queue.
    pub(super) fn set_vector(&mut self, index: u16, vector: u16) {
        self.interrupts.set_queue_vector(index, vector);
        if self.queues.get(usize::from(index)).is_some_and(|queue| queue.started) {
            self.interrupts_changed();
        }
    }

    /// The driver changed the vector of a queue that runs, or switched MSI-X on or off.
    pub(super) fn interrupts_changed(&mut self) {
        if self.active {
            self.device.interrupts_changed();
        }
    }

    /// The driver resets one queue (VIRTIO_F_RING_RESET): done when this returns.
    pub(super) fn reset_queue(&mut self, index: u16) {
        let negotiated = self.driver_features & feature::RING_RESET != 0 && !self.negotiating();
        if negotiated && self.queues.get(usize::from(index)).is_some_and(|q| q.enabled) {
            self.drop_queue(index);
            self.interrupts.set_queue_vector(index, NO_VECTOR);
        }
    }

    /// Stops a queue, forgets what was in it and puts its registers back.
    fn drop_queue(&mut self, index: u16) {
        self.detach_doorbell(index);
        let slot = &mut self.queues[usize::from(index)];
        if slot.started && slot.held.is_none() {
            self.device.stop_queue(index);
        }
        *slot = QueueSlot::new(slot.max_size);
    }

    /// Stops everything and forgets the driver; done when this returns.
    pub(super) fn reset(&mut self) {
        for index in 0..self.queues.len() as u16 {
            self.drop_queue(index);
        }
        // Also after an activation that failed half-way.
        self.device.reset();
        self.active = false;
        self.driver_features = 0;
        self.foreign_features = false;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.interrupts.reset();
    }

    /// Nothing the guest does reaches the device any more.
    pub(super) fn remove(&mut self) {
        self.removed = true;
        self.reset();
        if let Some(endpoint) = self.surroundings.memory.endpoint() {
            endpoint.remove();
        }
    }

    /// Lets the device finish what it has in flight; its queues are kept here.
    pub(super) fn pause(&mut self) {
        if std::mem::replace(&mut self.paused, true) {
            return;
        }
        let mut lost = false;
        for (index, slot) in self.queues.iter_mut().enumerate().filter(|(_, slot)| slot.started) {
            slot.held = self.device.stop_queue(index as u16);
            slot.started = slot.held.is_some();
            lost |= !slot.started;
        }
        if lost {
            self.broken(&"a queue was lost");
        }
    }

    /// Lets the device go on. Every queue is kicked: a notification may have been taken before the pause and not acted on.
    pub(super) fn resume(&mut self) {
        if !std::mem::replace(&mut self.paused, false) {
            return;
        }
        for index in 0..self.queues.len() {
            if let Some(queue) = self.queues[index].held.take() {
                self.run(queue);
                self.kick(index as u16);
            }
        }
    }

    /// The driver notifies queue `index`. Doorbells that the kernel watches do not come here.
    pub(super) fn kick(&mut self, index: u16) {
        let kick = self.queues.get(usize::from(index)).and_then(|q| q.kick.as_ref());
        // A full counter means a kick is waiting already.
        if let Some(Err(error)) = kick.map(|k| k.write(1)).filter(|r| !is_full(r)) {
            self.warn(&format_args!("cannot pass a notification on: {error}"));
        }
    }

    /// The guest moved the BAR: the doorbells follow.
    pub(super) fn move_bar(&mut self, address: Option<u64>) {
        self.bar = address;
        for index in 0..self.queues.len() as u16 {
            self.detach_doorbell(index);
            self.attach_doorbell(index);
        }
    }

    fn attach_doorbell(&mut self, index: u16) {
        let Some(slot) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        let (Some(bar), Some(kick), None, true) = (self.bar, &slot.kick, slot.doorbell, slot.started) else {
            return;
        };
        let Some(at) = bar.checked_add(layout::doorbell(index)) else {
            return;
        };
        match self.surroundings.io_events.attach(kick, IoAddress::Mmio(at)) {
            Ok(()) => slot.doorbell = Some(at),
            // Notifications then take the long way, through the BAR.
            Err(error) => self.warn(&format_args!("cannot attach a doorbell: {error}")),
        }
    }

    fn detach_doorbell(&mut self, index: u16) {
        let Some(slot) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        if let (Some(at), Some(kick)) = (slot.doorbell.take(), &slot.kick)
            && let Err(error) = self.surroundings.io_events.detach(kick, IoAddress::Mmio(at))
        {
            self.warn(&format_args!("cannot detach a doorbell: {error}"));
        }
    }

    fn broken(&self, error: &dyn Display) {
        self.warn(&format_args!(
            "the device cannot work on its queues, it needs a reset: {error}"
        ));
        self.interrupts.needs_reset();
    }

    pub(super) fn warn(&self, message: &dyn Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(device = ?self.device.id(), held_back, "{message}");
        }
    }
}

fn is_full(result: &io::Result<()>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}
