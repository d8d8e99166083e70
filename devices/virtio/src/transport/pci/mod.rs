//! virtio over PCI, modern only (virtio 1.2, 4.1).
//!
//! One 64-bit prefetchable BAR holds everything: common configuration at 0, ISR at 0x1000, the device's configuration at 0x2000,
//! doorbells at 0x3000 (4 bytes each, watched by the kernel while the BAR is decoded), the MSI-X table at 0x4000 and its pending
//! bits at 0x7000. There is no interrupt pin.

mod common;
mod core;
mod interrupt;
mod layout;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use triarch_device_core::{AccessError, IoEvents, MsiRouter, Sandbox};
use triarch_pci::{Bars, ConfigSpace, MsiX, PciAddress, PciFunction};

use self::core::{Core, Surroundings};
use self::interrupt::Interrupts;
use self::layout::{Capabilities, access};
pub use self::state::{RestoreError, SaveError, VirtioPciQueueV1, VirtioPciStateV1};
use crate::{DeviceMemory, VirtioDevice, VirtioInterrupt, feature};

/// The command register in configuration space.
const COMMAND: u16 = 4;

/// Bits of device_status (virtio 1.2, 2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u8 = 1;
    pub(super) const DRIVER: u8 = 2;
    pub(super) const DRIVER_OK: u8 = 4;
    pub(super) const FEATURES_OK: u8 = 8;
    pub(super) const NEEDS_RESET: u8 = 64;
    pub(super) const FAILED: u8 = 128;
    /// Bits that need no check.
    pub(super) const ALWAYS: u8 = ACKNOWLEDGE | DRIVER | FAILED;
    /// Bits the driver sets.
    pub(super) const BY_DRIVER: u8 = ALWAYS | DRIVER_OK | FEATURES_OK;
}

/// What the host may want to hear of a device. A guest can cause all of it, as often as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The driver set DRIVER_OK, and the device works.
    Activated,
    /// The driver reset a device that worked.
    Reset,
    /// The device cannot work on its queues: it has set DEVICE_NEEDS_RESET.
    Broken,
}

/// Hears of what happens to a device. It is called by vCPU and worker threads, under locks, and must return at once.
pub type Observer = Box<dyn Fn(DeviceEvent) + Send + Sync>;

/// A [`VirtioDevice`] as a PCI function.
///
/// Resetting, by the driver or by [`detach`](PciFunction::detach), stops the device's queues and so waits for what is in flight.
/// Locks: `config` is never held while `core` is taken, and neither is taken to raise an interrupt.
pub struct VirtioPci {
    config: Mutex<ConfigSpace>,
    capabilities: Capabilities,
    interrupts: Arc<Interrupts>,
    core: Mutex<Core>,
}

impl VirtioPci {
    /// Makes `device` a PCI function, idle and not paused. Interrupts are asked of `router` when the guest first unmasks them.
    /// Fails when the device has more queues than the BAR has doorbells and vectors for.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: impl Into<DeviceMemory>,
        router: Arc<dyn MsiRouter>,
        io_events: Arc<dyn IoEvents>,
        sandbox: Arc<dyn Sandbox>,
    ) -> io::Result<Self> {
        let surroundings = Surroundings {
            memory: memory.into(),
            io_events,
            sandbox,
        };
        Self::build(device, router, surroundings, false)
    }

    /// Continues where `state` was saved: the driver finds what it left, the device is active if it was, and everything stands
    /// until [`resume`](Self::resume). `device` is new, with its own state restored as far as it has any.
    pub fn restore(
        device: Box<dyn VirtioDevice>,
        memory: impl Into<DeviceMemory>,
        router: Arc<dyn MsiRouter>,
        io_events: Arc<dyn IoEvents>,
        sandbox: Arc<dyn Sandbox>,
        state: &VirtioPciStateV1,
    ) -> Result<Self, RestoreError> {
        let surroundings = Surroundings {
            memory: memory.into(),
            io_events,
            sandbox,
        };
        let function = Self::build(device, router, surroundings, true).map_err(RestoreError::Create)?;
        function.config().restore(&state.config).map_err(RestoreError::Config)?;
        function
            .interrupts
            .msix
            .restore(&state.msix)
            .map_err(RestoreError::MsiX)?;
        function.sync_msix();
        function.core().restore(state)?;
        Ok(function)
    }

    fn build(
        device: Box<dyn VirtioDevice>,
        router: Arc<dyn MsiRouter>,
        surroundings: Surroundings,
        paused: bool,
    ) -> io::Result<Self> {
        let count = device.queue_sizes().len();
        let queues = u16::try_from(count)
            .ok()
            .filter(|_| count <= layout::MAX_QUEUES)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "too many virtqueues for one PCI function"))?;
        let msix = MsiX::new(router, queues + 1);
        let (config, capabilities) = layout::config_space(device.id(), queues, &msix)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let interrupts = Arc::new(Interrupts::new(msix, count));
        let core = Core::new(device, interrupts.clone(), surroundings, paused);
        Ok(Self {
            config: Mutex::new(config),
            capabilities,
            interrupts,
            core: Mutex::new(core),
        })
    }

    /// Tells `observer` of what happens from now on. A function has one observer: a second one hears nothing.
    pub fn observe(&self, observer: Observer) {
        self.interrupts.observe(observer);
    }

    /// Lets the device finish what is in flight and stops it. Its vCPUs should not run: what their guest does meanwhile is taken
    /// note of, and has its effect at [`resume`](Self::resume).
    pub fn pause(&self) {
        self.core().pause();
    }

    /// Lets the device go on, and looks at every queue once.
    pub fn resume(&self) {
        self.core().resume();
    }

    /// Runs `f` on the device between two accesses of the guest: to resize it, to read its counters. After a change of its
    /// configuration space the device itself raises the interrupt, before `f` returns, so that the guest sees no half of it.
    pub fn with_device<R>(&self, f: impl FnOnce(&mut (dyn VirtioDevice + 'static)) -> R) -> R {
        f(&mut *self.core().device)
    }

    /// Raises the interrupts of all queues that are worked on. Of a device that was restored one may have been on its way when it was
    /// saved; drivers look at their queues once more and find nothing new otherwise.
    pub fn renew_interrupts(&self) {
        for index in self.core().started() {
            // A guest that cannot be interrupted has its other troubles.
            let _ = self.interrupts.queue(index);
        }
    }

    /// The function for a snapshot. It must be paused.
    pub fn save(&self) -> Result<VirtioPciStateV1, SaveError> {
        let config = self.config().save();
        self.core().save(config)
    }

    /// Whether an IOMMU says what the device reaches.
    pub fn is_behind_iommu(&self) -> bool {
        self.core().offered() & feature::ACCESS_PLATFORM != 0
    }

    /// The device_status register.
    pub fn status(&self) -> u8 {
        self.interrupts.status()
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// MSI-X follows the message control register.
    fn sync_msix(&self) {
        let control = self.config().u16_at(self.capabilities.msix + MsiX::CONTROL);
        self.interrupts.msix.set_control(control);
    }

    /// Where the driver aimed the access capability: offset and length of an access to the BAR, if it is one (virtio 1.2,
    /// 4.1.4.9).
    fn target(&self) -> Option<(u64, usize)> {
        let at = self.capabilities.access;
        let config = self.config();
        let bar = config.u16_at(at + access::BAR) as u8;
        let offset = config.u32_at(at + access::OFFSET);
        let length = config.u32_at(at + access::LENGTH);
        let valid = bar == layout::BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        valid.then_some((offset.into(), length as usize))
    }

    /// Whether a configuration access reaches the data field of the access capability.
    fn is_indirect(&self, offset: u16, len: usize) -> bool {
        let at = usize::from(self.capabilities.access);
        let (first, end) = (usize::from(offset), usize::from(offset) + len);
        first < at + usize::from(access::END) && at + usize::from(access::DATA) < end
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.is_indirect(offset, data.len())
            && let Some((at, len)) = self.target()
        {
            let mut value = [0; 4];
            // What no register answers reads as all ones, as it does through the BAR.
            if self.bar_read(layout::BAR, at, &mut value[..len]).is_err() {
                value[..len].fill(0xff);
            }
            self.config()
                .write(self.capabilities.access + access::DATA, &value[..len]);
        }
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        let mut value = [0; 4];
        config.read(self.capabilities.access + access::DATA, &mut value);
        drop(config);
        if self.is_indirect(offset, data.len()) {
            if let Some((at, len)) = self.target() {
                // Like a write through the BAR that no register takes, it goes nowhere.
                let _ = self.bar_write(layout::BAR, at, &value[..len]);
            }
            return;
        }
        let enabled = self.interrupts.msix.enabled();
        self.sync_msix();
        if self.interrupts.msix.enabled() != enabled {
            self.core().interrupts_changed();
        }
    }

    fn bars(&self) -> Bars {
        self.config().bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if bar != layout::BAR {
            return Err(AccessError::BadAccess);
        }
        match offset {
            layout::COMMON..layout::ISR => common::read(&self.core(), offset, data),
            layout::ISR => {
                data.fill(0);
                let isr = data.first_mut().ok_or(AccessError::BadAccess)?;
                *isr = self.interrupts.take_isr();
                Ok(())
            }
            layout::DEVICE..layout::NOTIFY => {
                self.core().device.read_config(offset - layout::DEVICE, data);
                Ok(())
            }
            // Doorbells are for writing.
            layout::NOTIFY..layout::TABLE => {
                data.fill(0);
                Ok(())
            }
            layout::TABLE..layout::PENDING => self.interrupts.msix.table_read(offset - layout::TABLE, data),
            layout::PENDING.. => self.interrupts.msix.pba_read(offset - layout::PENDING, data),
            _ => Err(AccessError::BadAccess),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        if bar != layout::BAR {
            return Err(AccessError::BadAccess);
        }
        match offset {
            layout::COMMON..layout::ISR => common::write(&mut self.core(), offset, data),
            layout::DEVICE..layout::NOTIFY => {
                self.core().device.write_config(offset - layout::DEVICE, data);
                Ok(())
            }
            layout::NOTIFY..layout::TABLE => {
                let index = (offset - layout::NOTIFY) / layout::NOTIFY_STRIDE;
                self.core().kick(index as u16); // below 1024
                Ok(())
            }
            layout::TABLE..layout::PENDING => self.interrupts.msix.table_write(offset - layout::TABLE, data),
            _ => Err(AccessError::BadAccess),
        }
    }

    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        if bar == layout::BAR {
            self.core().move_bar(address);
        }
    }

    fn attach(&self, address: PciAddress, _slot: u8) {
        self.interrupts.msix.attach(address.requester());
        self.core().place(address.requester().into());
    }

    fn reset(&self) {
        self.config_write(COMMAND, &[0, 0]);
        self.config_write(self.capabilities.msix + MsiX::CONTROL, &[0, 0]);
        self.core().set_status(0);
    }

    fn detach(&self) {
        self.core().remove();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.core().remove();
    }
}
