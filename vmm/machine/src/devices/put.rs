//! Putting devices on the bus.

use std::sync::Arc;

use triarch_pci::PciAddress;
use triarch_vhost_user::Peer;
use triarch_virtio::iommu::Endpoint;
use triarch_virtio::{DeviceMemory, VirtioDevice, VirtioPci};

use super::host::Function;
use super::make::observer;
use super::{Devices, Made, Placed};
use crate::progress::Progress;
use crate::{MachineError, vhost};

impl Devices {
    /// Adds the device that the daemon `peer` serves.
    pub(super) fn add_served(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        id: &Option<String>,
        peer: &Arc<Peer>,
    ) -> Result<(), MachineError> {
        let host = &self.host;
        let (sandbox, report, events) = (host.sandbox.clone(), host.report.clone(), host.events.clone());
        let (mut handle, rooms) = (None, self.rooms.clone());
        self.add(progress, total, id, |id| {
            let device = vhost::device(id, peer, &sandbox, &report, &events)?;
            device.show_rooms(rooms);
            handle = Some((id.to_owned(), device.handle()));
            Ok(Box::new(device))
        })?;
        self.daemons.extend(handle);
        Ok(())
    }

    /// Makes a device, one of `total`, and puts it into its slot: where it was before, or the next that is free.
    pub(super) fn add(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        id: &Option<String>,
        make: impl FnOnce(&str) -> Made<Box<dyn VirtioDevice>>,
    ) -> Result<(), MachineError> {
        self.add_behind(progress, total, id, None, make)
    }

    /// The same; the guest's IOMMU knows it as `endpoint`, if it is behind that.
    pub(super) fn add_behind(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        id: &Option<String>,
        endpoint: Option<Arc<Endpoint>>,
        make: impl FnOnce(&str) -> Made<Box<dyn VirtioDevice>>,
    ) -> Result<(), MachineError> {
        let name = id.as_deref().unwrap_or_default();
        let failed = |source| MachineError::Device {
            id: name.to_owned(),
            source,
        };
        let host = &self.host;
        let device = make(name).map_err(failed)?;
        let memory = match endpoint {
            None => DeviceMemory::from(host.memory.clone()),
            Some(endpoint) => {
                // A restored one uses its queues before it is on the bus. Nothing follows it that could fail.
                if let Some(place) = self.places.get(name) {
                    let _ = endpoint.place(place.requester().into());
                }
                DeviceMemory::behind(host.memory.clone(), endpoint)
            }
        };
        let function = match &mut self.saved {
            Some(saved) => saved.function(name, device, memory, host)?,
            None => {
                let (router, io_events) = (host.router.clone(), host.io_events.clone());
                VirtioPci::new(device, memory, router, io_events, host.sandbox.clone()).map_err(|e| failed(e.into()))?
            }
        };
        let function = Arc::new(function);
        function.observe(observer(&host.events, name));
        if self.paused {
            function.pause();
        }
        self.put(progress, total, id, Function::Virtio(function)).map(drop)
    }

    /// Puts a device into its slot, and returns where that is.
    pub(super) fn put(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        id: &Option<String>,
        function: Function,
    ) -> Result<PciAddress, MachineError> {
        let name = id.as_deref().unwrap_or_default();
        let slot = self.host.root.add(function.on_bus(), self.places.get(name).copied());
        let address = slot.map_err(|source| MachineError::Slot {
            id: name.to_owned(),
            source,
        })?;
        tracing::debug!(id = name, %address, "device added");
        self.functions.push(Placed {
            id: name.to_owned(),
            address,
            function,
            removable: false,
        });
        progress.count(self.functions.len(), total, "devices");
        Ok(address)
    }
}
