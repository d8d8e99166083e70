//! The guest's IOMMU among the devices.

use std::sync::Arc;

use triarch_arch::{PciIommu, layout};
use triarch_pci::{BUSES_OF_ROOT, PciAddress};
use triarch_virtio::iommu::{Endpoint, IommuHandle, ReservedRegion, Shadow, VirtioIommu};

use super::{Devices, Placed};
use crate::MachineError;
use crate::progress::Progress;

/// Its name.
const ID: &str = "_iommu";

/// The guest's IOMMU.
pub(super) struct Iommu {
    handle: IommuHandle,
    /// Every device that can be is behind it, whatever else is said of it.
    all: bool,
}

impl Devices {
    /// Adds the IOMMU, before any device that could be behind it. With `all`, every such device is.
    pub(super) fn add_iommu(&mut self, progress: Progress<'_>, total: usize, all: bool) -> Result<(), MachineError> {
        let mut handle = None;
        self.add(progress, total, &Some(ID.into()), |id| {
            // Messages are no memory, and pass as they are.
            let device = VirtioIommu::new(id, vec![ReservedRegion::Messages(layout::MESSAGES)])?;
            handle = Some(device.handle());
            Ok(Box::new(device))
        })?;
        self.iommu = handle.map(|handle| Iommu { handle, all });
        Ok(())
    }

    /// What a device is to the IOMMU that is behind it: one that is `wanted` there.
    pub(super) fn endpoint(&self, wanted: bool) -> Option<Arc<Endpoint>> {
        self.iommu_for(wanted).map(|iommu| iommu.handle.endpoint(None))
    }

    /// The same for a device that reaches memory by itself, which `shadow` follows.
    pub(super) fn shadowed(&self, wanted: bool, shadow: impl FnOnce() -> Arc<dyn Shadow>) -> Option<Arc<Endpoint>> {
        let iommu = self.iommu_for(wanted)?;
        Some(iommu.handle.endpoint(Some(shadow())))
    }

    fn iommu_for(&self, wanted: bool) -> Option<&Iommu> {
        self.iommu.as_ref().filter(|iommu| wanted || iommu.all)
    }

    /// Whether every device that comes is behind the IOMMU.
    pub(crate) fn all_behind_iommu(&self) -> bool {
        self.iommu.as_ref().is_some_and(|iommu| iommu.all)
    }

    /// What the guest's tables say of its IOMMU. Where all devices are behind it, slots are, too, that are free yet; those whose devices
    /// cannot be are left out.
    pub(crate) fn iommu(&self) -> Option<PciIommu> {
        let iommu = self.iommu.as_ref()?;
        let own = self.functions.iter().find(|placed| placed.id == ID)?;
        let behind = match iommu.all {
            true => {
                let last = self.windows().len() * usize::from(BUSES_OF_ROOT) - 1;
                let slots = (0..=last as u8).filter(|slot| !slot.is_multiple_of(BUSES_OF_ROOT));
                let slots = slots.filter(|slot| !self.outside(*slot));
                let first = |slot| PciAddress::in_slot(0, slot, 0, false).requester();
                slots.map(|slot| (first(slot), first(slot) | 7)).collect()
            }
            false => {
                let behind = self.functions.iter().filter(|placed| placed.function.is_behind_iommu());
                behind.map(requester).map(|at| (at, at)).collect()
            }
        };
        Some(PciIommu {
            requester: requester(own),
            behind,
        })
    }

    /// Whether the device in `slot` is not behind the IOMMU.
    fn outside(&self, slot: u8) -> bool {
        let mut there = self.functions.iter().filter(|placed| placed.address.slot() == slot);
        there.any(|placed| !placed.function.is_behind_iommu())
    }
}

fn requester(placed: &Placed) -> u16 {
    placed.address.requester()
}
