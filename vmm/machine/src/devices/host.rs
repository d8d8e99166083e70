//! Devices of the host among the others.

use std::sync::{Arc, Weak};

use triarch_api::DeviceConfig;
use triarch_pci::PciFunction;
use triarch_vfio::{Container, Counters, Fleet, HostDevice, Options, VfioPci};
use triarch_virtio::VirtioPci;
use triarch_virtio::iommu::{Endpoint, PAGE};

use super::{Devices, Placed, Taken};
use crate::MachineError;
use crate::passthrough::Follower;
use crate::progress::Progress;

/// A device as the bus has it.
pub(super) enum Function {
    Virtio(Arc<VirtioPci>),
    /// A device of the host. It stands still with the guest only if [all can](Devices::pause_hosts): others go on with what they were told. The
    /// guest's IOMMU knows it as the endpoint, if it is behind that.
    Host(Arc<VfioPci>, Option<Arc<Endpoint>>),
}

impl Function {
    /// It as the bus has it.
    pub(super) fn on_bus(&self) -> Arc<dyn PciFunction> {
        match self {
            Self::Virtio(function) => function.clone(),
            Self::Host(function, _) => function.clone(),
        }
    }

    /// It, if it is one of ours.
    pub(super) fn virtio(&self) -> Option<&VirtioPci> {
        match self {
            Self::Virtio(function) => Some(function),
            Self::Host(..) => None,
        }
    }

    /// Whether the guest's IOMMU is in front of it.
    pub(super) fn is_behind_iommu(&self) -> bool {
        match self {
            Self::Virtio(function) => function.is_behind_iommu(),
            Self::Host(_, endpoint) => endpoint.is_some(),
        }
    }
}

impl Devices {
    /// Adds a device of the host, which reaches all of the guest's memory from now on, or what the guest's IOMMU lets it.
    pub(super) fn add_host(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        device: Arc<HostDevice>,
        config: &DeviceConfig,
    ) -> Result<(), MachineError> {
        let (host, id) = (&self.host, &config.id);
        let container: Weak<Container> = Arc::downgrade(device.container());
        host.discarder.keep_for(container);
        let endpoint = self.shadowed(device.is_apart(), || Follower::of(&device, &host.reach));
        if endpoint.is_none() {
            host.reach.attach(device.container())?;
        } else if device.page_size() > PAGE {
            return Err(MachineError::device(
                id,
                "the host's pages are larger than 4 KiB, and devices of such a host cannot be behind the guest's IOMMU; leave iommu and \
                 platform.iommu_segments out",
            ));
        }
        let options = Options {
            // Below a port there are none, and beside bus 0 neither.
            ports: self.has_ports(config),
            link: config.root_port,
            wires: host.wires,
            clique: config.x_nv_gpudirect_clique,
            peers: (host.peers && endpoint.is_none()).then(|| host.reach.clone()),
        };
        let function = match &mut self.saved {
            Some(_) if endpoint.is_some() => {
                let why = "a device of the host that is behind the guest's IOMMU cannot be saved or restored";
                return Err(MachineError::device(id, why));
            }
            Some(saved) => saved.host_function(id.as_deref().unwrap_or_default(), &device, host, options)?,
            None => {
                let made = VfioPci::new(&device, host.vm.clone(), &host.router, options);
                made.map_err(|error| MachineError::device(id, error))?
            }
        };
        let function = Function::Host(Arc::new(function), endpoint.clone());
        let address = self.put(progress, total, id, function)?;
        if let Some(endpoint) = endpoint {
            endpoint.place(address.requester().into()).map_err(|error| {
                let root = self.host.root.clone();
                if let Some(placed) = self.functions.pop() {
                    Taken { placed, root }.remove();
                }
                MachineError::device(id, error)
            })?;
        }
        if self.paused {
            self.pause_hosts();
        }
        Ok(())
    }

    /// Whether a device can have I/O ports.
    fn has_ports(&self, config: &DeviceConfig) -> bool {
        let root = usize::from(crate::configured::DeviceConfig::Host(config).root());
        let windows = self.windows().get(root);
        windows.is_some_and(|windows| !windows.io.is_empty()) && !config.root_port
    }

    fn host_devices(&self) -> impl Iterator<Item = &Arc<HostDevice>> {
        self.functions.iter().filter_map(|placed| match &placed.function {
            Function::Host(function, _) => Some(function.host()),
            Function::Virtio(_) => None,
        })
    }

    /// Has devices of the host stand still, if all of them can.
    pub(crate) fn pause_hosts(&self) {
        let devices: Vec<_> = self.host_devices().cloned().collect();
        Fleet::paused(&devices, self.host.peers).pause();
    }

    /// Has those work that stand still.
    pub(crate) fn resume_hosts(&self) {
        let movers = self.host_devices().filter_map(|device| device.mover().ok());
        Fleet::new(movers.collect()).resume();
    }

    /// The ids of those of the host.
    pub(crate) fn of_host(&self) -> impl Iterator<Item = &str> {
        let of_host = |placed: &&Placed| matches!(placed.function, Function::Host(..));
        self.functions.iter().filter(of_host).map(|placed| placed.id.as_str())
    }

    /// What devices of the host count, by their ids.
    pub(super) fn hosts(&self) -> Vec<(String, Arc<Counters>)> {
        let counters = |placed: &Placed| match &placed.function {
            Function::Host(function, _) => Some((placed.id.clone(), function.counters().clone())),
            Function::Virtio(_) => None,
        };
        self.functions.iter().filter_map(counters).collect()
    }

    /// Stops devices of the host for good: they reach nothing any more.
    pub(crate) fn stop(&self) {
        for placed in &self.functions {
            if let Function::Host(function, _) = &placed.function {
                function.stop();
            }
        }
    }
}
