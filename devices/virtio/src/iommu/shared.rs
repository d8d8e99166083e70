//! What the device, its threads and the devices behind it share.

use std::collections::VecDeque;
use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bit;
use super::domains::{Blocked, Domains, IommuDomainV1};
use super::request::{PROPERTIES, Request, ReservedRegion, Status, properties};
use super::shadow::Shadow;
use crate::dma::Pieces;

/// Faults that wait for the driver to take note of them; more are dropped.
const MAX_FAULTS: usize = 64;
/// VIRTIO_IOMMU_FAULT_F_*.
const FAULT_READ: u32 = 1;
const FAULT_WRITE: u32 = 2;
const FAULT_ADDRESS: u32 = 1 << 8;

/// What of an IOMMU goes into a snapshot, beside what its transport saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioIommuStateV1 {
    /// Devices in no domain reach all memory, unless the driver knows no bypass.
    pub bypass: bool,
    /// The domains.
    pub domains: Vec<IommuDomainV1>,
}

/// A saved IOMMU that cannot have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the saved domains of the IOMMU contradict each other")]
pub struct IommuStateError;

/// A device did what it may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    endpoint: u32,
    write: bool,
    blocked: Blocked,
}

impl Fault {
    /// struct virtio_iommu_fault (virtio 1.2, 5.13.6.9).
    pub(super) fn bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[0] = self.blocked.reason as u8;
        let flags = FAULT_ADDRESS | if self.write { FAULT_WRITE } else { FAULT_READ };
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.endpoint.to_le_bytes());
        bytes[16..].copy_from_slice(&self.blocked.address.to_le_bytes());
        bytes
    }
}

pub(super) struct Shared {
    domains: RwLock<Domains>,
    regions: Vec<ReservedRegion>,
    faults: Mutex<VecDeque<Fault>>,
    /// Readable while there may be faults to tell of.
    pub(super) wake: EventFd,
}

impl Shared {
    pub(super) fn new(regions: Vec<ReservedRegion>) -> io::Result<Self> {
        Ok(Self {
            domains: RwLock::new(Domains::new()),
            regions,
            faults: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub(super) fn domains(&self) -> RwLockReadGuard<'_, Domains> {
        self.domains.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self) -> RwLockWriteGuard<'_, Domains> {
        self.domains.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, VecDeque<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest fault that the driver was not told of.
    pub(super) fn next_fault(&self) -> Option<Fault> {
        self.faults().pop_front()
    }

    /// Puts it back: there is no room for it yet.
    pub(super) fn keep_fault(&self, fault: Fault) {
        self.faults().push_front(fault);
    }

    pub(super) fn forget_faults(&self) {
        self.faults().clear();
    }

    fn report(&self, fault: Fault) {
        let mut faults = self.faults();
        if faults.len() < MAX_FAULTS {
            faults.push_back(fault);
            // A full counter means that it is readable.
            let _ = self.wake.write(1);
        }
    }

    /// Does what the driver asks, which agreed on `features`; PROBE has properties for an answer.
    pub(super) fn serve(&self, request: Request, features: u64) -> Result<Option<[u8; PROPERTIES]>, Status> {
        match request {
            Request::Attach { bypass: true, .. } if features & bit::BYPASS_CONFIG == 0 => Err(Status::Invalid),
            Request::Attach {
                domain,
                endpoint,
                bypass,
            } => self.change().attach(endpoint, domain, bypass).map(|()| None),
            Request::Detach { domain, endpoint } => self.change().detach(endpoint, domain).map(|()| None),
            Request::Map { domain, mapping } => self.change().map(domain, &mapping).map(|()| None),
            Request::Unmap { domain, first, last } => self.change().unmap(domain, first, last).map(|()| None),
            Request::Probe { endpoint } if self.domains().knows(endpoint) => {
                Ok(Some(properties(&self.regions_of(endpoint))))
            }
            Request::Probe { .. } => Err(Status::NoEntry),
        }
    }

    /// What must not be mapped for `endpoint`: what no endpoint may have, and what it cannot have beside that.
    fn regions_of(&self, endpoint: u32) -> Vec<ReservedRegion> {
        let gaps = self.domains().gaps(endpoint);
        let told = |gap: &RangeInclusive<u64>| {
            let mut regions = self.regions.iter().map(ReservedRegion::range);
            regions.any(|range| range.contains(gap.start()) && range.contains(gap.end()))
        };
        let gaps = gaps.into_iter().filter(|gap| !told(gap)).map(ReservedRegion::Nothing);
        self.regions.iter().cloned().chain(gaps).collect()
    }
}

/// The IOMMU as the devices behind it see it.
#[derive(Clone)]
pub struct IommuHandle(pub(super) Arc<Shared>);

impl IommuHandle {
    /// A device to come, with what follows if it reaches memory by itself. Until it is [placed](Endpoint::place) it reaches nothing.
    pub fn endpoint(&self, shadow: Option<Arc<dyn Shadow>>) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            iommu: self.0.clone(),
            id: OnceLock::new(),
            shadow,
            gone: AtomicBool::new(false),
        })
    }

    /// How many devices are behind it, in how many domains, with how many mappings.
    pub fn count(&self) -> (usize, usize, usize) {
        self.0.domains().count()
    }
}

/// A device behind the IOMMU.
pub struct Endpoint {
    iommu: Arc<Shared>,
    id: OnceLock<u32>,
    shadow: Option<Arc<dyn Shadow>>,
    gone: AtomicBool,
}

impl Endpoint {
    /// Says where the device is: `id` is its PCI requester id. Only the first call counts.
    ///
    /// # Errors
    /// That of its shadow: it cannot reach what the driver lets it, and reaches nothing.
    pub fn place(&self, id: u32) -> io::Result<()> {
        match self.id.set(id) {
            Ok(()) => self.iommu.change().add(id, self.shadow.clone()),
            Err(_) => Ok(()),
        }
    }

    /// The device is gone: its place is free for another one.
    pub fn remove(&self) {
        if let Some(id) = self.id.get().filter(|_| !self.gone.swap(true, Ordering::Relaxed)) {
            self.iommu.change().remove(*id);
        }
    }

    /// Where `len` bytes at the device's address `addr` are, in at most `max` pieces. The driver is told if it may not do that.
    pub(crate) fn translate(&self, addr: u64, len: u32, write: bool, max: usize) -> Option<Pieces> {
        let endpoint = *self.id.get()?;
        let translated = self.iommu.domains().translate(endpoint, addr, len, write, max);
        match translated {
            Ok(pieces) => pieces,
            Err(blocked) => {
                self.iommu.report(Fault {
                    endpoint,
                    write,
                    blocked,
                });
                None
            }
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.remove();
    }
}
