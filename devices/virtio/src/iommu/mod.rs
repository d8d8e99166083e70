//! IOMMU (virtio 1.2, 5.13): the guest decides which memory its devices reach.
//!
//! The devices behind it are endpoints, by their PCI requester ids. The driver puts them into domains and maps memory into those. Until it
//! does, and for endpoints that it leaves alone, the configuration space says whether they reach all memory; from the start they do, so
//! that firmware and kernels without a driver work. What a device may reach is looked up when its queue takes a chain, and at each look at
//! its rings ([`crate::dma`]): requests that it has taken when a mapping goes end with the addresses that they had. What a device reaches that
//! no queue here serves is up to something else, which follows ([`Shadow`]).

mod domains;
mod request;
mod shadow;
mod shared;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;

use triarch_device_core::{ThreadClass, Worker};
use vmm_sys_util::eventfd::EventFd;

pub use domains::{IommuDomainV1, IommuMappingV1, LAST_ADDRESS, LAST_DOMAIN, MAX_MAPPINGS, PAGE};
pub use request::ReservedRegion;
pub use shadow::Shadow;
pub use shared::{Endpoint, IommuHandle, IommuStateError, VirtioIommuStateV1};

use request::PROPERTIES;
use shared::Shared;
use worker::Job;

use crate::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, feature, read_config_bytes};

/// Feature bits (virtio 1.2, 5.13.3).
mod bit {
    /// The configuration space has the addresses that may be mapped.
    pub(super) const INPUT_RANGE: u64 = 1 << 0;
    /// And the numbers of domains.
    pub(super) const DOMAIN_RANGE: u64 = 1 << 1;
    /// MAP and UNMAP.
    pub(super) const MAP_UNMAP: u64 = 1 << 2;
    /// PROBE.
    pub(super) const PROBE: u64 = 1 << 4;
    /// Registers can be mapped.
    pub(super) const MMIO: u64 = 1 << 5;
    /// The driver says what becomes of endpoints in no domain.
    pub(super) const BYPASS_CONFIG: u64 = 1 << 6;
    pub(super) const ALL: u64 = INPUT_RANGE | DOMAIN_RANGE | MAP_UNMAP | PROBE | MMIO | BYPASS_CONFIG;
}

/// Requests and events.
const QUEUE_SIZES: [u16; 2] = [128, 64];
/// Where the configuration space has what becomes of endpoints in no domain.
const BYPASS: u64 = 36;
const CONFIG_LEN: usize = 40;

/// An IOMMU.
pub struct VirtioIommu {
    name: String,
    shared: Arc<Shared>,
    context: Option<DeviceContext>,
    workers: [Option<Worker<Job>>; 2],
}

impl VirtioIommu {
    /// An IOMMU without devices behind it, none of which may have `regions` mapped. Its threads are called after `name`.
    pub fn new(name: &str, regions: Vec<ReservedRegion>) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            shared: Arc::new(Shared::new(regions)?),
            context: None,
            workers: [None, None],
        })
    }

    /// The way to it for devices behind it.
    pub fn handle(&self) -> IommuHandle {
        IommuHandle(self.shared.clone())
    }

    /// What of it goes into a snapshot, while it is paused.
    pub fn state(&self) -> VirtioIommuStateV1 {
        let domains = self.shared.domains();
        VirtioIommuStateV1 {
            bypass: domains.bypass(),
            domains: domains.save(),
        }
    }

    /// Continues with what was saved, before any device is behind it.
    ///
    /// # Errors
    /// No driver can have made these domains.
    pub fn restore(&mut self, state: &VirtioIommuStateV1) -> Result<(), IommuStateError> {
        let mut domains = self.shared.change();
        let restored = domains.restore(state.bypass, &state.domains);
        restored.map_err(|_| IommuStateError)
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(!(PAGE - 1)).to_le_bytes());
        put(16, &LAST_ADDRESS.to_le_bytes());
        put(28, &LAST_DOMAIN.to_le_bytes());
        put(32, &(PROPERTIES as u32).to_le_bytes());
        put(BYPASS as usize, &[u8::from(self.shared.domains().bypass())]);
        config
    }
}

impl VirtioDevice for VirtioIommu {
    fn id(&self) -> DeviceId {
        DeviceId::Iommu
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature::COMMON | bit::ALL
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    /// Only what becomes of endpoints in no domain can be written, as a byte.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (BYPASS, [value @ (0 | 1)]) = (offset, data) {
            self.shared.change().set_bypass(*value == 1);
        }
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the IOMMU is active already"));
        }
        let strict = context.features & bit::BYPASS_CONFIG == 0;
        self.shared.change().set_strict(strict);
        self.context = Some(context);
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver("a queue starts before the IOMMU is active"));
        };
        let index = queue.index();
        let Some(place @ None) = self.workers.get_mut(usize::from(index)) else {
            return Err(ActivateError::Driver("the queue runs already"));
        };
        let (class, what, body): (_, _, fn(&mut Job, &EventFd)) = match index {
            0 => (ThreadClass::Memory, "the IOMMU's thread", Job::requests),
            _ => (ThreadClass::Device, "the IOMMU's thread for faults", Job::events),
        };
        let name = format!("{}_q{index}", self.name);
        let job = Job::new(queue, self.shared.clone(), context.features);
        let worker = Worker::spawn(&name, class, &context.sandbox, job, body);
        *place = Some(worker.map_err(|source| ActivateError::Host { what, source })?);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let worker = self.workers.get_mut(usize::from(index))?.take()?;
        worker.stop().map(Job::into_queue)
    }

    /// Domains go with the driver. What becomes of endpoints in none stays as the last driver had it (5.13.4.2), until the guest resets.
    fn reset(&mut self) {
        self.stop_queue(0);
        self.stop_queue(1);
        self.context = None;
        self.shared.forget_faults();
        self.shared.change().reset();
    }
}

impl Drop for VirtioIommu {
    fn drop(&mut self) {
        self.stop_queue(0);
        self.stop_queue(1);
    }
}
