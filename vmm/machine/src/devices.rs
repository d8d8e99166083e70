//! The PCI devices of a guest: made from the configuration, paused and resumed together.
//!
//! A new kind of device is one more `add_...` call in [`Devices::build`].

use std::sync::Arc;

use triarch_api::VmConfig;
use triarch_device_core::{IoEvents, MsiRouter, Sandbox};
use triarch_memory::GuestMemoryHandle;
use triarch_pci::{BarAllocator, PciRoot};

use crate::MachineError;
use crate::consoles::Consoles;

/// What devices are built on.
pub(crate) struct Host {
    pub(crate) root: Arc<PciRoot>,
    pub(crate) memory: GuestMemoryHandle,
    pub(crate) router: Arc<dyn MsiRouter>,
    pub(crate) io_events: Arc<dyn IoEvents>,
    pub(crate) sandbox: Arc<dyn Sandbox>,
}

/// The PCI devices of a guest.
pub(crate) struct Devices {
    host: Host,
}

impl Devices {
    pub(crate) fn build(config: &VmConfig, consoles: &Consoles, host: Host) -> Result<Self, MachineError> {
        let _ = (config, consoles);
        Ok(Self { host })
    }

    pub(crate) fn windows(&self) -> &BarAllocator {
        self.host.root.windows()
    }

    pub(crate) fn pause(&self) {}

    pub(crate) fn resume(&self) {}
}
