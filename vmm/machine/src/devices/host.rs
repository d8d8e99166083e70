//! Devices of the host among the others.

use std::sync::{Arc, Weak};

use triarch_api::DeviceConfig;
use triarch_pci::PciFunction;
use triarch_vfio::{Container, Counters, HostDevice, Options, VfioPci};
use triarch_virtio::VirtioPci;

use super::{Devices, Placed};
use crate::MachineError;
use crate::progress::Progress;

/// A device as the bus has it.
pub(super) enum Function {
    Virtio(Arc<VirtioPci>),
    /// A device of the host. It does not stand still while the guest does: what it was told it goes on with.
    Host(Arc<VfioPci>),
}

impl Function {
    /// It as the bus has it.
    pub(super) fn on_bus(&self) -> Arc<dyn PciFunction> {
        match self {
            Self::Virtio(function) => function.clone(),
            Self::Host(function) => function.clone(),
        }
    }

    /// It, if it is one of ours.
    pub(super) fn virtio(&self) -> Option<&VirtioPci> {
        match self {
            Self::Virtio(function) => Some(function),
            Self::Host(_) => None,
        }
    }
}

impl Devices {
    /// Adds a device of the host, which reaches all of the guest's memory from now on.
    pub(super) fn add_host(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        device: Arc<HostDevice>,
        config: &DeviceConfig,
    ) -> Result<(), MachineError> {
        let (host, id) = (&self.host, &config.id);
        if self.saved.is_some() {
            return Err(MachineError::device(
                id,
                "a device of the host cannot be saved or restored",
            ));
        }
        let container: Weak<Container> = Arc::downgrade(device.container());
        host.discarder.keep_for(container);
        host.reach.attach(device.container())?;
        let options = Options {
            ports: !host.root.windows().io.is_empty(),
            wires: host.wires,
            clique: config.x_nv_gpudirect_clique,
            peers: host.peers.then(|| host.reach.clone()),
        };
        let function = VfioPci::new(&device, host.vm.clone(), &host.router, options);
        let function = Arc::new(function.map_err(|error| MachineError::device(id, error))?);
        self.put(progress, total, id, Function::Host(function))
    }

    /// What devices of the host count, by their ids.
    pub(super) fn hosts(&self) -> Vec<(String, Arc<Counters>)> {
        let counters = |placed: &Placed| match &placed.function {
            Function::Host(function) => Some((placed.id.clone(), function.counters().clone())),
            Function::Virtio(_) => None,
        };
        self.functions.iter().filter_map(counters).collect()
    }

    /// Stops devices of the host for good: they reach nothing any more.
    pub(crate) fn stop(&self) {
        for placed in &self.functions {
            if let Function::Host(function) = &placed.function {
                function.stop();
            }
        }
    }
}
