//! What a device reaches by the addresses its driver gives it: guest memory as it is, or what an IOMMU in front of it lets through.
//!
//! Rings are read and written, and buffers looked up, through [`DeviceView`] alone. So no device knows whether it is behind an IOMMU:
//! what it gets in a chain are guest physical addresses.

use std::iter::FusedIterator;
use std::sync::Arc;

use smallvec::SmallVec;
use triarch_memory::{GuestMemory, GuestMemoryHandle};
use vm_memory::atomic::GuestMemoryLoadGuard;
use vm_memory::bitmap::{BS, MS};
use vm_memory::guest_memory::{
    Error, GuestMemoryBackendSliceIterator, GuestMemorySliceIterator, Result as MemoryResult,
};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory as AddressSpace, GuestMemoryBackend, GuestMemoryRegion, Permissions,
    VolatileSlice,
};

use crate::Segment;
use crate::iommu::Endpoint;

/// Pieces of guest memory behind one range of a driver's addresses.
pub(crate) type Pieces = SmallVec<[Segment; 2]>;

/// Guest memory, and how a device's addresses become addresses in it.
#[derive(Clone)]
pub struct DeviceMemory {
    ram: GuestMemoryHandle,
    endpoint: Option<Arc<Endpoint>>,
}

impl From<GuestMemoryHandle> for DeviceMemory {
    /// All of it, at its own addresses.
    fn from(ram: GuestMemoryHandle) -> Self {
        Self { ram, endpoint: None }
    }
}

impl DeviceMemory {
    /// What the IOMMU lets `endpoint` reach of `ram`.
    pub fn behind(ram: GuestMemoryHandle, endpoint: Arc<Endpoint>) -> Self {
        Self {
            ram,
            endpoint: Some(endpoint),
        }
    }

    /// Guest memory as it is.
    pub(crate) fn ram(&self) -> &GuestMemoryHandle {
        &self.ram
    }

    /// What the device is to the IOMMU, if there is one in front of it.
    pub(crate) fn endpoint(&self) -> Option<&Arc<Endpoint>> {
        self.endpoint.as_ref()
    }

    /// Memory as the device sees it now.
    pub(crate) fn view(&self) -> DeviceView<'_> {
        DeviceView {
            ram: self.ram.memory(),
            endpoint: self.endpoint.as_deref(),
        }
    }
}

/// Memory by the addresses of a driver.
pub(crate) struct DeviceView<'m> {
    ram: GuestMemoryLoadGuard<GuestMemory>,
    endpoint: Option<&'m Endpoint>,
}

impl DeviceView<'_> {
    /// Guest memory as it is.
    pub(crate) fn ram(&self) -> &GuestMemory {
        &self.ram
    }

    /// Where in guest memory `len` bytes at the driver's address `addr` are, in at most `max` pieces; `None` if an IOMMU does not let the
    /// device do that there. Whether the pieces are memory is for the caller to find out.
    pub(crate) fn translate(&self, addr: GuestAddress, len: u32, write: bool, max: usize) -> Option<Pieces> {
        match self.endpoint {
            None => Some(Pieces::from_elem(Segment { addr, len }, 1)),
            Some(endpoint) => endpoint.translate(addr.0, len, write, max),
        }
    }

    fn pieces(&self, addr: GuestAddress, count: usize, access: Permissions) -> Option<Pieces> {
        // Structures of rings are 512 KiB at most.
        let len = u32::try_from(count).ok()?;
        self.translate(addr, len, access.has_write(), usize::MAX)
    }
}

impl AddressSpace for DeviceView<'_> {
    type PhysicalMemory = GuestMemory;
    type Bitmap = <<GuestMemory as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let in_ram = |addr, len| GuestMemoryBackend::check_range(self.ram(), addr, len);
        if self.endpoint.is_none() {
            return in_ram(addr, count);
        }
        let pieces = self.pieces(addr, count, access);
        pieces.is_some_and(|pieces| pieces.iter().all(|piece| in_ram(piece.addr, piece.len as usize)))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> MemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let ram = self.ram();
        let mut slices = Slices {
            ram,
            now: GuestMemoryBackend::get_slices(ram, addr, count),
            rest: Pieces::new().into_iter(),
        };
        if self.endpoint.is_some() {
            let blocked = Error::InvalidGuestAddress(addr);
            let mut pieces = self.pieces(addr, count, access).ok_or(blocked)?.into_iter();
            if let Some(first) = pieces.next() {
                slices.now = GuestMemoryBackend::get_slices(ram, first.addr, first.len as usize);
            }
            slices.rest = pieces;
        }
        Ok(slices)
    }
}

/// Slices of one piece after the other.
struct Slices<'a> {
    ram: &'a GuestMemory,
    now: GuestMemoryBackendSliceIterator<'a, GuestMemory>,
    rest: smallvec::IntoIter<[Segment; 2]>,
}

impl<'a> Iterator for Slices<'a> {
    type Item = MemoryResult<VolatileSlice<'a, MS<'a, GuestMemory>>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.now.next() {
                Some(Err(error)) => {
                    self.rest = Pieces::new().into_iter();
                    return Some(Err(error));
                }
                Some(slice) => return Some(slice),
                None => {
                    let Segment { addr, len } = self.rest.next()?;
                    self.now = GuestMemoryBackend::get_slices(self.ram, addr, len as usize);
                }
            }
        }
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, MS<'a, GuestMemory>> for Slices<'a> {}
